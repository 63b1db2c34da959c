"""Lab 1: the shard of a tensor on a rank, from placements alone. The answers are compared with real
DTensors on simulated ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import shard
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.rules import RULES, place

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A tensor on a mesh.

    ``what``: what is special about the case."""

    what: str
    shape: Shape
    mesh: str
    placements: tuple[Placement, ...]

    @property
    def sizes(self) -> Shape:
        """The size of each mesh axis."""
        return tuple(MeshShape.parse(self.mesh).atoms.values())

    @property
    def ranks(self) -> list[tuple[int, Shape]]:
        """Every rank with its index along each mesh axis."""
        return list(enumerate(product(*map(range, self.sizes))))

    def __str__(self) -> str:
        axes = tuple(MeshShape.parse(self.mesh).atoms)
        by_axis = ", ".join(f"{a}: {_short(p)}" for a, p in zip(axes, self.placements, strict=True))
        return f"{self.what}: shape {self.shape} on {self.mesh} ({by_axis})"


def _short(p: Placement) -> str:
    return f"Shard({p.dim})" if isinstance(p, Shard) else type(p).__name__


R, S0, S1 = Replicate(), Shard(0), Shard(1)
VISIBLE = (
    Case("even shards", (12, 8), "dp=2,tp=4", (S0, S1)),
    Case("a replicated axis", (12, 8), "dp=2,tp=4", (R, S0)),
    Case("uneven shards", (10, 6), "dp=4", (S0,)),
    Case("a pending sum", (6, 4), "dp=2,tp=2", (S0, Partial())),
    Case("two axes on one dim", (10, 3), "dp=2,tp=2", (S0, S0)),
)
HIDDEN = (
    Case("uneven shards", (7, 5), "dp=3,tp=2", (S0, S1)),
    Case("empty shards", (3, 2), "dp=2,tp=4", (R, S0)),
    Case("empty shards", (5, 2), "dp=4", (S0,)),
    Case("two axes on one dim", (4, 11), "dp=4,tp=2", (S1, S1)),
    Case("a pending sum", (5, 9), "dp_replicate=2,dp=2,tp=2", (Partial(), S1, S0)),
    Case("three dims", (2, 9, 5), "dp=2,tp=2", (Shard(2), S1)),
)

