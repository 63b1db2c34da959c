"""Hooks on the tensors that autograd saves for backward, and the local tensors inside of them.

torch calls the innermost pair of hooks alone (``torch.autograd.graph.saved_tensors_hooks``). Here a
pair may leave a tensor to the pair around it. So one pair can take the gathered weights of a block,
and another pair the block's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron.distributed.redistribute import ShardSpec, to_local
from dtron.distributed.simulated_ranks import by_rank, combined, is_simulated

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Packed(NamedTuple):
    """A packed tensor, with the function that unpacks it."""

    unpack: Unpack
    packed: Any


@contextmanager
def saved_by(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """Save tensors for backward as ``pack(x)``, from which ``unpack`` makes them again. A tensor
    that ``pack`` returns as it is goes on to the hooks around this context."""
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack_it(x: Tensor) -> Any:
        packed = pack(x)
        if packed is not x:
            return _Packed(unpack, packed)
        return x if outer is None else _Packed(outer[1], outer[0](x))

    with saved_tensors_hooks(pack_it, _unpack):
        yield


def _unpack(saved: Any) -> Tensor:
    return saved.unpack(saved.packed) if isinstance(saved, _Packed) else saved


def storage_id(x: Tensor) -> int:
    """Return a number of the storage of x, as long as the storage exists. A fake tensor has one
    too, but no address."""
    return x.untyped_storage()._cdata


def take_apart(x: Tensor) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tensor]]:
    """Return the plain tensors inside of x, and a function that makes x of such tensors. A DTensor
    has one plain tensor, and a simulated tensor has one for each rank."""
    if isinstance(x, DTensor):
        parts, make = take_apart(to_local(x))
        return parts, partial(_dtensor, make, ShardSpec.of(x), x.device_mesh)
    if hasattr(x, "trigger_wait"):  # the result of a collective that may be on its way
        return [x.trigger_wait()], _only
    if is_simulated(x):
        ranks = by_rank(x, 0)
        return list(ranks.values()), partial(_simulated, list(ranks))
    return [x], _only


def _dtensor(
    make: Callable[[Sequence[Tensor]], Tensor],
    spec: ShardSpec,
    mesh: DeviceMesh,
    parts: Sequence[Tensor],
) -> Tensor:
    with torch.no_grad():
        return spec.to_dtensor(make(parts), mesh)


def _simulated(ranks: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    return combined(dict(zip(ranks, parts, strict=True)), None)


def _only(parts: Sequence[Tensor]) -> Tensor:
    (x,) = parts
    return x
