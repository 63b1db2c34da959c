"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtron.bounds import under
from dtron.distributed.simulated_ranks import is_simulated
from dtron.errors import UserError
from dtron.params import WeightSpec
from dtron.training.elementwise_optimizer import ElementwiseOptimizer
from dtron.training.update_scalars import UpdateScalars, like_scale


@dataclass(frozen=True)
class AdamW(ElementwiseOptimizer):
    """AdamW. Its state is ``m`` and ``v``, the first and the second moment of the gradient.

    ``beta1``, ``beta2``: the decays of the moments.
    ``eps``: added to the root of the second moment.
    ``weight_decay``: the weight decay of matrices; norms and biases have none.

    ``OptimConfig`` has these options as flags, with their defaults."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    state_names = ("m", "v")
    squares = ("v",)

    def __post_init__(self) -> None:
        inf = float("inf")
        under(self, "optim", {"beta1": 1, "beta2": 1, "eps": inf, "weight_decay": inf})
        if self.eps == 0:
            raise UserError(
                "optim.eps=0: a weight that never had a gradient would be 0/0; use 1e-8"
            )

    def width_rate(self, w: WeightSpec) -> float:
        return w.growth.sign_rate

    def step_terms(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bias corrections of the moments."""
        return 1 - self.beta1**step, 1 - self.beta2**step

    def rule(
        self,
        w: Tensor,
        g: Tensor,
        state: tuple[Tensor, ...],
        lr: Tensor,
        *terms: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the new weight and moments by algorithm 2 of the paper.

        ``terms``: the bias corrections of the moments."""
        (m, v), (c1, c2) = state, terms
        m = self.beta1 * m + (1 - self.beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g * g
        w = w * (1 - lr * self.weight_decay) - lr * (m / c1) / ((v / c2).sqrt() + self.eps)
        return w, (m, v)

    def fused(
        self, w: list[Tensor], g: list[Tensor], state: list[list[Tensor]], scalars: UpdateScalars
    ) -> None:
        """Update all weights at once with torch's fused AdamW kernel."""
        (m, v), scale, step, ok = state, scalars.scale, scalars.step, scalars.ok
        assert isinstance(scale, Tensor) and step is not None and ok is not None
        lr: Any = scalars.lr  # the kernel takes a float or a tensor, in two overloads
        # The kernel ignores strides. But the gradient of an uneven shard is a slice of its padded
        # buffer.
        g = [x.to(y.dtype).contiguous() for x, y in zip(g, w, strict=True)]
        # The kernel scales gradients (``grad_scale``) in float32 only.
        kernel_scales = w[0].dtype == torch.float32 and not is_simulated(w[0])
        if not kernel_scales:
            torch._foreach_mul_(g, scale)
        decay: Any = self.weight_decay
        if isinstance(decay, Tensor):  # of a schedule; the kernel takes a number only
            kept = 1 - like_scale(scale, lr) * decay
            torch._foreach_mul_(w, torch.where(ok, kept, torch.ones_like(kept)))
            decay = 0.0
        torch._fused_adamw_(
            w,
            g,
            m,
            v,
            [],
            [torch.full((), float(step), device=x.device) for x in w],
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=1 / scale if kernel_scales else None,
            found_inf=(~ok).to(torch.float32),
        )
