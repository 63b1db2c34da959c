"""One step of training, from a global batch and the state before it to the state after it.

These five lines are training:

    total, grads, reports = gradients(functions, weights, microbatches, ...)    # forward and backward
    norm = global_norm(grads, pipe.spec, pipe.sum) / tokens
    scale = clip_scale(norm, optim.max_grad_norm) / tokens
    params, opt = apply_update(optimizer, spec, params, grads, opt, UpdateScalars(lr, scale), layout)
    params = update_router_bias(params, reports, pipe, moe.bias_rate, ok)

The first is ``TrainStep.gradients``, the others are ``TrainStep.update``.

``build.build_step`` makes the step that trains: for train.py, for the benchmarks, for
``dtron.verify`` and for the tests. Nothing in a step waits for the device, so that it can be
recorded (cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtron.distributed.redistribute import full
from dtron.model.batch import Batch
from dtron.schedules.runner import Program
from dtron.training.config import StepConfig
from dtron.training.grad_norm import clip_scale, global_norm
from dtron.training.gradients import Reports, gradients
from dtron.training.optimizer import Optimizer, OptimizerState, UpdateScalars, apply_update
from dtron.training.pipeline import Pipeline
from dtron.training.reports import StepReports, expert_totals, mtp_losses, update_router_bias

Result = tuple[Tensor, Tensor, StepReports, Any, OptimizerState]
Look = Callable[[int, int, list[Tensor | None]], None]


@dataclass(frozen=True)
class TrainStep:
    """A step of the stages of this process.

    ``functions``: the model, eager or compiled.
    ``optimizer``: eager or compiled; the one of ``config``.
    ``gather_each``: ZeRO-3 unshards weights in every block and microbatch, and not once a step."""

    functions: Program
    pipe: Pipeline
    config: StepConfig
    optimizer: Optimizer
    gather_each: bool = True

    def gradients(
        self, weights: Any, microbatches: Sequence[Batch], look: Look | None = None
    ) -> tuple[Tensor | None, Any, Reports]:
        """The summed loss, its gradients, and the stages' reports: see ``training.gradients``."""
        zero = self.config.zero
        return gradients(
            self.functions, weights, microbatches, 1, self.pipe, zero, self.gather_each, look
        )

    def __call__(
        self,
        params: Any,
        opt: OptimizerState,
        microbatches: Sequence[Batch],
        tokens: int | Tensor,
        lr: float | Tensor,
        number: Tensor | None = None,
    ) -> Result:
        """``(loss, gradient norm, reports, params, optimizer state)`` after the step. Params and
        state are overwritten in place.

        ``tokens``: the valid targets of the global batch; the loss is the mean over them.
        ``number``: which update this is, as a tensor that the device reads; None: the state knows.

        Loss and norm are scalars that nobody has waited for. A step whose loss or norm is not
        finite moves no weight."""
        weights = params if opt.compute_copies is None else opt.compute_copies
        # No variable here holds the gradients: ``update`` frees them.
        return self.update(
            params, opt, [*self.gradients(weights, microbatches)], tokens, lr, number
        )

    def update(
        self,
        params: Any,
        opt: OptimizerState,
        done: list,
        tokens: int | Tensor,
        lr: float | Tensor,
        number: Tensor | None = None,
    ) -> Result:
        """Apply the result of ``gradients``: clip, update weights and router biases, and report.

        ``done``: the three values that ``gradients`` returned, as a list. The list is emptied, so that
        the gradients can be freed before the next step makes its own."""
        pipe, m, config = self.pipe, self.config.model, self.config.optim
        total, grads, reports = done
        done.clear()
        loss = pipe.sum(None if total is None else full(total)) / tokens
        norm = global_norm(grads, pipe.spec, pipe.sum) / tokens
        scale = clip_scale(norm, config.max_grad_norm) / tokens
        ok = loss.isfinite() & norm.isfinite()  # a step that is not would make every weight NaN
        scalars = UpdateScalars(lr, scale, ok, number)
        params, opt = apply_update(
            self.optimizer, pipe.spec, params, grads, opt, scalars, pipe.layout
        )
        del grads
        params = update_router_bias(params, reports, pipe, m.moe.bias_rate, ok)
        told = StepReports(
            expert_totals(reports, pipe, m.moe), mtp_losses(reports, pipe, m.mtp.depth)
        )
        return loss, norm, told, params, opt
