"""A training step as one CUDA graph.

A step of 24 layers is thousands of kernels. Launching them from Python takes as long as a fast GPU
takes to run them, or twice as long under tensor parallelism. A CUDA graph is a recording of all
these launches with their addresses; the host starts it in one call
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). A recording needs shapes that
never change, weights and moments that are overwritten in place, and a host that reads no number of
the step: a step of dtron has all three. The batch, the learning rate and the counts are copied to
where the recorded kernels read them.

Left out: pipelines. Their ranks wait for each other in the middle of a step. A recording would
allow that, but a rank that dies would then be waited for without the timeout that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import local
from dtron.distributed.symmetric_memory import publish_weights
from dtron.model.batch import Batch
from dtron.params import flat, tree_map
from dtron.training.gradients import Reports
from dtron.training.optimizer import AdamState
from dtron.training.pipeline import Pipeline
from dtron.training.reports import StepReports
from dtron.training.step import Result, TrainStep


class CudaGraphStep:
    """``step(params, opt, microbatches, tokens, lr, number=)``, whose first calls run as they are,
    while functions are compiled and collectives find their partners; then one is recorded, and from
    there on replayed. A call with other weights or other shapes runs as it is."""

    def __init__(self, step: TrainStep, device: str, plain: int = 3):
        self._step, self._device, self._plain, self._graph = step, device, plain, None

    @property
    def pipe(self) -> Pipeline:
        return self._step.pipe

    def gradients(self, *args: Any) -> tuple[Tensor | None, Any, Reports]:
        """``TrainStep.gradients``, which is not recorded."""
        return self._step.gradients(*args)

    def __call__(
        self, params: Any, opt: AdamState, microbatches: Sequence[Batch], tokens: int, lr: float
    ) -> Result:
        numbers = torch.tensor([tokens, lr, opt.step + 1], dtype=torch.float64)
        kind = _kind(microbatches)
        if self._plain > 0 or (self._graph and (params is not self._params or kind != self._kind)):
            self._plain -= 1
            return self._run(params, opt, microbatches, numbers.to(self._device))
        if self._graph is None:
            self._params, self._kind = params, kind
            own = lambda x: x.detach().clone() if isinstance(x, Tensor) else x
            self._inputs = tree_map(own, tuple(microbatches)), numbers.to(self._device)
            self._graph = torch.cuda.CUDAGraph()
            publish_weights(
                flat(params)
            )  # so that it follows upon anything: a validation may have come before
            # Only this thread's calls count: that of NCCL's watchdog may ask for events meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._run(params, opt, *self._inputs)[:3]
        for there, here in zip(
            _tensors(self._inputs), _tensors((microbatches, numbers)), strict=True
        ):
            local(there).copy_(local(here), non_blocking=True)
        self._graph.replay()
        own = lambda x: x if x is None else x.clone()  # the next replay overwrites them
        loss, norm, told = self._outputs
        return (
            own(loss),
            own(norm),
            StepReports(*map(own, told)),
            params,
            replace(opt, step=opt.step + 1),
        )

    def _run(
        self, params: Any, opt: AdamState, microbatches: Sequence[Batch], numbers: Tensor
    ) -> Result:
        tokens, lr, number = numbers.unbind()
        return self._step(params, opt, microbatches, tokens, lr, number=number)


def _kind(microbatches: Sequence[Batch]) -> list:
    """What a recording is made for."""
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in flat(microbatches)]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in flat(tree) if isinstance(x, Tensor)]
