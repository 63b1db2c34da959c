"""The feed-forward layer: matmuls up, one matmul down, and tensor parallelism in five lines.

``w_gate`` and ``w_up`` are sharded by columns and ``w_down`` by rows (Shoeybi et al. 2019,
arXiv:1909.08053, figure 3a). So the wide activation ``h_TF`` never leaves its rank. There is one
all-gather of the tokens before, and one reduce-scatter after (Korthikanti et al. 2022,
arXiv:2205.05198, figure 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.recipe import Recipe
from dtron.layers.linear import linear
from dtron.layers.recompute import in_chunks
from dtron.mesh import Layout
from dtron.params import residual_out, weight, zeros

Activation = Literal["swiglu", "geglu", "gelu", "relu2"]


@dataclass(frozen=True)
class MLP:
    """The weights. SwiGLU and GeGLU have a gate (Shazeer 2020, arXiv:2002.05202). GELU (Hendrycks &
    Gimpel 2016, arXiv:1606.08415) and squared ReLU (So et al. 2021, arXiv:2109.08668) have none."""

    w_gate: Tensor | None = weight("embed", "mlp", summed=1, when="gated")
    w_up: Tensor = weight("embed", "mlp", summed=1)
    w_down: Tensor = weight("mlp", "embed", summed=1, init=residual_out)
    b_up: Tensor | None = weight("mlp", init=zeros, when="bias")
    b_down: Tensor | None = weight("act_embed", init=zeros, when="bias")


def mlp(
    p: MLP,
    x_TD: Tensor,
    layout: Layout,
    activation: Activation = "swiglu",
    recipe: Recipe | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement.

    ``recipe``: the recipe for FP8 matmuls, or None.
    ``chunk``: the number of a rank's tokens that are computed at once, and recomputed in backward.
        Then ``h_TF`` exists for one chunk only. None: all tokens at once."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    between = partial(_between, activation=activation, recipe=recipe)
    if chunk is not None:
        between = _in_chunks(between, chunk, layout)
    y_TD = between(x_TD, p.w_gate, p.w_up, p.b_up, p.w_down)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_down is None else y_TD + p.b_down


def _between(
    x_TD: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    activation: Activation,
    recipe: Recipe | None,
) -> Tensor:
    """Compute everything between the collectives. Rank-local."""
    h_TF = linear(x_TD, w_up, b_up, recipe)
    match activation:
        case "swiglu":
            assert w_gate is not None
            h_TF = F.silu(linear(x_TD, w_gate, recipe=recipe)) * h_TF
        case "geglu":
            assert w_gate is not None
            h_TF = F.gelu(linear(x_TD, w_gate, recipe=recipe), approximate="tanh") * h_TF
        case "gelu":
            h_TF = F.gelu(h_TF, approximate="tanh")
        case "relu2":
            h_TF = F.relu(h_TF).square()
    return linear(h_TF, w_down, recipe=recipe)


def _in_chunks(between: Callable[..., Tensor], chunk: int, layout: Layout) -> Callable[..., Tensor]:
    columns, tokens = ("act_embed", "mlp"), ("tokens", "act_embed")
    ins = (tokens, columns, columns, ("mlp",), ("mlp", "act_embed"))
    return layout.local_map(in_chunks(between, chunk), ins, (*tokens, "+mlp"))
