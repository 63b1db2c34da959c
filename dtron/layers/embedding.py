"""Token embedding with the vocabulary cut over tp (Shoeybi et al. 2019, arXiv:1909.08053, section
3).

Each rank looks up the tokens whose rows it holds and gives zero for the rest; the sum over tp,
which a reduce-scatter makes while it cuts the tokens for sequence parallelism, has every token
once. A vocabulary that tp does not divide needs no case of its own: a shard may be one row shorter,
and the ids that travel with it say which rows it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dtron.mesh import Layout
from dtron.params import weight


@dataclass(frozen=True)
class Embedding:
    """``w_positions`` are learned absolute positions (GPT-2)."""

    w_tokens: Tensor = weight("vocab", "embed")
    w_positions: Tensor | None = weight("positions", "embed", when="learned_positions")


def embedding(p: Embedding, tokens_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
    """``tokens_T``, ``positions_T [T@tokens]`` -> ``x_TD [T@tokens_sp, D]``."""
    ids_V = layout.iota("vocab", p.w_tokens.shape[0], p.w_tokens.device)
    rows, table, out = ("tokens",), ("vocab", "act_embed"), ("tokens", "act_embed")
    x_TD = layout.local(_own_rows, (table, rows, ("vocab",)), (*out, "+vocab"))(
        p.w_tokens, tokens_T, ids_V
    )
    x_TD = layout.constrain(x_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    if p.w_positions is not None:
        positions_T = layout.constrain(positions_T, "tokens_sp")  # each rank takes its part: local
        look_up = layout.local(
            lambda w, i: F.embedding(i, w),
            (("positions", "act_embed"), ("tokens_sp",)),
            ("tokens_sp", "act_embed"),
        )
        x_TD = x_TD + look_up(p.w_positions, positions_T)
    return x_TD


def _own_rows(w: Tensor, tokens_T: Tensor, ids_V: Tensor) -> Tensor:
    """Rank-local: the rows of the tokens in ``ids_V``, zero for the others."""
    mine = (tokens_T >= ids_V[0]) & (tokens_T <= ids_V[-1])
    return F.embedding((tokens_T - ids_V[0]) * mine, w) * mine[:, None].to(w.dtype)
