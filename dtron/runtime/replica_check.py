"""Checks during a run that all ranks with the same shard have the same bits (replicas.py).

A check after a step goes on beside the next steps, so nobody waits: the device hashes, and the sums
are sent when the step is over. They are judged one step later. A check before a save is judged at
once: wrong bits must not replace a checkpoint. A run that did not ask for checks gets a warning
there, and saves.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.checkpoint import TrainState
from dtron.distributed.bit_hash import CHUNK, odd_weights
from dtron.distributed.redistribute import rank, to_local
from dtron.errors import UserError
from dtron.runtime.replicas import (
    TIED,
    describe,
    differ,
    differences,
    entries,
    factors,
    hashes,
    joined,
)
from dtron.training.pipeline import Pipeline


class Check(NamedTuple):
    """A check that is under way.

    ``own``: the hashes of all tensors, on the device.
    ``sums``: the numbers of ``joined``. They are on the host when the step is over."""

    step: int
    own: Tensor
    sums: Tensor


class Sent(NamedTuple):
    """A check whose message to all ranks is under way. ``table``: the numbers of all ranks."""

    check: Check
    work: Any
    table: Tensor


class ReplicaCheck:
    """Checks the replicas of a run. All ranks make the same calls. Each call may raise UserError,
    on all ranks: two ranks differ.

    ``every``: the number of steps between two checks; 0: only before saves, with a warning instead
        of the error.
    ``sizes``: the mesh axes of all ranks (``MeshShape.atoms``).
    ``group``: a gloo group of all processes that only the main thread uses. None: all ranks are in
        one process, and nothing is checked."""

    def __init__(self, every: int, pipe: Pipeline, sizes: Mapping[str, int], group: Any) -> None:
        self._every, self._pipe, self._sizes, self._group = every, pipe, sizes, group
        self._axes = [axis for axis in sizes if axis != "pp"] + [TIED]
        self._constants: tuple[Tensor, Tensor] | None = None
        self._tensors: list[tuple[str, frozenset[str]]] = []  # the name and axes of each
        self._hashed, self._sent = list[Check](), list[Sent]()
        self._agreed: int | None = None  # the last step at which all ranks agreed

    def launch(self, state: TrainState) -> None:
        """Begin the check that is due after a step. The host waits for nothing."""
        if self._group is not None and self._every and state.step % self._every == 0:
            self._hash(state)

    def advance(self, step: int) -> None:
        """Go on with earlier checks, after the launch of a step. All steps before it are over."""
        self._read()
        self._send(step)

    def check(self, state: TrainState) -> list[str]:
        """Check a step at once, before a save. The device has finished the step. Return a warning
        if ranks differ and no regular checks were asked for."""
        if self._group is None:
            return []
        if not any(check.step == state.step for check in self._hashed):
            self._hash(state)
        try:
            self.finish()
        except UserError as error:
            if self._every:
                raise
            return [f"warning: {error}"]
        return []

    def finish(self) -> None:
        """Finish all checks. The host waits for the device."""
        if self._hashed and self._hashed[-1].own.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._read()
        self._send()
        self._read()

    def _hash(self, state: TrainState) -> None:
        found = entries(state, self._pipe)
        if self._constants is None:
            device = found[0].tensor.device if found else torch.device("cpu")
            longest = max((to_local(entry.tensor).nbytes // 8 for entry in found), default=1)
            weights = odd_weights(min(max(longest, 1), CHUNK), device)
            self._constants = weights, factors(found, self._axes, device)
            self._tensors = [(entry.name, entry.whole) for entry in found]
        weights, factor = self._constants
        if found:
            (own,) = hashes(found, weights).values()
        else:  # of a pipeline rank that shares nothing
            own = torch.zeros(0, dtype=torch.int64)
        sums = joined(own, factor).to("cpu", non_blocking=True)
        self._hashed.append(Check(state.step, own, sums))

    def _send(self, before: int | None = None) -> None:
        """Send the hashes of the steps before ``before``; None: of all steps."""
        ready = [check for check in self._hashed if before is None or check.step < before]
        self._hashed = self._hashed[len(ready) :]
        for check in ready:
            ranks = dist.get_world_size(self._group)
            table = torch.empty(ranks, len(self._axes), dtype=torch.int64)
            work = dist.all_gather(list(table), check.sums, group=self._group, async_op=True)
            self._sent.append(Sent(check, work, table))

    def _read(self) -> None:
        """Judge the checks that were sent. Their messages came long ago, but at a save."""
        sent, self._sent = self._sent, []
        for check, work, table in sent:
            work.wait()
            if differ(self._sizes, self._axes, table):
                raise self._error(check)
            self._agreed = check.step

    def _error(self, check: Check) -> UserError:
        """Name what differs. All ranks know that something does, and call this."""
        # The names and axes of the tensors are the same after each step.
        own = [
            (n, whole, h) for (n, whole), h in zip(self._tensors, check.own.tolist(), strict=True)
        ]
        every: list[Any] = [None] * dist.get_world_size(self._group)
        name = f"rank {rank()} ({socket.gethostname()}, {check.own.device})"
        dist.all_gather_object(every, (name, own), group=self._group)
        found = differences(self._sizes, {r: own for r, (_, own) in enumerate(every)})
        since = (
            "no earlier step was checked"
            if self._agreed is None
            else f"all ranks agreed after step {self._agreed}"
        )
        text = describe(found, [name for name, _ in every])
        before = "" if self._agreed is None else f" of step {self._agreed} or before"
        return UserError(
            f"step {check.step}: {text}; {since}. A device computes or stores wrong bits: test "
            f"its host, and resume from a checkpoint{before}"
        )
