"""Collectives as copies, on real gloo ranks: equal to gloo's own, alone and in training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.tree import flat
from tests.helpers.pool import RANKS
from tests.helpers.runs import MODEL, train
from tests.helpers.switched_group import MUTANTS, copying
from tests.helpers.values import ADAMW

pytestmark = pytest.mark.xdist_group("pool")

OPS = torch.ops._c10d_functional


def collectives_on_pool(mode: str, seed: int) -> tuple[list[bool], int]:
    """A job for the pool: whether each collective of a list gives gloo's result, and how many were
    copies.

    The last flag: no memory was written before other ranks had read it."""
    rank, random = dist.get_rank(), torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=random))
    with copying(mode, 2**12) as (_, group):
        world = dist.group.WORLD.group_name
        name, same = group.group_name, []
        sizes = [(draw(9), draw(9)) for _ in range(4)] + [
            (64, 48)
        ]  # the last is larger than the stage
        dtypes = [torch.float32, torch.bfloat16, torch.int64]
        values = [
            torch.randn(n, m, generator=torch.Generator().manual_seed(seed + rank + 10 * i)).mul(99)
            for i, (n, m) in enumerate(sizes)
        ]
        weights = [v.to(dtypes[i % 3]) for i, v in enumerate(values)]
        memory, near = torch.zeros(len(weights) * 2**13, dtype=torch.uint8), []
        for w, room in zip(weights, memory.split(2**13), strict=True):
            near.append(room[: w.nbytes].view(w.dtype).view(w.shape).copy_(w))
        group.register(memory)
        rows = [
            w.repeat(RANKS - 1, 1, 1) + torch.arange(RANKS - 1)[:, None, None] + 9 * rank
            for w in weights
        ]
        for x in [*weights, *near, *rows]:
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(x, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        one_each = [int(i != rank) for i in range(RANKS)]
        swap = lambda x, g: OPS.all_to_all_single(x, one_each, one_each, g)
        for x in rows:
            both = [OPS.wait_tensor(swap(x, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        for order in (1, -1):  # several in flight, with waits in any order
            swaps = lambda g: [swap(x, g) for x in rows]
            pairs = list(zip(swaps(world), swaps(name), strict=True))[::order]
            same += [torch.equal(*map(OPS.wait_tensor, pair)) for pair in pairs]
        uneven = [[draw(3) for _ in range(RANKS)] for _ in range(RANKS)]  # [sender][receiver]
        # For rank 0 alone, the split sizes equal those of an exchange of gradient shards. Here the
        # exchange is of rows of experts.
        uneven[0], uneven[1:] = [0] + [1] * (RANKS - 1), [[1, *row[1:]] for row in uneven[1:]]
        sent, received = uneven[rank], [row[rank] for row in uneven]
        x = torch.randn(sum(sent), 3, generator=torch.Generator().manual_seed(rank))
        both = [OPS.wait_tensor(OPS.all_to_all_single(x, received, sent, g)) for g in (world, name)]
        same.append(torch.equal(*both))
        both = [OPS.wait_tensor(OPS.all_reduce(x[:3], "sum", g)) for g in (world, name)]
        same.append(torch.equal(*both))
        for w in near:  # weights are updated, and gathered again
            w.add_(1)
        group.publish()
        for w in near:
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(w, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        return [*same, not group.raced], group.copied


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_the_collectives(pool, seed):
    for same, copied in pool.run(collectives_on_pool, "copies", seed):
        assert [i for i, x in enumerate(same) if not x] == [] and copied >= 20


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_notices(pool, mutant):
    assert not all(all(same) for same, _ in pool.run(collectives_on_pool, mutant, 0))


def training_on_pool(mode: str, embed: int) -> tuple[list[float], list[float], bool, int, bool]:
    """A job for the pool: a run under ZeRO-3 with compute copies in bfloat16.

    Returns losses, norms, whether memory was written too early, the number of copies, and whether
    weights are in symmetric memory."""
    model = replace(MODEL, embed=embed)
    config = RunConfig(model=model, batch=8, steps=2, zero=3, data=DataConfig(seq_len=8))
    with copying(mode, 2**16) as (mesh, group):
        history = train(
            Layout(mesh, rules_for(3), compute=torch.bfloat16), MeshShape(dp=RANKS), config
        )
        return (
            history.losses,
            history.norms,
            group.raced,
            group.copied,
            group._registered is not None,
        )


@cache
def trained(pool, mode: str, embed: int = 24) -> tuple[list[float], list[float], bool, int, bool]:
    """The result of rank 0. Several tests use the run without copies ("rest")."""
    return pool.run(training_on_pool, mode, embed)[0]


@pytest.mark.parametrize(("embed", "in_reach"), [(24, True), (26, False)])
def test_training_is_the_same_to_the_last_bit(pool, embed, in_reach):
    """Shards of equal size are read directly from the memory of other ranks. Shards of unequal size
    are padded first, so they go through the staging buffer."""
    want, got = (trained(pool, mode, embed) for mode in ("rest", "copies"))
    assert got[:3] == want[:3] and got[4] == in_reach and want[3] == 0
    assert got[3] >= 2 * MODEL.layers * 7 * 2  # at least two gathers of each matrix a step


@pytest.mark.parametrize("mutant", MUTANTS[:-1])
def test_training_that_goes_wrong_is_noticed(pool, mutant):
    want, got = (trained(pool, mode) for mode in ("rest", mutant))
    assert got[:3] != want[:3]


BLOCK = replace(MODEL, layers=1)


def compiled_on_pool(modes: list[str]) -> tuple[list[list[float]], list[int]]:
    """A job for the pool: losses and weight norms of two compiled steps under ZeRO-3, and the
    number of copies, for each mode."""
    torch.compiler.reset()
    rows, histories, copies = torch.arange(8 * 17).view(8, 17) % 61, [], []
    for mode in modes:
        with copying(mode, 2**16) as (mesh, group):
            layout = Layout(mesh, rules_for(3), compute=torch.bfloat16)
            pipe = one_stage(BLOCK, 1, layout)
            functions = compiled(program(BLOCK, layout, splits=False), layout, backend="aot_eager")
            params = init(pipe.spec, BLOCK.dims(), 0, layout)
            opt = init_state(ADAMW, pipe.spec, params)
            opt = with_compute_copies(opt, params, pipe.spec, layout.compute)
            step, found = TrainStep(functions, pipe, RunConfig(model=BLOCK, zero=3), ADAMW), []
            for _ in range(2):
                loss, _, _, params, opt = step(params, opt, [make_batch(rows, layout)], 128, 1e-2)
                found += [full(loss).item(), *(full(w).norm().item() for w in flat(params))]
            histories.append(found)
            copies.append(group.copied)
    return histories, copies


def test_a_compiled_step_is_the_same_to_the_last_bit(pair):
    (want, got, mutant), (none, some, _) = pair.run(
        compiled_on_pool, ["rest", "copies", "one place"]
    )[0]
    assert got == want != mutant
    assert none == 0 and some > 2 * 7
