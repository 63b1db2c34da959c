"""Many simulated ranks in one process, for property tests, ``--simulate`` and ``dtron.verify``.

``LocalTensorMode`` replaces every rank-local tensor by one value per rank. It runs each operation
once for each rank, and collectives move values between ranks. The program is the same as on real
ranks, DTensor included. A simulated program is slower by the number of ranks. It needs no GPU, no
torchrun and no network.

LocalTensorMode is private to torch, and so is the fake process group that names the groups. Only
this file imports them. A simulation cannot draw random numbers per rank, and it cannot time
anything. dtron draws whole weights outside the mode, and slices them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C import DispatchKey
from torch.distributed._local_tensor import (
    LocalTensor,
    LocalTensorMode,
    maybe_disable_local_tensor_mode,
)
from torch.distributed._local_tensor import (
    _combine_rank_results as combined,
)
from torch.distributed._local_tensor import (
    _map_to_rank_local_val as on_rank,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError

LARGEST = 4096  # ranks; each of them is a tensor of every weight


def check_ranks(shape: MeshShape) -> None:
    """Raise UserError for more ranks than one process can simulate."""
    if shape.size > LARGEST:
        raise UserError(
            f"mesh {shape}: {shape.size} simulated ranks, and one process has at most {LARGEST}; "
            "use a smaller mesh"
        )


@contextmanager
def simulated(shape: MeshShape) -> Iterator[DeviceMesh | None]:
    """Run the body on ``shape.size`` simulated ranks. Yields the stage's DeviceMesh; None for one
    rank."""
    check_ranks(shape)
    axes = tuple((a, n) for a, n in shape.atoms.items() if a != "pp")
    if not axes:
        yield None
        return
    mesh = _mesh(axes)
    with _SimulatedRanks(mesh.size()):
        yield mesh


class _SimulatedRanks(LocalTensorMode):
    """LocalTensorMode with a fast path for the common operations: pure functions of tensors, and
    questions about their shape. A simulated step takes half the time.

    LocalTensorMode saves and restores the random state around every operation and rank. A view also
    costs three more modes: LocalTensorMode gives the wrapper of all ranks' views the storage of the
    wrapper of their bases. The fast path does neither. A wrapper's storage is never read, and every
    rank's view shares the memory of this rank's tensor either way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {type(x) for x in _flat(args)}
        if func is torch.ops.aten.promote_types.default:
            return func(*args)
        if func._schema.name == "_c10d_functional::_wrap_tensor_autograd":
            with _SimulatedRanks(self.ranks):  # torch enters a plain LocalTensorMode here
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        if LocalTensor not in kinds or not kinds <= _KNOWN or not _is_pure(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.dim.default:
            return len(args[0]._size)
        if func is torch.ops.aten.sym_size.default:
            return tuple(args[0]._size)
        kwargs = kwargs or {}
        results = {
            rank: func(
                *[_on_rank(x, rank) for x in args],
                **{name: _on_rank(x, rank) for name, x in kwargs.items()},
            )
            for rank in sorted(self.ranks)
        }
        if len({len(x) for x in results.values() if isinstance(x, (list, tuple))}) > 1:
            return super().__torch_dispatch__(func, types, args, kwargs)
        wrapper = _wrap_same_shapes(results)
        return combined(results, None) if wrapper is None else wrapper


_RETURNED = (
    ["Tensor"],
    ["List[Tensor]"],
    ["int"],
    ["SymInt"],
    ["List[int]"],
    ["List[SymInt]"],
    ["bool"],
)
_KNOWN = {LocalTensor, torch.Tensor, torch.nn.Parameter}


def _flat(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _flat(x)


def _on_rank(x: Any, rank: int) -> Any:
    if type(x) is LocalTensor:
        return x._local_tensors[rank]
    return type(x)(_on_rank(y, rank) for y in x) if type(x) in (list, tuple) else on_rank(x, rank)


_NO_KEYS = torch._C.DispatchKeySet.from_raw_repr(0)


def _wrap_same_shapes(results: dict[int, Any]) -> LocalTensor | None:
    """Wrap the ranks' tensors if all have one shape and stride, otherwise return None. The
    constructor of LocalTensor compares the sizes of all ranks dim by dim, which takes a tenth of a
    simulated step."""
    first = next(iter(results.values()))
    if type(first) is not torch.Tensor:
        return None
    size, stride = first.shape, first.stride()
    for x in results.values():
        if x.shape != size or x.stride() != stride or x.is_conj() or x.is_neg():
            return None
    wrapper = torch.Tensor._make_wrapper_subclass(
        LocalTensor,
        size,
        strides=stride,
        dtype=first.dtype,
        device=first.device,
        dispatch_sizes_strides_policy="sizes",
        _extra_dispatch_keys=_NO_KEYS,
    )
    torch._C._set_throw_on_mutable_data_ptr(wrapper)
    wrapper._local_tensors, wrapper._ranks = results, frozenset(results)
    wrapper._size = list(size)
    return wrapper


@cache
def _is_pure(func: Any) -> bool:
    """Whether an operation of torch itself writes to no argument, draws no random number, takes
    tensors by position alone, and returns tensors or integers."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    schema = func._schema
    return (
        not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in func.tags
        and func.overloadpacket is not torch.ops.aten.hash_tensor
        and [str(x.type) for x in schema.returns] in _RETURNED
        and not any("Tensor" in str(x.type) for x in schema.arguments if x.kwarg_only)
    )


def one_rank(x: torch.Tensor) -> torch.Tensor:
    """Return rank 0's value of a simulated tensor, and any other tensor as it is."""
    return x._local_tensors[0] if isinstance(x, LocalTensor) else x


def same_on_all(x: torch.Tensor) -> torch.Tensor:
    """Return the value that all simulated ranks share, and any other tensor as it is. Raises
    AssertionError if ranks differ. Two NaNs at the same index are equal."""
    if not isinstance(x, LocalTensor):
        return x
    first, *others = x._local_tensors.values()
    for other in others:
        if not torch.equal(first, other) and not _equal_with_nan(first, other):
            raise AssertionError("a tensor that should be whole on every rank differs by rank")
    return first.clone()


def _equal_with_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())


def is_simulated(x: torch.Tensor) -> bool:
    return isinstance(x, LocalTensor)


def by_rank(x: torch.Tensor, rank: int) -> dict[int, torch.Tensor]:
    """Return ``{rank: value}``: every rank's value of a simulated tensor; any other tensor is the
    value of ``rank`` alone."""
    return dict(x._local_tensors) if isinstance(x, LocalTensor) else {rank: x}


@contextmanager
def paused() -> Iterator[None]:
    """Pause the simulation, so that new tensors are plain tensors again. For code that allocates
    tensors and does not know about ranks."""
    with maybe_disable_local_tensor_mode():
        yield


def join_fake_group(size: int) -> None:
    """Make this process rank 0 of a group of so many processes, at least. The group sends nothing.
    A smaller group, and the meshes that have it, are gone then."""
    if dist.is_initialized() and dist.get_world_size() < size:
        dist.destroy_process_group()
        _mesh.cache_clear()
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=max(size, 64), store=FakeStore())


@cache
def _mesh(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Build each mesh once. DTensor plans redistributions per mesh, and two meshes are equal only
    if they are the same object."""
    size = math.prod(n for _, n in axes)
    join_fake_group(size)
    ranks = torch.arange(size).view([n for _, n in axes])
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(a for a, _ in axes))
