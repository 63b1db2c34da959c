"""The experts: many small feed-forward layers, computed together.

The rows that they get stand sorted by expert, and one *grouped* product multiplies each run of rows
by its own matrix (``F.grouped_mm``; Gale et al. 2022, arXiv:2211.15841, is the idea of not padding
them). Beside it stands the slow and clear version, a loop over experts, which also serves float32
and float64: the kernel is one of bfloat16. Where every expert has the same number of rows they are
a plain batched product. In FP8 both are one kernel (fp8/scaled_grouped_mm.py).

Unlike an MLP (``recompute.in_chunks``) they take all rows at once, at any length of sequence: each
expert has but some of the tokens, and a chunk would leave its products too few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.grouped_mm import grouped, looped, masked
from dtron.fp8.matmul import grouped_matmul
from dtron.fp8.recipe import Recipe
from dtron.moe.config import ExpertActivation
from dtron.params import residual_out, weight, zeros

LIMIT, SLOPE = 7.0, 1.702  # of gpt-oss's SwiGLU


@dataclass(frozen=True)
class Experts:
    w_gate: Tensor = weight("experts", "expert_embed", "expert_mlp", summed=1)
    w_up: Tensor = weight("experts", "expert_embed", "expert_mlp", summed=1)
    w_down: Tensor = weight("experts", "expert_mlp", "expert_embed", summed=1, init=residual_out)
    b_gate: Tensor | None = weight("experts", "expert_mlp", init=zeros, when="expert_bias")
    b_up: Tensor | None = weight("experts", "expert_mlp", init=zeros, when="expert_bias")
    b_down: Tensor | None = weight("experts", "act_embed", init=zeros, when="expert_bias")


# What a region of experts takes of them, in the order of ``flat``.
WEIGHTS = (
    *[("experts", None, "expert_mlp")] * 2,
    ("experts", "expert_mlp", None),
    *[("experts", "expert_mlp")] * 2,
    ("experts", None),
)


def compute(
    p: Experts,
    x: Tensor,
    ends_E: Tensor | None,
    activation: ExpertActivation,
    cuts: int = 1,
    recipe: Recipe | None = None,
) -> Tensor:
    """Rank-local. ``x [R, D]`` sorted by expert, the rows of expert e ending before ``ends_E[e]`` -> the
    same shape; rows after the last end come out as anything. With ``ends_E`` None, ``x [E, C, D]``.
    ``cuts``: the ranks that each expert is cut over; what they give must be added up. ``recipe``: products in
    FP8, or None."""
    gate, up = (
        product(x, w, b, ends_E, recipe) for w, b in ((p.w_gate, p.b_gate), (p.w_up, p.b_up))
    )
    if activation == "swiglu":
        h = F.silu(gate) * up
    else:
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        h = gate * torch.sigmoid(SLOPE * gate) * (up + 1)
    return product(h, p.w_down, None if p.b_down is None else p.b_down / cuts, ends_E, recipe)


def product(
    x: Tensor, w: Tensor, b: Tensor | None, ends_E: Tensor | None, recipe: Recipe | None = None
) -> Tensor:
    """``x @ w[e] + b[e]`` for the rows of each expert e."""
    y = grouped_matmul(x, w, ends_E, recipe)
    if y is None:
        y = x @ w if ends_E is None else _way(x)(x, w, ends_E)
    if b is None:
        return y
    if ends_E is None:
        return y + b[:, None]
    # A kernel leaves the rows after the last end unwritten, in backward too. They get a row of
    # zeros that stands behind the biases: were it the last expert's, its gradient would add up what
    # lies in them.
    places = torch.arange(x.shape[0], device=x.device)
    expert_R = torch.searchsorted(ends_E.to(places.dtype), places, right=True)
    return y + F.pad(b, (0, 0, 0, 1)).index_select(0, expert_R)


def _way(x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if x.dtype == torch.bfloat16:
        return grouped
    return masked if torch.compiler.is_compiling() else looped
