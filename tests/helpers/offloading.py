"""Activations of small models that move to the host, and faults of such moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from torch import Tensor

from dtron.distributed.host_memory import HostMemory
from dtron.model import activation_checkpoint
from dtron.model.activation_checkpoint import MOVE, POLICIES, offload


@contextmanager
def everything_moves() -> Iterator[None]:
    """Under ``--recompute offload``, tensors of any size move."""
    any_size = replace(MOVE, offload_bytes=0)
    with (
        mock.patch.object(activation_checkpoint, "MOVE", any_size),
        mock.patch.dict(POLICIES, offload=offload()),
    ):
        yield


@contextmanager
def buffers_given_back_too_early() -> Iterator[None]:
    """A mutant: a buffer may be used again before it was read."""
    take = HostMemory.take

    def taken(self: HostMemory, x: Tensor) -> Tensor:
        buffer = take(self, x)
        self._free[buffer.nbytes].append(buffer)
        return buffer

    with (
        mock.patch.object(HostMemory, "take", taken),
        mock.patch.object(HostMemory, "give_back", lambda self, buffer: None),
    ):
        yield


@contextmanager
def buffers_of_the_newest_microbatch() -> Iterator[None]:
    """A mutant: a tensor comes back from the newest buffer of its size."""
    copy_in, copy_out, newest = HostMemory.copy_in, HostMemory.copy_out, {}

    def noted(self: HostMemory, pairs):
        newest.update({buffer.nbytes: buffer for _, buffer in pairs})
        return copy_out(self, pairs)

    def swapped(self: HostMemory, pairs):
        return copy_in(self, [(x, newest[buffer.nbytes]) for x, buffer in pairs])

    with (
        mock.patch.object(HostMemory, "copy_out", noted),
        mock.patch.object(HostMemory, "copy_in", swapped),
    ):
        yield
