"""Fault tolerance: stop signals, non-finite steps and loss spikes.

**Signals.** A preempted job gets SIGTERM (torchrun, Slurm) or SIGUSR1 (Slurm's warning). A user
presses Ctrl-C. All three mean: finish the step, save a checkpoint, exit. A signal reaches each rank
at a different time, perhaps in a different step. So the ranks agree before every step: they
all-reduce one integer over gloo, the hosts' own network.

**Non-finite steps.** One bad batch in a million gives a loss of NaN or infinity. One update with
this loss makes every weight NaN. So the update itself checks that loss and norm are finite, and
changes nothing otherwise (``update``). The host does not wait for the result: it reads the result
one step later and counts skipped steps. Several skipped steps in a row are not caused by one bad
batch. Then the run stops and reports the result of ``diagnose``.

**Spikes.** A loss far above the recent losses is reported in one line. The run continues, because
most spikes recover by themselves.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.distributed.redistribute import rank, to_local
from dtron.distributed.simulated_ranks import by_rank
from dtron.errors import LostRank, UserError
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.step import TrainStep
from dtron.tree import flat

AT_ONCE = 3.0  # seconds; a second SIGINT within this time is torchrun forwarding the first Ctrl-C


class StopSignal:
    """``with StopSignal(group) as stop``: inside the body, signals ask the run to stop.

    ``group``: a gloo group of all processes (None: one process).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, group: Any = None):
        self.name, self.group, self._since = "", group, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # else not allowed
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
        """Return whether any rank got a signal. Every rank calls this; all get the same answer."""
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
            self.name = self.SIGNALS[int(box.item()) - 1].name
        return bool(box.item())


class NonFiniteGuard:
    """Checks every step's loss and gradient norm.

    ``limit``: the number of skipped steps in a row at which the run stops.
    """

    WINDOW, ENOUGH, FAR = 100, 20, 6.0

    def __init__(self, limit: int):
        self.limit, self.skipped_steps, self.in_a_row = limit, 0, 0
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def note(self, step: int, loss: float, norm: float) -> str | None:
        """Return a warning for a non-finite step or a loss spike, else None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped_steps, self.in_a_row = self.skipped_steps + 1, self.in_a_row + 1
            what = "loss" if not math.isfinite(loss) else "gradient"
            return (
                f"warning: step {step}: the {what} is not finite; skipped, {self.in_a_row} in a row"
            )
        self.in_a_row = 0
        usual, self._losses = list(self._losses), deque([*self._losses, loss], self.WINDOW)
        if len(usual) < self.ENOUGH:
            return None
        middle = statistics.median(usual)
        # 1.4826: from the median absolute deviation to the standard deviation of a normal.
        spread = statistics.median(abs(x - middle) for x in usual) * 1.4826
        if loss <= middle + self.FAR * max(spread, 1e-3 * abs(middle)):
            return None
        return f"warning: step {step}: the loss jumped to {loss:.4f}, from about {middle:.4f}"

    @property
    def reason(self) -> str:
        return f"{self.in_a_row} steps in a row came to nothing"

    @property
    def over(self) -> bool:
        return self.in_a_row >= self.limit


def diverged(step: int, why: str) -> UserError:
    """The error that ends a run that cannot recover. Every rank raises it at once."""
    return UserError(
        f"step {step}: {why}. The run has diverged: lower --optim.lr, raise --optim.warmup, or "
        "resume from an earlier checkpoint"
    )


def diagnose(
    step: TrainStep | CudaGraphStep, params: Any, microbatches: Sequence[Any], group: Any = None
) -> str:
    """Name the first non-finite weight and its rank. If all weights are finite, name the first
    non-finite gradient, its rank and its microbatch. Every rank calls this; all get one answer.

    ``group``: all ranks (None: one process).

    The backward runs only if no rank has a non-finite weight. Ranks wait for each other in this
    backward, so no rank may decide alone.
    """
    pipe = step.pipe
    if bad := _of_all(_not_finite(zip(flat(pipe.spec), flat(params), strict=True)), group):
        path, where = bad[0]
        return (
            f"{path} itself is not finite on rank {where} ({len(bad)} in all): resume from a "
            "checkpoint"
        )
    grads: list[tuple[str, int, int]] = []

    def look(stage: int, microbatch: int, found: Sequence[Tensor | None]) -> None:
        pairs = zip(flat(pipe.specs[stage]), found, strict=True)
        grads.extend((path, rank, microbatch) for path, rank in _not_finite(pairs))

    step.gradients(params, microbatches, look)
    if steep := _of_all(grads, group):
        first = min(m for *_, m in steep)
        paths = [(path, r) for path, r, m in steep if m == first]
        path, where = paths[-1]  # backward reaches the last weight in model order first
        many = f"({len(paths)} in all)"
        return f"the gradient of {path} is not finite on rank {where} in microbatch {first} {many}"
    return "all weights and all gradients of the last step are finite when it is done again"


def _of_all(mine: list[Any], group: Any) -> list[Any]:
    """Return the findings of all ranks of the group, in rank order."""
    if group is None:
        return mine
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return [x for each in every for x in each]


def _not_finite(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[str, int]]:
    """Return path and rank of every non-finite tensor."""
    return [
        (w.path, r)
        for w, x in pairs
        if x is not None
        for r, part in by_rank(to_local(x), rank()).items()
        if not part.isfinite().all()
    ]
