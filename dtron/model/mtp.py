"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): more tokens predicted at
every position, for a denser loss.

Behind the main model, which from tokens up to i predicts token i + 1, comes a chain of modules.
Module k takes the representation h of position i from the one before (of the main model: after its
last norm) and the embedding of token i + k, and predicts token i + k + 1 (equations 21 to 23):

    x = w_h norm(h) + w_token norm(embedding of token i + k)      one matrix [2D, D], in two halves
    h = norm(block(x))
    loss_k = cross entropy of head(h)

so a prediction further ahead is made from all tokens in between. Embedding and head are those of
the main model. What is minimised is the main loss plus ``weight`` times the mean of the modules'
(equations 24 and 25): sums over tokens, all divided by the main loss's count. It is an auxiliary
loss like that of experts: a stage gives it beside y, and the loss reported is the main one.

Which token is k places further is known where a row is whole, in ``make_batch``, and travels as
data: so the shift communicates nothing, on any mesh. Under pipelining all this is in the last
stage, which then has a copy of the embedding, a twin of the first stage's (training/pipeline.py).

The modules do not change what the model predicts; without them, or where a batch has no tokens
ahead (validation, generation), the rest is the model. Left out: drafting with them.
"""

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


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction."""

    depth: int = 0
    """how many more tokens are predicted at every position; 0: none"""
    weight: float = 0.3
    """of their mean loss, beside the main one"""

    def __post_init__(self) -> None:
        if self.depth < 0 or not 0 <= self.weight < float("inf"):
            raise UserError(
                f"model.mtp depth={self.depth}, weight={self.weight}: both are at least 0; raise them"
            )


def look_ahead(
    tokens_BS: Tensor, targets_BS: Tensor, depth: int, documents_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, S, depth]`` each: what the modules take, tokens i + 1 to i + depth, and their targets,
    tokens i + 2 to i + 1 + depth, for ``tokens_BS`` (token i) and ``targets_BS`` (token i + 1, or
    IGNORE). A target is IGNORE where there is none in the row, where the main loss ignores it, and
    where it is of another document. (A row's last target counts as of the document of the token
    before.) Tokens past the end are 0, and only ignored targets are behind them."""
    shift = lambda x, k, fill: F.pad(x[:, k:], (0, min(k, x.shape[1])), value=fill)
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
    """One module: ``h_TD [T@tokens_sp, D]`` of the one before and ``e_TD``, the embedding of its
    token -> its own h, and what else ``block(p.block, x_TD, load_E)``, a transformer block, gives.
    All else is local."""
    x_TD = linear(norm(p.norm_h, h_TD, eps), p.w_h) + linear(
        norm(p.norm_token, e_TD, eps), p.w_token
    )
    x_TD, *more = block(p.block, x_TD, load_E)
    return norm(p.norm, x_TD, eps), *more
