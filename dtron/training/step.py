"""One step of training, from a global batch and the state before it to the state after it.

These five lines are training:

    total, grads, reports = gradients(functions, weights, microbatches, ...)
    norm = global_norm(grads, trained(pipe.spec, pipe.spec), pipe.sum) / tokens
    scale = clip_scale(norm, optim.max_grad_norm) / tokens
    params, opt = apply_update(optimizer, spec, params, grads, opt, UpdateScalars(lr, scale), ...)
    params = update_router_bias(params, reports, pipe, moe.bias_rate, ok)

The first line, forward and backward, is ``TrainStep.gradients``. The other lines are
``TrainStep.update``.

``build.build_step`` makes the step that trains: for train.py, for the benchmarks, for
``dtron.verify`` and for the tests. Nothing in a step waits for the device, so that the step can be
recorded (cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtron.distributed.redistribute import full
from dtron.frozen import trained
from dtron.model.batch import Batch
from dtron.model.head import loss_options
from dtron.schedules.runner import Program
from dtron.training.clip_factors import clip_factors
from dtron.training.config import StepConfig
from dtron.training.grad_norm import clip_scale, global_norm
from dtron.training.gradients import Reports, gradients
from dtron.training.optimizer import Optimizer, OptimizerState, apply_update
from dtron.training.pipeline import Pipeline
from dtron.training.reference import Reference
from dtron.training.reports import (
    StepReports,
    expert_totals,
    loss_stats,
    max_attention_logit,
    mixer_losses,
    mtp_losses,
)
from dtron.training.router_bias import update_router_bias
from dtron.training.update_scalars import UpdateScalars

Result = tuple[Tensor, Tensor, StepReports, Any, OptimizerState]
Look = Callable[[int, int, list[Tensor | None]], None]


@dataclass(frozen=True)
class TrainStep:
    """A step of the stages of this process.

    ``functions``: the model, eager or compiled.
    ``optimizer``: the optimizer of ``config``, eager or compiled.
    ``gather_each``: ZeRO-3 unshards weights in every block and microbatch, and not once a step.
    ``reference``: the second model of the loss (None: the loss has none)."""

    functions: Program
    pipe: Pipeline
    config: StepConfig
    optimizer: Optimizer
    gather_each: bool = True
    reference: Reference | None = None

    def gradients(
        self, weights: Any, microbatches: Sequence[Batch], look: Look | None = None
    ) -> tuple[Tensor | None, Any, Reports]:
        """Return the summed loss, its gradients, and the stages' reports: see
        ``training.gradients``."""
        zero, pipe = self.config.zero, self.pipe.for_count(len(microbatches))
        if self.reference is not None:
            microbatches = self.reference.attach(weights, microbatches)
        return gradients(
            self.functions, weights, microbatches, 1, pipe, zero, self.gather_each, look
        )

    def __call__(
        self,
        params: Any,
        opt: OptimizerState,
        microbatches: Sequence[Batch],
        tokens: int | Tensor,
        lr: float | Tensor,
        number: Tensor | None = None,
        decay: float | Tensor | None = None,
    ) -> Result:
        """Take a step and return ``(loss, gradient norm, reports, params, optimizer state)``.
        Params and state are overwritten in place.

        ``tokens``: the number of valid targets of the global batch, or of pairs; the loss is their
            mean.
        ``number``: the number of this update, as a tensor that the device reads. None: one more
            than the state's.
        ``decay``: the factor of the weight decay (``UpdateScalars``).

        The number of microbatches may change from step to step, if ``pipe`` has a table for it.

        Loss and norm are scalars on the device, for which the host has not waited. A step whose
        loss or norm is not finite, or whose norm is above ``skip_grad_norm``, changes no weight."""
        weights = params if opt.compute_copies is None else opt.compute_copies
        # No variable here holds the gradients: ``update`` frees them.
        return self.update(
            params, opt, [*self.gradients(weights, microbatches)], tokens, lr, number, decay
        )

    def update(
        self,
        params: Any,
        opt: OptimizerState,
        forward_backward: list,
        tokens: int | Tensor,
        lr: float | Tensor,
        number: Tensor | None = None,
        decay: float | Tensor | None = None,
    ) -> Result:
        """Apply the result of ``gradients``: clip, update weights and router biases, and report.

        ``forward_backward``: the three values that ``gradients`` returned, as a list. The list is
            emptied, so that the gradients can be freed before the next step makes its own."""
        pipe, m, config = self.pipe, self.config.model, self.config.optim
        total, grads, reports = forward_backward
        forward_backward.clear()
        loss = pipe.sum(None if total is None else full(total)) / tokens
        norm = global_norm(grads, trained(pipe.spec, pipe.spec), pipe.sum) / tokens
        scale = clip_scale(norm, config.max_grad_norm) / tokens
        ok = loss.isfinite() & norm.isfinite()  # else the update would make every weight NaN
        if config.skip_grad_norm:
            ok &= norm <= config.skip_grad_norm
        factors = clip_factors(reports, pipe, m, config.qk_clip)
        scalars = UpdateScalars(lr, scale, ok, number, decay, factors)
        params, opt = apply_update(
            self.optimizer, pipe.spec, params, grads, opt, scalars, pipe.layout
        )
        del grads
        params = update_router_bias(params, reports, pipe, m.moe.bias_rate, ok)
        step_reports = StepReports(
            expert_totals(reports, pipe, m.moe),
            mtp_losses(reports, pipe, m.mtp.depth),
            loss_stats(reports, pipe, self.config.loss.objective.stats(loss_options(m))),
            max_attention_logit(reports, pipe, config.qk_clip),
            mixer_losses(reports, pipe, m),
        )
        return loss, norm, step_reports, params, opt
