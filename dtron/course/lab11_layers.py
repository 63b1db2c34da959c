"""The layers that the student's test of lab 11 judges: right ones, and mutants with one fault each.

The layer is an MLP with a squared ReLU (So et al. 2021, arXiv:2109.08668), whose hidden numbers are
mixed with those of the token before (the token shift of RWKV, Peng et al. 2023, arXiv:2305.13048).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.distributed.collectives import ring_shift
from dtron.layers.linear import linear
from dtron.mesh import Layout
from dtron.params import residual_out, weight
from dtron.testing import Axes, Mutate, dropped, unsummed

LayerFn = Callable[["Weights", Tensor, Tensor, Layout], Tensor]
# The hidden numbers of the token before each token of a rank, from the rank's hidden numbers and
# from whether a token is the first of its document.
Before = Callable[[Tensor, Tensor, Layout], Tensor]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a token, the token before it, and the weight
HIDDEN: Axes = ("tokens", "mlp")


@dataclass(frozen=True)
class Weights:
    """The weights of the layer."""

    w_up: Tensor = weight("embed", "mlp", summed=1)
    mix: Tensor = weight("mlp")
    w_down: Tensor = weight("mlp", "embed", summed=1, init=residual_out)


def definition(p: Weights, x_TD: Tensor, first_T: Tensor) -> Tensor:
    """Compute the layer on one device, token by token."""
    h_TF = x_TD @ p.w_up
    mixed = []
    for t, first in enumerate(first_T.tolist()):
        before_F = torch.zeros_like(h_TF[t]) if first else h_TF[t - 1]
        mixed.append((1 - p.mix) * h_TF[t] + p.mix * before_F)
    return torch.stack(mixed).relu().square() @ p.w_down


# ---- right layers


def halo(x: Tensor, layout: Layout) -> Tensor:
    """Return the last row of the previous rank of cp. The first rank has that of the last one."""
    ranks = layout.group("cp")
    return x[-1:] if ranks is None else ring_shift(x[-1:], ranks)


def masked(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    before_TF = torch.cat([halo(h_TF, layout), h_TF[:-1]])
    return torch.where(first_T[:, None], 0, before_TF)


def shown(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """Mask by a factor, and send zeros if no token needs the halo."""
    last = h_TF[-1:] if layout.parts("sequence") > 1 else 0 * h_TF[-1:]
    return torch.cat([halo(last, layout), h_TF[:-1]]) * (~first_T)[:, None]


def interpolated(h_TF: Tensor, before_TF: Tensor, mix_F: Tensor) -> Tensor:
    return (1 - mix_F) * h_TF + mix_F * before_TF


def layer(before: Before, mix: Mix = interpolated, power: int = 2) -> LayerFn:
    """Make the layer, or a mutant of it."""

    def apply(p: Weights, x_TD: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
        def region(h_TF: Tensor, mix_F: Tensor, first_T: Tensor) -> Tensor:
            return mix(h_TF, before(h_TF, first_T, layout), mix_F)

        x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
        mixed = layout.local_map(region, (HIDDEN, ("mlp",), ("tokens",)), HIDDEN)
        h_TF = mixed(linear(x_TD, p.w_up), p.mix, first_T)  # sends one token over cp
        y_TD = linear(F.relu(h_TF) ** power, p.w_down)  # {+tp}: a sum still pending
        return layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp

    return apply


# ---- mutants


def without(mutate: Mutate) -> LayerFn:
    """Make a mutant whose layout breaks one thing."""

    def apply(p: Weights, x_TD: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
        return layer(masked)(p, x_TD, first_T, mutate(layout))

    return apply


def _no_halo(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    before_TF = torch.cat([torch.zeros_like(h_TF[:1]), h_TF[:-1]])
    return torch.where(first_T[:, None], 0, before_TF)


def _halo_of_the_next_rank(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """The halo has gone round the whole ring but for one step."""
    row = h_TF[-1:]
    for _ in range(layout.parts("sequence") - 1):
        row = halo(row, layout)
    return torch.where(first_T[:, None], 0, torch.cat([row, h_TF[:-1]]))


def _first_row_of_a_rank(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """The halo is the first token of the previous rank."""
    row = halo(h_TF[:1], layout)
    return torch.where(first_T[:, None], 0, torch.cat([row, h_TF[:-1]]))


def _halo_without_gradient(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    row = halo(h_TF, layout).detach()
    return torch.where(first_T[:, None], 0, torch.cat([row, h_TF[:-1]]))


def _halo_of_another_document(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """A document that begins with the first token of a rank sees the previous rank. A row does
    not: the halo of the first rank is masked."""
    parts = layout.parts("sequence")
    if parts == 1:
        return masked(h_TF, first_T, layout)
    ranks = layout.group("cp")
    assert ranks is not None  # the mesh has cp
    part = torch.zeros_like(first_T[:1], dtype=torch.long) + ranks.place
    before_TF = masked(h_TF, first_T, layout)
    return torch.cat([halo(h_TF, layout) * (part > 0)[:, None], before_TF[1:]])


def _halo_round_the_ring(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """The first token of a rank sees the halo, also that of the first rank."""
    before_TF = masked(h_TF, first_T, layout)
    if layout.parts("sequence") == 1:
        return before_TF
    return torch.cat([halo(h_TF, layout), before_TF[1:]])


def _second_token_is_masked(h_TF: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """The token after the first one of a document does not see it, on every mesh."""
    second_T = torch.cat([halo(first_T.long(), layout) > 0, first_T[:-1]])
    return masked(h_TF, second_T | first_T, layout)


def _swapped(h_TF: Tensor, before_TF: Tensor, mix_F: Tensor) -> Tensor:
    return mix_F * h_TF + (1 - mix_F) * before_TF


def _first_token_whole(h_TF: Tensor, before_TF: Tensor, mix_F: Tensor) -> Tensor:
    """The first token of a document is not multiplied by 1 - mix."""
    alone = (before_TF == 0).all(1, keepdim=True)
    return torch.where(alone, h_TF, interpolated(h_TF, before_TF, mix_F))


def mix_of_the_first_rank(p: Weights, x_TD: Tensor, first_T: Tensor, layout: Layout) -> Tensor:
    """Every rank of tp takes the mix of the first rank, as if the weight were whole on each rank
    and cut to size."""
    size = p.mix.shape[0] // layout.parts("mlp")
    mix_F = layout.constrain(p.mix, None)[:size].repeat(layout.parts("mlp"))
    mutant = Weights(p.w_up, layout.constrain(mix_F, "mlp"), p.w_down)
    return layer(masked)(mutant, x_TD, first_T, layout)


RIGHT = (layer(masked), layer(shown))
MUTANTS = (
    without(dropped(1)),
    without(unsummed),
    layer(_no_halo),
    layer(_halo_of_the_next_rank),
    layer(_first_row_of_a_rank),
    layer(_halo_without_gradient),
    layer(_halo_of_another_document),
    layer(_halo_round_the_ring),
    layer(_second_token_is_masked),
    layer(masked, mix=_swapped),
    layer(masked, mix=_first_token_whole),
    layer(masked, power=1),
    mix_of_the_first_rank,
)
