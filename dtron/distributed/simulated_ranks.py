"""Many simulated ranks in one process, for property tests, ``--simulate`` and ``dtron.verify``.

``LocalTensorMode`` replaces every rank-local tensor by one value per rank. It runs each operation
once for each rank, and collectives move values between ranks. The program is that of real ranks,
DTensor included. It is slower by the number of ranks. It needs no GPU, no torchrun and no network.

LocalTensorMode is private to torch, and so is the fake process group that names the groups. A
simulation cannot draw random numbers per rank, and cannot time anything. dtron draws whole weights
outside the mode, and slices them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
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
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.sharding_search import short_search
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
    """Run the body on ``shape.size`` ranks. Yields the stage's DeviceMesh; None for one rank."""
    check_ranks(shape)
    axes = tuple((a, n) for a, n in shape.atoms.items() if a != "pp")
    if not axes:
        yield None
        return
    mesh = _mesh(axes)
    with short_search(), _SimulatedRanks(mesh.size()):
        yield mesh


class _SimulatedRanks(LocalTensorMode):
    """LocalTensorMode with a fast path for the common operations: functions of tensors, updates in
    place, and questions about the shape of a tensor. A simulated step takes half the time.

    LocalTensorMode saves and restores the random state around every operation and rank. A view
    costs three more modes, to give the wrapper of all ranks' views the storage of the wrapper of
    their bases. The fast path does neither: a wrapper's storage is never read.

    All ranks share a fake tensor. DTensor finds the shapes of new operations with fake tensors."""

    def __init__(self, ranks: int):
        super().__init__(ranks)
        self.in_order = sorted(self.ranks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_A_SHAPE and type(args[0]) is LocalTensor:
            answer = _ABOUT_A_SHAPE[func](args[0])
            if answer is not None:
                return answer
        kinds = {type(x) for x in _flat(args)}
        if func is torch.ops.aten.promote_types.default or _on_fake_tensors(kinds):
            return func(*args, **kwargs)
        if func in _MADE_OF_OTHERS and kinds == {LocalTensor} and not self._disable:
            with self._again():
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        effect = _effect(func)
        if effect is None or not kinds <= _KNOWN:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if LocalTensor not in kinds and (kinds or self._disable):
            return func(*args, **kwargs)
        results = self._on_each(func, args, kwargs)
        if effect == "writes":
            return args[0]
        if len({len(x) for x in results.values() if isinstance(x, (list, tuple))}) > 1:
            return super().__torch_dispatch__(func, types, args, kwargs)
        wrapper = _wrap_same_shapes(results)
        return combined(results, None) if wrapper is None else wrapper

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Enter the mode again inside its own dispatch. LocalTensorMode would enter a new mode,
        which replaces the methods of DeviceMesh a second time."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _on_each(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int, Any]:
        """Run an operation once for each rank. Returns the results by rank."""
        ranks = self.in_order
        columns = [_column(x, ranks) for x in args]
        if not kwargs:
            return {rank: func(*xs) for rank, *xs in zip(ranks, *columns)}
        named = zip(*(_column(x, ranks) for x in kwargs.values()))
        return {
            rank: func(*xs, **dict(zip(kwargs, ys)))
            for ys, (rank, *xs) in zip(named, zip(ranks, *columns))
        }


_RETURNED = ["Tensor", "List[Tensor]", "int", "SymInt", "List[int]", "List[SymInt]", "bool"]
_KNOWN = {LocalTensor, torch.Tensor, torch.nn.Parameter}
_SAME_ON_ALL = {bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout}
_SAME_ON_ALL |= {torch.memory_format, torch.Tensor, torch.nn.Parameter}

# Operations that torch builds of other operations, which the mode must see.
_MADE_OF_OTHERS = {
    torch.ops._c10d_functional._wrap_tensor_autograd.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
}


def _offset(x: LocalTensor) -> int | torch.SymInt | None:
    """Return the storage offset that all ranks share, or None."""
    offsets = {y.storage_offset() for y in x._local_tensors.values()}
    return offsets.pop() if len(offsets) == 1 else None


def _strides(x: LocalTensor) -> list[int] | None:
    """Return the strides that all ranks share, or None."""
    strides = {y.stride() for y in x._local_tensors.values()}
    return list(strides.pop()) if len(strides) == 1 else None


_ABOUT_A_SHAPE: dict[Any, Callable[[LocalTensor], Any]] = {
    torch.ops.aten.dim.default: lambda x: len(x._size),
    torch.ops.aten.sym_size.default: lambda x: tuple(x._size),
    torch.ops.aten.sym_storage_offset.default: _offset,
    torch.ops.aten.sym_stride.default: _strides,
}


def _flat(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _flat(x)


def _column(x: Any, ranks: list[int]) -> Sequence[Any]:
    """Return the value of one argument for each rank."""
    if type(x) is LocalTensor:
        return [x._local_tensors[rank] for rank in ranks]
    if type(x) in _SAME_ON_ALL:
        return [x] * len(ranks)
    if type(x) not in (list, tuple):
        return [on_rank(x, rank) for rank in ranks]
    if all(type(y) in _SAME_ON_ALL for y in x):
        return [x] * len(ranks)
    return [type(x)(ys) for ys in zip(*(_column(y, ranks) for y in x))]


_FAKE = {FakeTensor}
_FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE


def _on_fake_tensors(kinds: set[type]) -> bool:
    """Whether a FakeTensorMode is to see an operation that no rank has a value for."""
    return kinds <= _FAKE and torch._C._get_dispatch_mode(_FAKE_MODE) is not None


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
def _effect(func: Any) -> str | None:
    """Return "writes" for an operation of torch itself that writes to its first argument alone and
    returns this argument, and "pure" for one that writes to none and returns tensors or integers.
    Both draw no random number and take tensors by position alone. None: any other operation."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return None
    if (
        torch.Tag.nondeterministic_seeded in func.tags
        or torch.Tag.inplace_view in func.tags
        or func.overloadpacket is torch.ops.aten.hash_tensor
        or len((schema := func._schema).returns) != 1
        or str(schema.returns[0].type) not in _RETURNED
        or any("Tensor" in str(x.type) for x in schema.arguments if x.kwarg_only)
    ):
        return None
    if not schema.is_mutable:
        return "pure"
    written = [x.alias_info is not None and x.alias_info.is_write for x in schema.arguments]
    return (
        "writes" if written[0] and not any(written[1:]) and schema.returns[0].alias_info else None
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


WORLD = 1 << 10  # the size of the first fake group; DTensor takes longer in a larger one


def join_fake_group(size: int) -> None:
    """Make this process rank 0 of a group of at least so many processes, which sends nothing.

    torch keeps plans of redistributions with the names of a mesh's groups, also when the groups are
    gone. So the first group is large, and a mesh of more than ``WORLD`` ranks is the last that this
    process can use."""
    if dist.is_initialized() and dist.get_world_size() < size:
        dist.destroy_process_group()
        _mesh.cache_clear()
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=max(size, WORLD), store=FakeStore())


@cache
def _mesh(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Build each mesh once. DTensor plans redistributions per mesh, and two meshes are equal only
    if they are the same object."""
    size = math.prod(n for _, n in axes)
    join_fake_group(size)
    ranks = torch.arange(size).view([n for _, n in axes])
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(a for a, _ in axes))
