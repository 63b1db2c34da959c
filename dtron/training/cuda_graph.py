"""A training step as one CUDA graph.

A step of 24 layers is thousands of kernels. Launching them from Python takes as long as a fast GPU
takes to run them, or twice as long under tensor parallelism. A CUDA graph is a recording of all
these launches with their addresses. The host launches the graph in one call
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). A recording has three
requirements: shapes never change, weights and optimizer state are overwritten in place, and the
host reads no number of the step. A step of dtron meets all three requirements. The batch, the
learning rate and the counts are copied into the buffers that the recorded kernels read.

A pipelined step is recorded whole too, with its messages. Each rank records its own row of the
table. In a replay no Python runs between kernels. NCCL's timeout does not cover recorded messages,
so the host watches the end of each step (``wait_for_step`` in runtime/fault_tolerance.py). The
launch of a step of many microbatches may return only when most of the step is over. So it has a
thread of its own, and the host watches the launch too.

A batch ramp changes the number of microbatches. A recording has a fixed number of them, so each
size of the ramp has its own recording. A ramp does not go back: the recording of a size is dropped
at the first step of the next size, before this step allocates memory. So there is one recording at
a time, and a ramp needs no more memory than its largest step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.distributed.symmetric_memory import publish_weights
from dtron.errors import LostRank
from dtron.model.batch import Batch
from dtron.training.gradients import Reports
from dtron.training.optimizer import OptimizerState
from dtron.training.pipeline import Pipeline
from dtron.training.reports import StepReports
from dtron.training.step import Result, TrainStep
from dtron.tree import flat, tree_map


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    ``params``, ``kind``: the weights and the kind of the microbatches that it is valid for.
    ``inputs``: the buffers of microbatches and numbers that it reads.
    ``outputs``: loss, norm and reports, which a replay overwrites."""

    graph: torch.cuda.CUDAGraph
    params: Any
    kind: list
    inputs: tuple[Any, Tensor]
    outputs: tuple[Tensor, Tensor, StepReports]


class CudaGraphStep:
    """A training step that is recorded as a CUDA graph and replayed.

    ``step(params, opt, microbatches, tokens, lr, decay=)``: the step.
    ``plain``: the number of first calls that run unrecorded, for each number of microbatches. In
        these calls functions are compiled and collectives connect their ranks. The next call is
        recorded, and later calls are replayed.

    A call with another number of microbatches is of the next size of a batch ramp, and drops the
    recording. Any other call with other weights or shapes than the recorded ones runs
    unrecorded."""

    def __init__(self, step: TrainStep, device: str, plain: int = 3):
        self._step, self._device, self._plain = step, device, plain
        self._recording: Recording | None = None
        self._count, self._done = 0, 0  # microbatches of a step, and unrecorded calls of this count

    @property
    def pipe(self) -> Pipeline:
        return self._step.pipe

    def gradients(self, *args: Any) -> tuple[Tensor | None, Any, Reports]:
        """Call ``TrainStep.gradients``, which is not recorded."""
        return self._step.gradients(*args)

    def __call__(
        self,
        params: Any,
        opt: OptimizerState,
        microbatches: Sequence[Batch],
        tokens: int,
        lr: float,
        *,
        decay: float | None = None,
    ) -> Result:
        scheduled = [] if decay is None else [decay]
        numbers = torch.tensor([tokens, lr, opt.step + 1, *scheduled], dtype=torch.float64)
        if len(microbatches) != self._count:
            if self._recording is not None:
                self._recording.graph.reset()  # its memory may serve this step
            self._recording, self._count, self._done = None, len(microbatches), 0
        kind, recording = _kind(microbatches), self._recording
        if recording is None and self._done >= self._plain:
            recording = self._recording = self._record(params, opt, microbatches, numbers)
        if recording is None or params is not recording.params or kind != recording.kind:
            self._done += 1
            return self._run(params, opt, microbatches, numbers.to(self._device))
        inputs = _tensors((microbatches, numbers))
        for buffer, x in zip(_tensors(recording.inputs), inputs, strict=True):
            to_local(buffer).copy_(to_local(x), non_blocking=True)
        self._launch(recording.graph)
        loss, norm, reports = recording.outputs
        return (
            _output(loss),
            _output(norm),
            StepReports(*map(_output, reports)),
            params,
            replace(opt, step=opt.step + 1),
        )

    def _record(
        self, params: Any, opt: OptimizerState, microbatches: Sequence[Batch], numbers: Tensor
    ) -> Recording:
        inputs = tree_map(_input_buffer, tuple(microbatches)), numbers.to(self._device)
        graph = torch.cuda.CUDAGraph()
        # The graph must be able to follow any earlier work, such as a validation.
        publish_weights(flat(params))
        self.pipe.for_count(len(microbatches)).prepare_recording(microbatches[0])
        # Only calls of this thread may invalidate the recording: the thread of NCCL's watchdog may
        # query events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, norm, reports, *_ = self._run(params, opt, *inputs)
        return Recording(graph, params, _kind(microbatches), inputs, (loss, norm, reports))

    def _launch(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch the recorded step. Raises LostRank if the launch of a pipelined step does not
        return within the time limit, because another rank does not answer."""
        if self.pipe.timeout is None:
            graph.replay()
            return
        stream = torch.cuda.current_stream()

        def launch() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        if not finishes(launch, self.pipe.timeout.total_seconds()):
            raise LostRank(
                f"a step was not launched within {self.pipe.timeout.total_seconds():g} seconds: "
                f"{self.pipe.awaited()}; see the output of that rank"
            )

    def _run(
        self, params: Any, opt: OptimizerState, microbatches: Sequence[Batch], numbers: Tensor
    ) -> Result:
        tokens, lr, number, *decay = numbers.unbind()
        return self._step(params, opt, microbatches, tokens, lr, number, *decay)


def finishes(fn: Callable[[], None], seconds: float) -> bool:
    """Run ``fn`` in another thread, and return whether it has finished within this time. Its
    exception is raised here."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # the program may end while fn still runs
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _kind(microbatches: Sequence[Batch]) -> list:
    """Return the shapes, dtypes and plain values of microbatches. A recording is valid for one
    kind."""
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in flat(microbatches)]


def _input_buffer(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _output(x: Any) -> Any:
    """Copy an output of the recording: the next replay overwrites it."""
    return x if x is None else x.clone()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in flat(tree) if isinstance(x, Tensor)]
