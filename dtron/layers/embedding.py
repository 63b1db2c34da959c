"""Token embedding with the vocabulary sharded over tp (Shoeybi et al. 2019, arXiv:1909.08053,
section 3).

Each rank looks up the tokens whose rows it holds and returns zero for all other tokens. The sum
over tp contains every token once. A reduce-scatter makes this sum and shards the tokens for
sequence parallelism. A vocabulary that tp does not divide needs no special case. A shard may be one
row shorter, and the ids passed along with it identify its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dtron.mesh import Layout
from dtron.params import weight


@dataclass(frozen=True)
class Embedding:
    """The weights. ``w_positions`` holds learned absolute positions (GPT-2)."""

    w_tokens: Tensor = weight("vocab", "embed")
    w_positions: Tensor | None = weight("positions", "embed", when="learned_positions")


def embedding(
    p: Embedding, tokens_T: Tensor, positions_T: Tensor, layout: Layout, scale: float = 1.0
) -> Tensor:
    """Embed tokens: ``tokens_T``, ``positions_T [T@tokens]`` -> ``x_TD [T@tokens_sp, D]``.

    ``scale``: the factor on the rows of tokens, but not on the rows of positions."""
    ids_V = layout.iota("vocab", p.w_tokens.shape[0], p.w_tokens.device)
    rows, table, out = ("tokens",), ("vocab", "act_embed"), ("tokens", "act_embed")
    region = layout.local_map(_own_rows, (table, rows, ("vocab",)), (*out, "+vocab"))
    x_TD = region(p.w_tokens, tokens_T, ids_V)
    x_TD = layout.constrain(x_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    x_TD = x_TD if scale == 1 else x_TD * scale
    if p.w_positions is not None:
        positions_T = layout.constrain(positions_T, "tokens_sp")  # each rank takes its shard: local
        look_up = layout.local_map(
            F.embedding,
            (("tokens_sp",), ("positions", "act_embed")),
            ("tokens_sp", "act_embed"),
        )
        x_TD = x_TD + look_up(positions_T, p.w_positions)
    return x_TD


def _own_rows(w: Tensor, tokens_T: Tensor, ids_V: Tensor) -> Tensor:
    """Return the rows of the tokens in ``ids_V``, and zero for all other tokens. Rank-local."""
    mine = (tokens_T >= ids_V[0]) & (tokens_T <= ids_V[-1])
    return F.embedding((tokens_T - ids_V[0]) * mine, w) * mine[:, None].to(w.dtype)
