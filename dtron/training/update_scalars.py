"""The numbers of an update of the weights: learning rate, scale of the gradients, and others that
change from step to step.

The kernels of a CUDA graph (cuda_graph.py) read them from the device, so each may be a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateScalars:
    """The numbers of one update. Each may be a tensor on the device.

    ``lr``: the learning rate.
    ``scale``: the factor of the gradients, for clipping and to divide by the number of tokens.
    ``ok``: if false, no weight and no state changes, but the update is counted. None: true.
    ``step``: the number of this update, from 1. None: one more than the state's.
    ``decay``: the factor of every weight decay, from a schedule. None: 1, at no cost.
    ``factors``: factors of weights after the update, by path; see ``QKClip``."""

    lr: float | Tensor
    scale: float | Tensor = 1.0
    ok: Tensor | None = None
    step: int | Tensor | None = None
    decay: float | Tensor | None = None
    factors: Mapping[str, Tensor] = field(default_factory=dict)


class DeviceScalars(NamedTuple):
    """The numbers of an elementwise update, as tensors on the device of the weights.

    ``terms``: the result of ``ElementwiseOptimizer.step_terms``."""

    lr: Tensor
    scale: Tensor
    ok: Tensor
    step: Tensor
    terms: tuple[Tensor, ...]


def on_device(scalars: UpdateScalars) -> DeviceScalars:
    """Return the numbers as tensors."""
    scale, ok, step = scalars.scale, scalars.ok, scalars.step
    assert isinstance(scale, Tensor) and ok is not None and step is not None
    return DeviceScalars(like_scale(scale, scalars.lr), scale, ok, like_scale(scale, step), ())


def like_scale(scale: Tensor, x: float | Tensor) -> Tensor:
    """Return a number of the update as a tensor like ``scale``."""
    return x.to(scale) if isinstance(x, Tensor) else torch.full_like(scale, float(x))
