"""Fault tolerance: non-finite steps, loss spikes, and steps that do not end. (Signals:
runtime/signals.py.)

**Non-finite steps.** One bad batch in a million gives a loss of NaN or infinity. One update with
this loss makes every weight NaN. So the update itself checks that loss and norm are finite, and
changes nothing otherwise (``TrainStep.update``). The host does not wait for the result: it reads
the result one step later and counts skipped steps. Several skipped steps in a row are not caused by
one bad batch. Then the run stops and reports the result of ``diagnose``.

**Spikes.** A loss far above the recent losses is reported in one line. The run continues, because
most spikes recover by themselves.

**Steps that do not end.** A GPU that waits for the message of a dead rank waits for ever, and a
host that waits for this GPU cannot even be interrupted. NCCL's own timeout does not cover the
messages of a recorded step (training/cuda_graph.py). So the host looks at the end of a step until a
time limit, and never just waits (``wait_for_step``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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

LOOK = 5e-4  # seconds between two looks at the end of a step


class NonFiniteGuard:
    """Checks every step's loss and gradient norm.

    ``limit``: the number of skipped steps in a row at which the run stops.
    ``largest_norm``: a step with a larger gradient norm is skipped too; 0: no limit.

    A loss is a spike if it is more than ``DEVIATIONS`` standard deviations above the median of the
    last ``WINDOW`` losses. No spike is reported before there are ``MIN_LOSSES`` losses.
    """

    WINDOW, MIN_LOSSES, DEVIATIONS = 100, 20, 6.0

    def __init__(self, limit: int, largest_norm: float = 0.0):
        self.limit, self.skipped_steps, self.in_a_row = limit, 0, 0
        self._largest_norm = largest_norm
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def note(self, step: int, loss: float, norm: float) -> str | None:
        """Return a warning for a skipped step or a loss spike, else None."""
        if reason := self._why_skipped(loss, norm):
            self.skipped_steps, self.in_a_row = self.skipped_steps + 1, self.in_a_row + 1
            return f"warning: step {step}: {reason}; skipped, {self.in_a_row} in a row"
        self.in_a_row = 0
        recent = list(self._losses)
        self._losses.append(loss)
        if len(recent) < self.MIN_LOSSES:
            return None
        median = statistics.median(recent)
        # 1.4826: from the median absolute deviation to the standard deviation of a normal.
        deviation = statistics.median(abs(x - median) for x in recent) * 1.4826
        if loss <= median + self.DEVIATIONS * max(deviation, 1e-3 * abs(median)):
            return None
        return f"warning: step {step}: the loss jumped to {loss:.4f}, from about {median:.4f}"

    def _why_skipped(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        if self._largest_norm and norm > self._largest_norm:
            return f"the gradient norm is {norm:.4g}, above {self._largest_norm:g}"
        return ""

    @property
    def reason(self) -> str:
        return f"{self.in_a_row} steps in a row were skipped"

    @property
    def over(self) -> bool:
        return self.in_a_row >= self.limit


def diverged(step: int, why: str) -> UserError:
    """Return the error that ends a run that cannot recover. Every rank raises it in the same
    step."""
    return UserError(
        f"step {step}: {why}. The run has diverged: lower --optim.lr, raise --optim.warmup, or "
        "resume from an earlier checkpoint"
    )


def some_rank() -> str:
    """Say what a step waits for, if nothing is known."""
    return "another rank has died or hangs"


def wait_for_step(end: Any, seconds: float, awaited: Callable[[], str] = some_rank) -> None:
    """Wait until the device has reached the mark ``end`` of a step. Raises LostRank after so many
    seconds.

    ``awaited``: says what the step waits for."""
    if not isinstance(end, torch.cuda.Event):
        return
    limit = time.monotonic() + seconds
    while not end.query():
        if time.monotonic() > limit:
            raise LostRank(
                f"a step has not ended within --timeout-seconds {seconds:g}: {awaited()}; see the "
                "output of that rank"
            )
        time.sleep(LOOK)


def diagnose(
    step: TrainStep | CudaGraphStep, params: Any, microbatches: Sequence[Any], group: Any = None
) -> str:
    """Name the first non-finite weight and its rank. If all weights are finite, name the first
    non-finite gradient, its rank and its microbatch. Every rank calls this function, and all get
    the same answer.

    ``group``: all ranks (None: one process).

    The backward runs only if no rank has a non-finite weight. Ranks wait for each other in this
    backward, so no rank may decide alone.
    """
    pipe = step.pipe
    if bad := _findings(_non_finite(zip(flat(pipe.spec), flat(params), strict=True)), group):
        path, where = bad[0]
        return (
            f"{path} itself is not finite on rank {where} ({len(bad)} in all): resume from a "
            "checkpoint"
        )
    grads: list[tuple[str, int, int]] = []

    def look(stage: int, microbatch: int, stage_grads: Sequence[Tensor | None]) -> None:
        pairs = zip(flat(pipe.specs[stage]), stage_grads, strict=True)
        grads.extend((path, rank, microbatch) for path, rank in _non_finite(pairs))

    step.gradients(params, microbatches, look)
    if bad_grads := _findings(grads, group):
        first = min(m for *_, m in bad_grads)
        paths = [(path, r) for path, r, m in bad_grads if m == first]
        path, where = paths[-1]  # backward reaches the last weight in model order first
        many = f"({len(paths)} in all)"
        return f"the gradient of {path} is not finite on rank {where} in microbatch {first} {many}"
    return "all weights and all gradients of the last step are finite when the step is repeated"


def _findings(own: list[Any], group: Any) -> list[Any]:
    """Return the findings of all ranks of the group, in rank order."""
    if group is None:
        return own
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    return [x for each in every for x in each]


def _non_finite(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[str, int]]:
    """Return path and rank of every non-finite tensor."""
    return [
        (w.path, r)
        for w, x in pairs
        if x is not None
        for r, part in by_rank(to_local(x), rank()).items()
        if not part.isfinite().all()
    ]
