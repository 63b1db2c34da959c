"""A mixture-of-experts layer: router, dispatch, experts, and back.

The router works on each token once, where the residual stream has it. What a token needs goes with
it to where experts get it: over etp, where each expert is cut, its ranks need the same tokens, as
in any tensor- parallel layer (an all-gather before, a reduce-scatter after); over ep, each rank
sends its tokens to those that have their experts (dispatch.py). The region that does so is one
local region, with the rest of the parallelism in its declared placements: gradients of expert
weights are sums over the ranks that hold the same experts, edp and dp_replicate, and over no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from dtron.fp8.recipe import Recipe
from dtron.layers.mlp import MLP, mlp
from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.moe.dispatch import Dispatch, ExpertGroup, choose_dispatcher
from dtron.moe.experts import WEIGHTS, Experts, compute
from dtron.moe.router import Router, route
from dtron.params import part, weight


@dataclass(frozen=True)
class MoELayer:
    """``shared`` is an expert that every token uses, ``w_shared`` its gate."""

    router: Router = part()
    experts: Experts = part()
    shared: MLP | None = part(when="shared_expert", mlp="shared_mlp")
    w_shared: Tensor | None = weight("embed", when="shared_gate")


class TokenInfo(NamedTuple):
    """What the router and its losses must know of tokens, ``[T@tokens_sp]``: whether each counts,
    and its sequence, of ``rows``; and for forced balance its place among the tokens of all rows."""

    valid_T: Tensor
    rows_T: Tensor
    rows: int
    place_T: Tensor | None = None


class LayerStats(NamedTuple):
    """Of one layer, sums over tokens, pending: tokens per expert; tokens, entropies, auxiliary and
    z-losses; slots dropped."""

    load_E: Tensor
    totals: Tensor
    dropped: Tensor


def moe(
    p: MoELayer,
    x_TD: Tensor,
    seen: TokenInfo,
    c: MoEConfig,
    layout: Layout,
    before_E: Tensor | None = None,
    dispatch: Dispatch = "auto",
    recipe: Recipe | None = None,
) -> tuple[Tensor, Tensor, LayerStats]:
    """``x_TD [T@tokens_sp, D]`` -> ``(y_TD, aux, report)``: the same shape and placement, and what
    is added to the loss, its sum over tokens pending. ``before_E``: see ``route``; ``recipe``:
    products in FP8, or None."""
    to = route(p.router, x_TD, *seen[:3], c, layout, before_E, seen.place_T)
    tokens, chosen = ("tokens_ep", "act_embed"), ("tokens_ep", None)
    first = layout.iota("experts", c.experts, x_TD.device)
    # Nothing moves but over etp: all-gathers, and the reduce-scatter after.
    sent = layout.constrain(x_TD, *tokens)
    weights_TK, index_TK = (
        layout.constrain(to.weights_TK, *chosen),
        layout.constrain(to.index_TK, *chosen),
    )
    region = layout.local(
        partial(_experts, c=c, layout=layout, dispatch=dispatch, recipe=recipe),
        (tokens, chosen, chosen, ("experts",), *WEIGHTS),
        [(*tokens, "+expert_mlp"), ("+tokens_sp",)],
    )
    e = p.experts
    y_TD, dropped = region(
        sent, weights_TK, index_TK, first, e.w_gate, e.w_up, e.w_down, e.b_gate, e.b_up, e.b_down
    )
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")
    if p.shared is not None:
        s_TD = mlp(p.shared, x_TD, layout, recipe=recipe)
        y_TD = y_TD + (
            s_TD if p.w_shared is None else s_TD * (x_TD @ p.w_shared).sigmoid()[:, None]
        )
    return y_TD, to.aux, LayerStats(to.load_E, to.totals, dropped)


def _experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    *weights: Tensor | None,
    c: MoEConfig,
    layout: Layout,
    dispatch: Dispatch,
    recipe: Recipe | None,
) -> tuple[Tensor, Tensor]:
    """Rank-local, but for what the dispatcher communicates over ep."""
    over = ExpertGroup(c.experts, layout.experts, c.capacity)
    cuts = layout.parts("expert_mlp")
    run = partial(compute, Experts(*weights), activation=c.activation, cuts=cuts, recipe=recipe)
    y_TD, dropped = choose_dispatcher(dispatch, over)(
        x_TD, weights_TK, index_TK, first[0], run, over
    )
    # The ranks that share an expert have dropped the same.
    count = x_TD.new_zeros((), dtype=weights_TK.dtype)
    return y_TD, count if dropped is None else dropped.to(weights_TK.dtype) / cuts
