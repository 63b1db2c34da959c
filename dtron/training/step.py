"""One step of training: from the state and the microbatches of a global batch to the state after it.

``update`` is the whole of it, for train.py, the benchmarks and the tests alike: gradients, their norm,
clipping, AdamW. Nothing in it waits for the device.

``Recorded`` is the same step for a host that is too slow. A step of 24 layers is thousands of kernels, and
launching them from Python takes as long as a fast GPU, or half of one under tensor parallelism, takes to run
them. A CUDA graph is a recording of all these launches with their addresses; the host starts it in one call
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). What that asks for is there already: shapes
never change, weights and moments are overwritten in place, and no number of the step is read by the host. The
batch, the rate and the counts are copied to where the recorded kernels look for them.

Left out: pipelines. Their ranks wait for each other in the middle of a step, which a recording would allow,
but a rank that dies would then be waited for without the timeout that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import full, local
from dtron.distributed.symmetric_memory import settle
from dtron.model.batch import Batch
from dtron.model.config import ModelConfig
from dtron.params import flat, tree_map
from dtron.schedules.runner import Program
from dtron.training.gradients import gradients
from dtron.training.optimizer import AdamState, OptimConfig, Rule, adam_update, clip_scale, global_norm
from dtron.training.pipeline import Pipeline
from dtron.training.reports import Told, ahead_losses, expert_totals, update_balance

Result = tuple[Tensor, Tensor, Told, Any, AdamState]


def update(
    functions: Program,
    pipe: Pipeline,
    m: ModelConfig,
    zero: int,
    optim: OptimConfig,
    params: Any,
    opt: AdamState,
    microbatches: Sequence[Batch],
    tokens: int | Tensor,
    lr: float | Tensor,
    rule: Rule | None = None,
    gather_each: bool = True,
    number: Tensor | None = None,
) -> Result:
    """``(loss, gradient norm, told, params, optimizer state)`` after a step; the last two are those given,
    overwritten. The loss is the mean over ``tokens``, the valid ones of the global batch, and like the norm a
    scalar that nobody has waited for. A step whose loss or norm is not finite moves no weight. ``number``:
    which update this is, for the device to know (None: the state's)."""
    ready = params if opt.copies is None else opt.copies
    total, grads, reports = gradients(functions, ready, microbatches, 1, pipe, zero, gather_each)
    loss = pipe.sum(None if total is None else full(total)) / tokens
    norm = global_norm(grads, pipe.spec, pipe.sum) / tokens
    scale = clip_scale(norm, optim.clip) / tokens
    ok = loss.isfinite() & norm.isfinite()  # a step that is not would make every weight NaN
    params, opt = adam_update(grads, opt, params, pipe.spec, lr, scale, optim, rule, number, ok)
    del grads  # or they would wait for the next step's
    params = update_balance(params, reports, pipe, m.moe.bias_rate, ok)
    told = Told(expert_totals(reports, pipe, m.moe), ahead_losses(reports, pipe, m.mtp.depth))
    return loss, norm, told, params, opt


class Recorded:
    """``step(params, opt, microbatches, tokens, lr, number=)``, whose first calls run as they are, while
    functions are compiled and collectives find their partners; then one is recorded, and from there on
    replayed. A call with other weights or other shapes runs as it is."""

    def __init__(self, step: Callable[..., Result], device: str, plain: int = 3):
        self._step, self._device, self._plain, self._graph = step, device, plain, None

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
            settle(flat(params))  # so that it follows upon anything: a validation may have come before
            # Only this thread's calls count: that of NCCL's watchdog may ask for events meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._run(params, opt, *self._inputs)[:3]
        for there, here in zip(_tensors(self._inputs), _tensors((microbatches, numbers)), strict=True):
            local(there).copy_(local(here), non_blocking=True)
        self._graph.replay()
        own = lambda x: x if x is None else x.clone()  # the next replay overwrites them
        loss, norm, told = self._outputs
        return own(loss), own(norm), Told(*map(own, told)), params, replace(opt, step=opt.step + 1)

    def _run(self, params: Any, opt: AdamState, microbatches: Sequence[Batch], numbers: Tensor) -> Result:
        tokens, lr, number = numbers.unbind()
        return self._step(params, opt, microbatches, tokens, lr, number=number)


def _kind(microbatches: Sequence[Batch]) -> list:
    """What a recording is made for."""
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in flat(microbatches)]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in flat(tree) if isinstance(x, Tensor)]
