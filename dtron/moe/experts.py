"""The experts: many small feed-forward layers, computed together.

Their input rows are sorted by expert. One *grouped* matmul multiplies the rows of each expert by
that expert's matrix (``F.grouped_mm``; the idea of not padding the rows is from Gale et al. 2022,
arXiv:2211.15841). There is also a slow and clear version, a loop over experts. The loop serves
float32 and float64, because the kernel supports bfloat16 only. If every expert has the same number
of rows, a batched matmul is enough. In FP8 both cases use one kernel (fp8/scaled_grouped_mm.py).

Unlike an MLP (``recompute.in_chunks``), the experts take all rows at once, at any sequence
length. Each expert has only some of the tokens, so with chunks its matmuls would have too few
rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.grouped_mm import grouped, looped, masked
from dtron.fp8.matmul import grouped_matmul
from dtron.fp8.recipe import Recipe
from dtron.layers.dora import ScaledWeight
from dtron.layers.lora import LoRA
from dtron.layers.quantized_weight import dense
from dtron.moe.config import ExpertActivation
from dtron.params import residual_out, weight, zeros
from dtron.torch_compile import tracing
from dtron.tree import Adapted

LIMIT, SLOPE = 7.0, 1.702  # constants of gpt-oss's SwiGLU


@dataclass(frozen=True)
class Experts:
    """The weights of all experts."""

    w_gate: Tensor = weight("experts", "expert_embed", "expert_mlp", summed=1)
    w_up: Tensor = weight("experts", "expert_embed", "expert_mlp", summed=1)
    w_down: Tensor = weight("experts", "expert_mlp", "expert_embed", summed=1, init=residual_out)
    b_gate: Tensor | None = weight("experts", "expert_mlp", init=zeros, when="expert_bias")
    b_up: Tensor | None = weight("experts", "expert_mlp", init=zeros, when="expert_bias")
    b_down: Tensor | None = weight("experts", "act_embed", init=zeros, when="expert_bias")


# Placements of the expert weights in a local region, in the order of ``flat``.
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
    """Compute the experts of this rank (rank-local).

    ``x``: ``[R, D]``, sorted by expert, or ``[E, C, D]`` if ``ends_E`` is None. The output has
        the same shape.
    ``ends_E``: the rows of expert e end before ``ends_E[e]``. Output rows after the last end are
        undefined.
    ``cuts``: the number of ranks that each expert is sharded over. Their outputs must be summed.
    ``recipe``: matmuls in FP8, or None."""
    gate = product(x, p.w_gate, p.b_gate, ends_E, recipe)
    up = product(x, p.w_up, p.b_up, ends_E, recipe)
    if activation == "swiglu":
        h = F.silu(gate) * up
    else:
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        h = gate * torch.sigmoid(SLOPE * gate) * (up + 1)
    return product(h, p.w_down, None if p.b_down is None else p.b_down / cuts, ends_E, recipe)


def product(
    x: Tensor,
    w: Tensor | Adapted,
    b: Tensor | None,
    ends_E: Tensor | None,
    recipe: Recipe | None = None,
) -> Tensor:
    """Compute ``x @ w[e] + b[e]`` for the rows of each expert e.

    ``w``: a weight, or an ``Adapted`` weight; see ``linear``."""
    w = dense(w)
    if isinstance(w, ScaledWeight):
        y = product(x, w.base, None, ends_E, recipe) * _of_rows(w.factor, x, ends_E)
        return y if b is None else y + _of_rows(b, x, ends_E)
    if isinstance(w, LoRA):
        low = product(x, w.lora_a, None, ends_E) * w.scale
        y = product(x, w.base, b, ends_E, recipe)
        return y + product(low, w.lora_b, None, ends_E)
    y = grouped_matmul(x, w, ends_E, recipe)
    if y is None:
        y = x @ w if ends_E is None else _grouped_mm(x)(x, w, ends_E)
    return y if b is None else y + _of_rows(b, x, ends_E)


def _of_rows(b: Tensor, x: Tensor, ends_E: Tensor | None) -> Tensor:
    """Return, for each row of x, the row ``[O]`` of its expert in ``b [E, O]``."""
    if ends_E is None:
        return b[:, None]
    # Kernels leave the rows after the last end unwritten, in backward too. These rows get an
    # extra bias row of zeros. With the last expert's bias, the gradient of this bias would sum
    # undefined values.
    places = torch.arange(x.shape[0], device=x.device)
    expert_R = torch.searchsorted(ends_E.to(places.dtype), places, right=True)
    return F.pad(b, (0, 0, 0, 1)).index_select(0, expert_R)


def _grouped_mm(x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if x.dtype == torch.bfloat16:
        return grouped
    return masked if tracing() else looped
