"""Maximal update parametrization, muP (Yang et al. 2022, arXiv:2203.03466), from declarations.

A hyperparameter that is best for a narrow model is not best for a wide one, because sums over the
width grow. muP scales each weight's initial values and learning rate with its width, so that the
activations and their updates keep their size. Then the best learning rate of a narrow model is the
best one of a wide model.

A weight declares its logical axes and the dims over which its matmul sums. Some axes grow with the
model's width (``WIDTHS``), the others are fixed. So a declaration says how the fan-in and the
fan-out of its matmul have grown since the base width (``Growth``). The factors follow from the
spectral condition (Yang et al. 2023, arXiv:2310.17813): the spectral norm of a weight, and of its
update, must grow as sqrt(fan-out / fan-in).

* Hidden weights sum over a width and make a width. Initial values have the factor
  fan_in^(-1/2); AdamW's learning rate has 1 / fan_in.
* Embeddings, norms and biases do not sum over a width. Both factors are 1.
* The router of experts makes a fixed number of values from a width. Both factors are 1 / fan_in.
* The head is declared as the embedding is, because it may be the embedding. Its logits are divided
  by the width (table 8 of the paper), and so its weight has no factors.

Attention scores have the factor 1 / head_dim where head_dim grows (definition 4.1 of the paper). At
the base width all factors are exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Logical axes of weights that grow with the model's width. Heads stand for heads times head_dim.
WIDTHS = frozenset(
    {
        "embed",
        "q_rank",
        "kv_rank",
        "kv_latent",
        "heads",
        "kv_heads",
        "key_heads",
        "value_heads",
        "mlp",
        "expert_embed",
        "expert_mlp",
        "shared_mlp",
    }
)
FIXED = frozenset(
    {
        "head_dim",
        "qk_dim",
        "kv_dim",
        "v_dim",
        "gate_rank",
        "index_heads",
        "index_dim",
        "vocab",
        "positions",
        "taps",
        "experts",
    }
)


class Growth(NamedTuple):
    """The sizes of a weight's matmul, as multiples of the same weight's at the base width.

    ``fan_in``: the number of values in a sum. 1 where a weight is no matrix of a matmul.
    ``fan_out``: the number of results."""

    fan_in: float = 1.0
    fan_out: float = 1.0

    @property
    def init_std(self) -> float:
        """The factor of the standard deviation of initial values: 1 / fan_in for a fixed fan-out,
        else fan_in^(-1/2) (arXiv:2203.03466, table 3)."""
        return 1 / self.fan_in if self.fan_out == 1 else self.fan_in**-0.5

    @property
    def sign_rate(self) -> float:
        """The factor of the learning rate if all elements of an update have the size of the rate,
        as in AdamW and Lion (arXiv:2203.03466, table 8)."""
        return 1 / self.fan_in

    @property
    def gradient_rate(self) -> float:
        """The factor of the learning rate of gradient descent (arXiv:2310.17813,
        parametrization 1)."""
        return self.fan_out / self.fan_in

    def spectral_rate(self, rows: int, columns: int) -> float:
        """Return the factor of the learning rate if an update has the spectral norm
        sqrt(max(rows, columns)), as in Muon. The norm grows by itself, and the condition asks for
        sqrt(fan_out / fan_in)."""
        base = max(rows / self.fan_in, columns / self.fan_out)
        return (self.fan_out / self.fan_in) ** 0.5 / (max(rows, columns) / base) ** 0.5


def growth(axes: Sequence[str], contracted: int, width: float) -> Growth:
    """Return the growth of a weight. Raises ValueError for an axis that is neither in ``WIDTHS``
    nor in ``FIXED``, unless the model has the base width: such an axis must not count as fixed
    silently.

    ``contracted``: the number of leading dims, after the dim of experts, that are summed over.
    ``width``: the model's width, as a multiple of the base width."""
    if width == 1:
        return Growth()
    names = [axis.removeprefix("act_") for axis in axes]
    if names[0] == "experts" and len(names) > 1:
        names = names[1:]
    for name in names:
        if name not in WIDTHS | FIXED:
            raise ValueError(
                f"logical axis {name!r} has no row in dtron/mup.py; add it to WIDTHS or FIXED"
            )
    fans = names[:contracted], names[contracted:]
    return Growth(*(math.prod(width for name in fan if name in WIDTHS) for fan in fans))
