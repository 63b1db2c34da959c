"""A mixture-of-experts layer: router, dispatch, experts, combine.

The router computes each token once, on the rank that holds the token's shard of the residual
stream. Then tokens, weights and indices are sent to the ranks of the experts:

- Over etp each expert is sharded and the ranks of its shards need the same tokens, as in any
  tensor-parallel layer: an all-gather before, a reduce-scatter after.
- Over ep each rank sends its tokens to the ranks of their experts (dispatch.py).

The dispatch is one local region. Its declared placements express the rest of the parallelism:
gradients of expert weights are summed over the ranks that hold the same experts (edp and
dp_replicate) and over no other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from dtron.fp8.recipe import Recipe
from dtron.layers.mlp import MLP, Activation, mlp
from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.moe.dispatch import Dispatch, ExpertGroup, choose_dispatcher
from dtron.moe.experts import WEIGHTS, Experts, compute
from dtron.moe.router import Router, TokenInfo, route
from dtron.params import part, weight


@dataclass(frozen=True)
class MoELayer:
    """A mixture-of-experts layer's params.

    ``shared``: an expert that every token uses.
    ``w_shared``: the gate of the shared expert."""

    router: Router = part()
    experts: Experts = part()
    shared: MLP | None = part(when="shared_expert", mlp="shared_mlp")
    w_shared: Tensor | None = weight("embed", fan_in=1, when="shared_gate")


class LayerStats(NamedTuple):
    """Statistics of one layer: sums over tokens, pending (not yet all-reduced).

    ``load_E``: tokens per expert.
    ``totals``: tokens, entropies, auxiliary losses and z-losses.
    ``dropped``: dropped slots."""

    load_E: Tensor
    totals: Tensor
    dropped: Tensor


def moe(
    p: MoELayer,
    x_TD: Tensor,
    info: TokenInfo,
    c: MoEConfig,
    layout: Layout,
    before_E: Tensor | None = None,
    dispatch: Dispatch = "auto",
    recipe: Recipe | None = None,
) -> tuple[Tensor, Tensor, LayerStats]:
    """Apply the routed experts: ``x_TD [T@tokens_sp, D]`` -> ``(y_TD, aux, stats)``.

    ``before_E``: see ``route``.
    ``recipe``: the recipe for FP8 matmuls, or None.
    ``y_TD``: has the shape and placement of ``x_TD``.
    ``aux``: a term of the loss; its sum over tokens is pending."""
    routed = route(p.router, x_TD, info, c, layout, before_E)
    tokens, chosen = ("tokens_ep", "act_embed"), ("tokens_ep", None)
    first = layout.iota("experts", c.experts, x_TD.device)
    # Communicates over etp only: all-gathers here, and the reduce-scatter after.
    sent = layout.constrain(x_TD, *tokens)
    weights_TK = layout.constrain(routed.weights_TK, *chosen)
    index_TK = layout.constrain(routed.index_TK, *chosen)
    region = layout.local_map(
        partial(
            _experts,
            c=c,
            layout=layout,
            dispatch=dispatch,
            recipe=recipe,
            all_sent=info.needed_T is None,
        ),
        (tokens, chosen, chosen, ("experts",), *WEIGHTS),
        [(*tokens, "+expert_mlp"), ("+tokens_sp",)],
    )
    e = p.experts
    y_TD, dropped = region(
        sent, weights_TK, index_TK, first, e.w_gate, e.w_up, e.w_down, e.b_gate, e.b_up, e.b_down
    )
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")
    return y_TD, routed.aux, LayerStats(routed.load_E, routed.totals, dropped)


def shared_expert(
    p: MoELayer,
    x_TD: Tensor,
    layout: Layout,
    activation: Activation = "swiglu",
    recipe: Recipe | None = None,
) -> Tensor:
    """Apply the shared expert, a dense layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and
    placement. ``activation`` is the model's; routed experts have ``model.moe.activation``."""
    assert p.shared is not None
    y_TD = mlp(p.shared, x_TD, layout, activation, recipe)
    return y_TD if p.w_shared is None else y_TD * (x_TD @ p.w_shared).sigmoid()[:, None]


def _experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    *weights: Any,
    c: MoEConfig,
    layout: Layout,
    dispatch: Dispatch,
    recipe: Recipe | None,
    all_sent: bool,
) -> tuple[Tensor, Tensor]:
    """Dispatch, compute and combine. Rank-local, except for the dispatcher's communication over
    ep."""
    group = layout.group("ep")
    ranks = None if group is None else group.ranks
    on_inputs = c.scores_on == "inputs"
    experts = ExpertGroup(c.experts, ranks, c.capacity_factor, on_inputs, all_sent)
    cuts = layout.parts("expert_mlp")
    run = partial(compute, Experts(*weights), activation=c.activation, cuts=cuts, recipe=recipe)
    dispatcher = choose_dispatcher(dispatch, experts)
    y_TD, dropped = dispatcher(x_TD, weights_TK, index_TK, first[0], run, experts)
    # The ranks that shard one expert have dropped the same slots.
    count = x_TD.new_zeros((), dtype=weights_TK.dtype)
    return y_TD, count if dropped is None else dropped.to(weights_TK.dtype) / cuts
