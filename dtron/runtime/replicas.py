"""Compares the ranks that hold the same shard, bit by bit: a GPU or a memory that computes or keeps
wrong bits is found before its rank spoils the run (silent data corruption: Dixit et al. 2021,
arXiv:2102.11245).

A weight, and each tensor of its optimizer state, is whole along some mesh axes: dp_replicate, or tp
for a norm, or all axes with ZeRO-0. Ranks along such an axis hold the same bits, because they
compute the same sums. So each rank hashes its shards (distributed/bit_hash.py) on its device, and
adds the hashes of all tensors that are whole along an axis: one number for each axis. All ranks
send these few numbers to each other, between the hosts. Only if two ranks differ do they send the
hashes of all tensors, to name the tensor (replica_check.py).

Left out: state in host memory (``--optim.offload-state``). It may be on its way when it is hashed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.checkpoint import TrainState
from dtron.distributed.bit_hash import bit_hash, odd_weights
from dtron.distributed.redistribute import rank, to_local
from dtron.distributed.simulated_ranks import by_rank, paused
from dtron.mesh import axes_of
from dtron.training.pipeline import Pipeline
from dtron.tree import flat, with_specs

LARGEST = 2**63 - 1
TIED = "tied"  # in place of an axis: the copies of the embedding in two pipeline stages


class Entry(NamedTuple):
    """A tensor of the training state.

    ``name``: its tree and path, as ``m.blocks.0.mlp.w_up``.
    ``whole``: the mesh axes along which all ranks hold the same bits.
    ``tensor``: the tensor."""

    name: str
    whole: frozenset[str]
    tensor: Tensor


def entries(state: TrainState, pipe: Pipeline) -> list[Entry]:
    """Return the tensors of the weights and of the optimizer state that another rank has too. A GPU
    does not check tensors in the memory of its host."""
    tied = {w.path for spec in pipe.specs for w in flat(spec) if w.twin}
    found = []
    for kind, tree in {"params": state.params, **state.opt.trees}.items():
        for w, x in with_specs(pipe.spec, tree):
            whole = {TIED} if w.path in tied else set[str]()
            if isinstance(x, DTensor):
                if to_local(x).device.type != x.device_mesh.device_type:
                    continue
                axes = zip(axes_of(x.device_mesh), x.placements, strict=True)
                whole |= {axis for axis, p in axes if p.is_replicate()}
            if whole:
                found.append(Entry(f"{kind}.{w.path}", frozenset(whole), x))
    return found


def hashes(found: Sequence[Entry], weights: Tensor) -> dict[int, Tensor]:
    """Return ``{rank: hashes}``: for this rank, or for each simulated rank, the hash of each
    tensor, ``[tensors]`` int64 on the device.

    ``weights``: see ``bit_hash``."""
    every: dict[int, list[Tensor]] = defaultdict(list)
    for entry in found:
        for r, part in by_rank(to_local(entry.tensor), rank()).items():
            with paused():
                every[r].append(bit_hash(part, weights))
    with paused():
        return {r: torch.stack(own) for r, own in every.items()}


def factors(found: Sequence[Entry], axes: Sequence[str], device: torch.device | str) -> Tensor:
    """Return the factors that join hashes: ``[axes, tensors]`` int64, an odd number if the tensor
    is whole along the axis, else 0."""
    is_whole = [[axis in entry.whole for entry in found] for axis in axes]
    odd = odd_weights(len(found)).expand(len(axes), -1)
    return (odd * torch.tensor(is_whole, dtype=torch.int64).view(odd.shape)).to(device)


def joined(own: Tensor, factor: Tensor) -> Tensor:
    """Join the hashes of all tensors that are whole along an axis: ``[axes]`` int64, one sum for
    each axis. The host does not wait."""
    return (own * factor).sum(1)


def differ(sizes: Mapping[str, int], axes: Sequence[str], table: Tensor) -> bool:
    """Whether two ranks differ that hold the same shards.

    ``sizes``: the mesh axes of all ranks, outermost first.
    ``table``: the numbers of ``joined`` of all ranks, ``[ranks, axes]`` int64. A 0 of ``TIED`` is
        of a rank without such a tensor."""
    grid, dims = table.view(*sizes.values(), len(axes)), list(sizes)
    for axis, x in zip(axes, grid.unbind(-1), strict=True):
        low = high = x
        if axis == TIED:
            if "pp" not in sizes:
                continue
            low, high = (x.masked_fill(x == 0, end) for end in (LARGEST, -LARGEST))
        dim = dims.index("pp" if axis == TIED else axis)
        if bool((low.amin(dim) < high.amax(dim)).any()):
            return True
    return False


def coordinate(sizes: Mapping[str, int], r: int) -> dict[str, int]:
    """Return the place of a rank along each mesh axis."""
    place = {}
    for axis, n in reversed([*sizes.items()]):
        r, place[axis] = divmod(r, n)
    return place


class Difference(NamedTuple):
    """A tensor that is not the same on all ranks that should have it.

    ``odd``: the ranks that are not of the majority; without a majority, all ranks.
    ``others``: the other ranks."""

    name: str
    odd: tuple[int, ...]
    others: tuple[int, ...]


def differences(
    sizes: Mapping[str, int],
    found: Mapping[int, Sequence[tuple[str, frozenset[str], int]]],
) -> list[Difference]:
    """Return the tensors that differ.

    ``found``: of each rank, the name, the axes and the hash of each tensor."""
    groups: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for r, own in found.items():
        place = coordinate(sizes, r)
        for name, whole, value in own:
            cut = tuple(i for axis, i in place.items() if axis not in whole and axis != "pp")
            groups[name, cut].append((r, value))
    different = []
    for (name, _), members in groups.items():
        counts = Counter(value for _, value in members).most_common(2)
        if len(counts) == 1:
            continue
        majority = counts[0][0] if counts[0][1] > counts[1][1] else None
        odd = dict.fromkeys(r for r, value in members if value != majority)
        others = dict.fromkeys(r for r, value in members if value == majority)
        different.append(Difference(name, tuple(odd), tuple(others)))
    return different


def describe(different: Sequence[Difference], names: Sequence[str]) -> str:
    """Say which rank has another value of which tensor.

    ``names``: of each rank, its number, host and device."""
    first = different[0]
    more = f" ({len(different)} tensors differ)" if len(different) > 1 else ""
    odd = " and ".join(names[r] for r in first.odd[:4])
    if not first.others:
        return f"{first.name} differs between {odd}{more}"
    same = ", ".join(map(str, first.others[:8])) + (", ..." if first.others[8:] else "")
    many = "s" if len(first.others) > 1 else ""
    return f"{first.name} on {odd} differs from the same shard on rank{many} {same}{more}"