# Plausible mistakes: the shard of dim ``size`` on rank ``i`` of ``n``, and the reason.
Split = Callable[[int, int, int], tuple[int, int]]
MISTAKES: dict[str, Split] = {
    "size // n loses the rest of the division; a shard has ceil(size / n)": (
        lambda size, n, i: (i * (size // n), (i + 1) * (size // n))
    ),
    "the rest is not spread over the first ranks; the last ranks have less": (
        lambda size, n, i: (
            i * (size // n) + min(i, size % n),
            (i + 1) * (size // n) + min(i + 1, size % n),
        )
    ),
    "the last ranks have fewer elements, or none": (
        lambda size, n, i: (i * -(-size // n), (i + 1) * -(-size // n))
    ),
}


def predictions(module: ModuleType) -> None:
    """Compare the predictions by hand with the placements of RULES."""
    given = answer(module, "PREDICTIONS")
    for name, (mesh, shape, axes, rank) in QUESTIONS.items():
        got = given.get(name)
        if got is None:
            raise Wrong(f"PREDICTIONS has no answer for {name!r}: the shape on rank {rank}")
        if not isinstance(got, tuple):
            raise Wrong(f"PREDICTIONS has {got!r} for {name!r}; a shape is a tuple, as (384,)")
        names = tuple(MeshShape.parse(mesh).atoms)
        case = Case(name, shape, mesh, place(RULES, names, *axes))
        want = tuple(_shards(case)[rank].shape)
        if tuple(got) != want:
            raise Wrong(f"{case}: rank {rank} has {want}, and your prediction is {tuple(got)}")


QUESTIONS: dict[str, tuple[str, Shape, tuple[str, ...], int]] = {
    "w_up": ("dp=2,tp=4", (384, 1280), ("embed", "mlp"), 5),
    "w_down": ("dp=2,tp=4", (1280, 384), ("mlp", "embed"), 5),
    "scale": ("dp=2,tp=4", (384,), ("act_embed",), 5),
    "x_TD": ("dp=2,tp=4", (1024, 384), ("tokens_sp", "act_embed"), 5),
    "x_TD inside a layer": ("dp=2,tp=4", (1024, 384), ("tokens", "act_embed"), 5),
    "w_vocab": ("tp=3", (256, 384), ("vocab", "embed"), 2),
}


def shapes(cases: Sequence[Case]) -> Callable[[ModuleType], None]:
    """Make a check of ``local_shape`` on every rank."""

    def check(module: ModuleType) -> None:
        local_shape = answer(module, "local_shape")
        for case in cases:
            shards, sizes = _shards(case), case.sizes
            got = {r: local_shape(case.shape, sizes, case.placements, at) for r, at in case.ranks}
            for rank, shape in got.items():
                want = tuple(shards[rank].shape)
                if tuple(shape) != want:
                    said = f"rank {rank} has {want}, and local_shape says {shape}"
                    raise Wrong(f"{case}: {said}{_why(case, list(got.values()))}")

    return check


def offsets(cases: Sequence[Case]) -> Callable[[ModuleType], None]:
    """Make a check of ``local_offset``: the elements from the offset on are those of the rank."""

    def check(module: ModuleType) -> None:
        local_offset = answer(module, "local_offset")
        for case in cases:
            shards = _shards(case)
            for rank, at in case.ranks:
                got = tuple(local_offset(case.shape, case.sizes, case.placements, at))
                if not shards[rank].numel():
                    continue  # an empty shard begins nowhere
                first = shards[rank].flatten()[0]
                want = tuple(int(i) for i in torch.unravel_index(first, case.shape))
                if got != want:
                    shard = f"the shard of rank {rank}, with shape {tuple(shards[rank].shape)}"
                    raise Wrong(f"{case}: {shard}, begins at {want}, and local_offset says {got}")

    return check


def _shards(case: Case) -> dict[int, torch.Tensor]:
    """Shard the numbers of the flat indices as DTensor does, and return the shard of each rank."""
    whole = torch.arange(torch.Size(case.shape).numel()).view(case.shape)
    kept = tuple(R if p.is_partial() else p for p in case.placements)  # a summand has all elements
    with simulated(MeshShape.parse(case.mesh)) as mesh:
        assert mesh is not None  # every case has two ranks or more
        x = shard(whole, mesh, kept)
        assert isinstance(x, DTensor)
        return by_rank(x.to_local(), 0)


def _why(case: Case, got: Sequence[Shape]) -> str:
    """Name the mistake that gives these shapes, if it is a known one."""
    for why, split in MISTAKES.items():
        if [_split(case, split, at) for _, at in case.ranks] == [tuple(x) for x in got]:
            return f" ({why})"
    if any(p.is_partial() for p in case.placements):
        return " (Partial splits nothing: every rank has a summand of the whole shape)"
    return ""


def _split(case: Case, split: Split, at: Shape) -> Shape:
    shape = list(case.shape)
    for p, n, i in zip(case.placements, case.sizes, at, strict=True):
        if isinstance(p, Shard):
            start, stop = split(shape[p.dim], n, i)
            shape[p.dim] = stop - start
    return tuple(shape)


LAB = Lab(
    1,
    "placements",
    (
        Part("predictions", 2, predictions),
        Part("local_shape", 2, shapes(VISIBLE)),
        Part("local_offset", 2, offsets(VISIBLE)),
        Part("local_shape, other cases", 2, shapes(HIDDEN), hidden=True),
        Part("local_offset, other cases", 2, offsets(HIDDEN), hidden=True),
    ),
)
