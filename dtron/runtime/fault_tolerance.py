"""What a run outlives: being told to stop, steps that come to nothing, and losses out of line.

**Signals.** A job that must make room gets SIGTERM (torchrun, Slurm) or SIGUSR1 (Slurm's warning),
a person presses Ctrl-C. All mean: finish the step, save, leave. A signal reaches each rank at
another moment, perhaps another step, so before every step the ranks agree: a number of one integer,
over the hosts' own network.

**Steps that are not finite.** One bad batch in a million makes a loss of NaN or infinity, and one
update with it makes every weight NaN. So the update itself asks whether loss and norm are finite
and moves nothing otherwise (``update``; nobody waits for the answer). The host reads it a step
later and counts. When several in a row come to nothing it is not the batch, and the run stops with
what ``diagnose`` finds.

**Spikes.** A loss far above those before is worth a line, and no more: most heal by themselves.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.distributed.redistribute import local, rank
from dtron.distributed.simulated_ranks import by_rank
from dtron.errors import LostRank
from dtron.params import flat
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.step import TrainStep

AT_ONCE = (
    3.0  # seconds after which a second Ctrl-C is another one, and not torchrun passing on the first
)


class StopSignal:
    """``with Stop(group) as stop``: in the body, signals ask the run to stop. ``group``: a gloo group of all
    processes (None: one)."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, group: Any = None):
        self.name, self.group, self._since, self._before = "", group, 0.0, {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT and time.monotonic() - self._since > AT_ONCE:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._since = signal.Signals(number).name, time.monotonic()

    def asked(self) -> bool:
        """Whether any rank has been; every rank calls this, and all get one answer."""
        if self.group is None:
            return bool(self.name)
        mine = self.SIGNALS.index(signal.Signals[self.name]) + 1 if self.name else 0
        box = torch.tensor([mine])
        try:
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise LostRank(f"another rank has died or hangs ({why}); see what it said") from error
        if box.item() and not self.name:
            self.name = self.SIGNALS[box.item() - 1].name
        return bool(box.item())


class NonFiniteGuard:
    """Looks at every step's loss and gradient norm. ``limit``: how many in a row may come to
    nothing."""

    WINDOW, ENOUGH, FAR = 100, 20, 6.0

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def note(self, step: int, loss: float, norm: float) -> str | None:
        """A warning, where there is something to say."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            what = "loss" if not math.isfinite(loss) else "gradient"
            return (
                f"warning: step {step}: the {what} is not finite; skipped, {self.in_a_row} in a row"
            )
        self.in_a_row = 0
        usual, self._losses = list(self._losses), deque([*self._losses, loss], self.WINDOW)
        if len(usual) < self.ENOUGH:
            return None
        middle = statistics.median(usual)
        spread = (
            statistics.median(abs(x - middle) for x in usual) * 1.4826
        )  # a normal's standard deviation
        if loss <= middle + self.FAR * max(spread, 1e-3 * abs(middle)):
            return None
        return f"warning: step {step}: the loss jumped to {loss:.4f}, from about {middle:.4f}"

    @property
    def over(self) -> bool:
        return self.in_a_row >= self.limit


def diagnose(
    step: TrainStep | CudaGraphStep, params: Any, microbatches: Sequence[Any], group: Any = None
) -> str:
    """Which weight, on which rank, in which microbatch: the first that is not finite, and if none
    is, the first whose gradient is not. Every rank calls this, and all get one answer. Runs a
    backward if no rank, ``group`` being all of them (None: one process), has a weight that is not
    finite: in it ranks wait for each other, so none may decide alone."""
    pipe = step.pipe
    if bad := _of_all(_not_finite(zip(flat(pipe.spec), flat(params), strict=True)), group):
        path, where = bad[0]
        return f"{path} itself is not finite on rank {where} ({len(bad)} in all): resume from a checkpoint"
    grads: list[tuple[str, int, int]] = []

    def look(stage: int, microbatch: int, found: Sequence[Tensor | None]) -> None:
        pairs = zip(flat(pipe.specs[stage]), found, strict=True)
        grads.extend((path, rank, microbatch) for path, rank in _not_finite(pairs))

    step.gradients(params, microbatches, look)
    if steep := _of_all(grads, group):
        first = min(m for *_, m in steep)
        paths = [(path, r) for path, r, m in steep if m == first]
        path, where = paths[
            -1
        ]  # the last in the order of the model is the first that backward meets
        many = f"({len(paths)} in all)"
        return f"the gradient of {path} is not finite on rank {where} in microbatch {first} {many}"
    return "all weights and all gradients of the last step are finite when it is done again"


def _of_all(mine: list[Any], group: Any) -> list[Any]:
    """What every rank of the group has found, in the order of ranks."""
    if group is None:
        return mine
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return [x for each in every for x in each]


def _not_finite(pairs) -> list[tuple[str, int]]:
    """Path and rank of what is not."""
    return [
        (w.path, r)
        for w, x in pairs
        if x is not None
        for r, part in by_rank(local(x), rank()).items()
        if not part.isfinite().all()
    ]
