"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): more tokens are predicted
at every position, for a denser loss.

The main model predicts token i + 1 from the tokens up to i. A chain of modules follows it.
Module k takes two inputs: the representation h of position i from the previous module (from the
main model: after its last norm), and the embedding of token i + k. It predicts token i + k + 1
(equations 21 to 23):

    x = w_h norm(h) + w_token norm(embedding of token i + k)      one matrix [2D, D], in two halves
    h = norm(block(x))
    loss_k = cross entropy of head(h)

So a prediction further ahead uses all tokens in between. The modules share the main model's
embedding and head. The training loss is the main loss plus ``weight`` times the mean of the
modules' losses (equations 24 and 25). All losses are sums over tokens, divided by the main loss's
count. The modules' loss is an auxiliary loss, like the auxiliary loss of experts: a stage returns
it beside y, and the reported loss is the main loss.

``make_batch`` shifts the tokens by k, because it has whole rows. The shifted tokens are part of
the batch, so the shift needs no communication on any mesh. Under pipelining all modules are in
the last stage. That stage then has a copy of the first stage's embedding (stages.py).

The modules do not change the main model's predictions. Without modules, or with a batch that has
no tokens ahead (validation, generation), only the main model runs. Left out: speculative
decoding with the modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.errors import UserError
from dtron.layers.cross_entropy import IGNORE
from dtron.layers.linear import linear
from dtron.layers.norm import norm

LARGEST_DEPTH = 1000  # modules; each is a block


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction."""

    depth: int = 0
    """number of further tokens that are predicted at every position; 0: none"""
    weight: float = 0.3
    """weight of their mean loss, which is added to the main loss"""

    def __post_init__(self) -> None:
        if self.depth < 0 or not 0 <= self.weight < float("inf"):
            raise UserError(
                f"model.mtp depth={self.depth}, weight={self.weight}: both are at least 0; raise "
                "them"
            )
        if self.depth > LARGEST_DEPTH:
            raise UserError(f"model.mtp.depth={self.depth}: at most {LARGEST_DEPTH}; lower it")


def look_ahead(
    tokens_BS: Tensor, targets_BS: Tensor, depth: int, documents_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the modules' inputs and targets, ``[B, S, depth]`` each.

    Inputs are tokens i + 1 to i + depth; targets are tokens i + 2 to i + 1 + depth. A target is
    IGNORE in three cases: the row has no such token, the main loss ignores the token, or the token
    is in another document. (A row's last target counts as part of the document of the token before
    it.) Tokens past the end are 0; they have only ignored targets.

    ``tokens_BS``: token i.
    ``targets_BS``: token i + 1, or IGNORE.
    ``depth``: the number of modules.
    ``documents_BS``: the document of each token (None: one document per row)."""

    def shift(x: Tensor, k: int, fill: int) -> Tensor:
        return F.pad(x[:, k:], (0, min(k, x.shape[1])), value=fill)

    ahead = torch.cat([tokens_BS[:, 1:], targets_BS[:, -1:].clamp(min=0)], dim=1)
    tokens = [shift(ahead, k, 0) for k in range(depth)]
    targets = [shift(targets_BS, k + 1, IGNORE) for k in range(depth)]
    if documents_BS is not None:
        of_target = torch.cat([documents_BS[:, 1:], documents_BS[:, -1:]], dim=1)
        same = [shift(of_target, k + 1, -1) == documents_BS for k in range(depth)]
        targets = [t.where(s, IGNORE) for t, s in zip(targets, same, strict=True)]
    return torch.stack(tokens, dim=-1), torch.stack(targets, dim=-1)


def module(
    p: Any, h_TD: Tensor, load_E: Tensor | None, e_TD: Tensor, block: Callable, eps: float
) -> tuple[Tensor, ...]:
    """Apply one module. Everything except ``block`` is local. Return the module's own h and the
    block's other outputs.

    ``p``: an ``MTPModule``.
    ``h_TD``: ``[T@tokens_sp, D]``, the previous module's h.
    ``load_E``: for experts, see ``route``.
    ``e_TD``: the embedding of this module's token.
    ``block``: a transformer block, called as ``block(p.block, x_TD, load_E)``."""
    from_h_TD = linear(norm(p.norm_h, h_TD, eps), p.w_h)
    x_TD = from_h_TD + linear(norm(p.norm_token, e_TD, eps), p.w_token)
    x_TD, *more = block(p.block, x_TD, load_E)
    return norm(p.norm, x_TD, eps), *more
