"""Messages between two GPUs of one host, carried by copy engines.

NCCL sends with a kernel on each rank. These kernels occupy SMs, and the receiving kernel occupies
them until the message has come, which may take the time of several actions. A matmul has one tile
for each SM, so a matmul beside such a kernel takes 1.4 to 1.9 times as long (H200).

Here a message is written into a *slot*: memory of the receiver that the sender can write
(*symmetric memory*). A GPU's copy engine does the copy, without an SM. Two signals guard a slot:

    sender                                    receiver
    wait until the slot is free
    copy the message into the slot
    signal that the slot is full      ->      wait until the slot is full
                                              copy the message out of the slot
                                      <-      signal that the slot is free

All operations are in the stream of the computation, in the order of the table. A rank that waits
has nothing else to compute, so a waiting kernel delays no other kernel. The price is the time of
the copy, a tenth of a millisecond for 32 MiB over NVLink.

**No deadlock.** A sender waits if all slots are full. So there must be enough slots.
``slots_needed`` simulates the table and counts the messages that are in flight at once. With that
many slots at least one execution of the table never waits for a slot. Each rank has a fixed order
of sends and receives, so whether ranks can block each other for ever does not depend on their speed
(Kahn 1974, "The semantics of a simple language for parallel programming"). So no execution
deadlocks.

Left out: copies in a side stream. A branch of a CUDA graph may be run behind another branch, and
then a message may wait for the computation that waits for its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dtron.schedules.table import Table, simulate

Pair = tuple[int, int]  # pipeline ranks: (sender, receiver)
SPARE_SLOTS = 1  # for actions that take other times than simulated ones


class SignalBuffer(Protocol):
    """Symmetric memory of two ranks: the methods of torch's handle that are called here. A signal
    is a number 0 or 1 for each channel and direction."""

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor:
        """Return a view of any rank's memory, mapped into this process."""

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Make the current stream wait until the signal to a rank is 0, and set it to 1."""

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Make the current stream wait until the signal from a rank is 1, and set it to 0."""


class MessageSlots:
    """The slots of two ranks, in both directions. A message's number counts from 0 in each step and
    direction. Both ranks must make their MessageSlots before either sends.

    ``memory``: this rank's slots, one in each row. It is symmetric memory.
    ``buffer``: the handle of this memory.
    ``rank``: the rank of this process in the buffer, 0 or 1."""

    def __init__(self, memory: Tensor, buffer: SignalBuffer, rank: int):
        self._buffer, self._peer, self._count = buffer, 1 - rank, memory.shape[0]
        self._own = memory
        self._others = buffer.get_buffer(self._peer, memory.shape, memory.dtype, 0)
        for slot in range(self._count):
            self._buffer.put_signal(self._peer, channel=_free(slot))

    def send(self, number: int, x: Tensor) -> None:
        """Copy a message into the peer's memory, once a slot is free."""
        slot = number % self._count
        self._buffer.wait_signal(self._peer, channel=_free(slot))
        self._others[slot].copy_(x)
        self._buffer.put_signal(self._peer, channel=_full(slot))

    def receive(self, number: int) -> Tensor:
        """Wait for a message and return a copy of it."""
        slot = number % self._count
        self._buffer.wait_signal(self._peer, channel=_full(slot))
        x = self._own[slot].clone()
        self._buffer.put_signal(self._peer, channel=_free(slot))
        return x


def _full(slot: int) -> int:
    return 2 * slot


def _free(slot: int) -> int:
    return 2 * slot + 1


def slots_needed(t: Table) -> Mapping[Pair, int]:
    """Return how many slots each direction between two ranks needs, so that no rank blocks another
    for ever. The receiver takes the messages of a direction in the order in which they are sent."""
    spans = {a: (start, end) for row in simulate(t).spans for a, start, end in row}
    takers = {made: a for _, a in t.order for made in t.needs(a) if made.stage != a.stage}
    in_flight: dict[Pair, int] = {}
    for pair in t.pairs:
        made = [a for a in t.rows[pair[0]] if t.goal(a) == pair[1]]
        sent = [spans[a][1] for a in made]
        taken = [spans[takers[a]][0] for a in made]
        # A message leaves its slot at the latest when a later message is taken.
        taken = [min(taken[i:]) for i in range(len(taken))]
        # At one moment all ranks send before they take.
        in_flight[pair] = max(sum(a <= now <= b for a, b in zip(sent, taken)) for now in sent)
    return {pair: count + SPARE_SLOTS for pair, count in in_flight.items()}
