"""Lab 9: optimizers. The student's owners, their bytes and their orthogonal matrices are compared
with dtron, with arithmetic, and with a singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer, caught

Costs = tuple[int, ...]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)


def polar(x: Tensor) -> Tensor:
    """Return x with all singular values set to 1."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


def costs(module: ModuleType) -> None:
    """Compare ``cost`` with the multiplications of x x^T."""
    cost = answer(module, "cost")
    for rows, columns in ((4, 6), (6, 4), (3, 1000)):
        want = rows * columns * min(rows, columns)
        if (got := cost(rows, columns)) != want:
            raise Wrong(f"a matrix of {rows} x {columns} costs {want}, and you say {got}")


def dealing(cases: Sequence[tuple[Costs, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``deal``: every matrix once, and the busiest rank."""

    def check(module: ModuleType) -> None:
        deal = answer(module, "deal")
        for work, ranks in cases:
            what = f"costs {list(work)} on {ranks} ranks"
            got = [list(own) for own in deal(list(work), ranks)]
            if len(got) != ranks or sorted(i for own in got for i in own) != [*range(len(work))]:
                raise Wrong(f"{what}: every matrix must have one owner, and you have {got}")
            load = [0] * ranks
            for c in sorted(work, reverse=True):
                load[load.index(min(load))] += c
            mine = [sum(work[i] for i in own) for own in got]
            if max(mine) > max(load):
                raise Wrong(
                    f"{what}: your ranks have the work {mine}, and the busiest can have {max(load)}"
                )

    return check


def messages(cases: Sequence[tuple[int, int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``sent``: matrices of one shape, sharded and dealt evenly."""

    def check(module: ModuleType) -> None:
        sent = answer(module, "sent")
        for matrices, size, ranks in cases:
            shards = matrices * size / ranks  # bytes of a rank's shards
            want = 2 * shards * (ranks - 1) / ranks, matrices * size * (ranks - 1) / ranks
            for name, g, w in zip(
                ("owners", "an all-gather"), sent(matrices, size, ranks), want, strict=True
            ):
                if g != w:
                    raise Wrong(
                        f"{matrices} matrices of {size} bytes on {ranks} ranks: with {name} a rank "
                        f"sends {w:g} bytes, and you say {g:g}"
                    )

    return check


def orthogonal(cases: Sequence[tuple[int, ...]]) -> Callable[[ModuleType], None]:
    """Make a check of ``orthogonalized``, on matrices and stacks of matrices."""

    def check(module: ModuleType) -> None:
        orthogonalized = answer(module, "orthogonalized")
        for shape in cases:
            x = normal(*shape)
            got, want = orthogonalized(x), polar(x)
            if got.shape != want.shape:
                raise Wrong(f"{list(shape)}: the result has the shape {list(got.shape)}")
            error = (got - want).abs().max().item()
            if not error < 1e-6:
                values = torch.linalg.svdvals(torch.nan_to_num(got, 0.0, 0.0, 0.0)).flatten()
                raise Wrong(
                    f"{list(shape)}: the result is wrong by {error:.1e}; its singular values go "
                    f"from {values.min():.2g} to {values.max():.2g}"
                )

    return check


def steps(cases: Sequence[tuple[int, int, int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``update``: shards of all ranks in, shards of the whole results out."""

    def check(module: ModuleType) -> None:
        update = answer(module, "update")
        for ranks, matrices, rows, columns in cases:
            whole = normal(matrices, rows, columns)
            owners = [[*range(r, matrices, ranks)] for r in range(ranks)]
            _compare(update, whole, owners)

    return check


Update = Callable[[list[list[Tensor]], list[list[int]], Callable[[Tensor], Tensor]], object]


def _compare(update: Update, whole: Tensor, owners: list[list[int]]) -> None:
    ranks, seen = len(owners), []

    def count(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return polar(x)

    shards = [[m.chunk(ranks)[r] for m in whole] for r in range(ranks)]
    got: object = update(shards, owners, count)
    what = f"{len(whole)} matrices of {whole.shape[1]} x {whole.shape[2]} on {ranks} ranks"
    if not isinstance(got, list) or [len(own) for own in got] != [len(whole)] * ranks:
        raise Wrong(f"{what}: every rank gets a shard of every matrix")
    if bad := [s for s in seen if s != tuple(whole.shape[1:])]:
        raise Wrong(f"{what}: a matrix of {bad[0][0]} x {bad[0][1]} is made orthogonal: a shard")
    if len(seen) != len(whole):
        raise Wrong(f"{what}: {len(seen)} are made orthogonal in all; each only on its owner")
    for rank, own in enumerate(got):
        for i, shard in enumerate(own):
            want = polar(whole[i]).chunk(ranks)[rank]
            if shard.shape != want.shape or (shard - want).abs().max() > 1e-9:
                raise Wrong(f"{what}: rank {rank} has a wrong shard of matrix {i}")


def _of_shards(x: Tensor, ranks: int) -> Tensor:
    return torch.cat([polar(part) for part in x.chunk(ranks)])


def _of_columns(x: Tensor, ranks: int) -> Tensor:
    return torch.cat([polar(part) for part in x.chunk(ranks, 1)], 1)


def _normed(x: Tensor, ranks: int) -> Tensor:
    return x / torch.linalg.matrix_norm(x, 2)


def _rows_normed(x: Tensor, ranks: int) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _whole(x: Tensor, ranks: int) -> Tensor:
    return polar(x)


def _squeezed(x: Tensor, ranks: int) -> Tensor:
    """Wrong if the matrix has more rows than columns."""
    return polar(x) if x.shape[0] <= x.shape[1] else _rows_normed(x, ranks)


def test_of_the_student(module: ModuleType) -> None:
    mutants = (_of_shards, _of_columns, _normed, _rows_normed, _squeezed)
    caught(answer(module, "check_update"), [(_whole,)], [(m,) for m in mutants])


LAB = Lab(
    9,
    "optimizers",
    (
        Part("cost", 1, costs),
        Part("deal", 2, dealing((((8, 8, 8, 8), 2), ((7, 1, 2, 8), 2)))),
        Part("sent", 2, messages(((8, 96, 4), (6, 60, 2)))),
        Part("orthogonalized", 2, orthogonal(((4, 6), (6, 4)))),
        Part("update", 2, steps(((2, 4, 4, 6),))),
        Part("deal, other sizes", 1, dealing((((5, 5, 4, 4, 3, 3), 3), ((9, 1), 4))), hidden=True),
        Part("orthogonalized, stacks", 1, orthogonal(((3, 2, 5), (2, 5, 3))), hidden=True),
        Part("update, other sizes", 1, steps(((3, 5, 6, 4), (4, 2, 8, 3))), hidden=True),
        Part("check_update", 5, test_of_the_student, hidden=True),
    ),
)
