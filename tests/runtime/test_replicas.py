"""Ranks that hold the same shard have the same bits on every mesh, and a flipped bit is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.checkpoint import TrainState
from dtron.distributed.bit_hash import bit_hash, odd_weights
from dtron.distributed.mesh_shape import AXES, MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.replica_check import ReplicaCheck
from dtron.runtime.replicas import (
    TIED,
    Difference,
    Entry,
    describe,
    differ,
    differences,
    entries,
    factors,
    hashes,
    joined,
)
from dtron.testing import assert_caught
from dtron.tools.verify_step import compute_copies_in, plan_of, step_inputs
from dtron.training.build import build_step
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import pipeline
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, on_pool
from tests.training.test_compositions import runs

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# ---- the hash


def flip(x: Tensor, element: int, bit: int) -> None:
    """Flip a bit of a contiguous tensor in place."""
    bits = x.view(-1).view(INTEGERS[x.dtype.itemsize])
    mask = 1 << bit if bit < 8 * x.dtype.itemsize - 1 or x.dtype.itemsize == 1 else -(1 << bit)
    bits[element] ^= mask


def finds_bits_and_exchanges(dtype, n, seed, hash_of: Callable[[Tensor], Tensor]):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    x = torch.randint(0, 250, (n,), dtype=torch.uint8).repeat_interleave(dtype.itemsize)
    x = x.view(dtype)
    before = hash_of(x)
    flip(x, i := rng.randrange(n), bit := rng.randrange(8 * dtype.itemsize))
    assert hash_of(x) != before
    flip(x, i, bit)
    assert hash_of(x) == before
    bits, j = x.view(INTEGERS[dtype.itemsize]), (i + rng.choice([1, 8 // dtype.itemsize])) % n
    if bits[i] != bits[j]:
        bits[[i, j]] = bits[[j, i]]
        assert hash_of(x) != before


@given(dtype=st.sampled_from(DTYPES), n=st.integers(1, 70), seed=st.integers(0, 999))
def test_a_flipped_bit_and_an_exchange_change_the_hash(dtype, n, seed):
    finds_bits_and_exchanges(dtype, n, seed, partial(bit_hash, weights=odd_weights(16)))


def test_mutants_of_the_hash_are_caught():
    def many(hash_of):
        for seed in range(20):
            finds_bits_and_exchanges(torch.float32, 40, seed, hash_of)

    assert_caught(lambda: many(partial(bit_hash, weights=torch.ones(16, dtype=torch.int64))))
    assert_caught(lambda: many(partial(bit_hash, weights=odd_weights(16) << 40)))  # even
    assert_caught(lambda: many(lambda x: x.nan_to_num().sum()))  # of floats


def test_the_hash_is_of_the_order_of_elements_and_not_of_memory():
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    weights = odd_weights(5)
    assert bit_hash(x.T, weights) == bit_hash(x.T.contiguous(), weights) != bit_hash(x, weights)
    assert bit_hash(x[:0], weights) == 0 and len(set(weights.tolist())) == 5
    assert all(w % 2 for w in weights.tolist())


# ---- simulated ranks


def stepped(
    config: RunConfig, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, int], list[Entry], Callable]:
    """Take a step on simulated ranks. Return the mesh, the tensors of the state, and a function
    that hashes them."""
    shape, compute = MeshShape.parse(config.mesh), compute_copies_in(dtype)
    plan = plan_of(config, shape, dtype)
    with simulated(shape) as mesh:
        layout = Layout(mesh, rules_for(config.zero), compute)
        pipe = pipeline(config, shape, plan.count, config.data.seq_len, layout)
        step = build_step(config, plan, pipe)
        params, batches, tokens = step_inputs(config, pipe, plan.count, plan.master)
        opt = init_state(step.optimizer, pipe.spec, params)
        params = stored_params(params, pipe.spec, opt)
        opt = with_compute_copies(opt, params, pipe.spec, compute)
        _, _, _, params, opt = step(params, opt, batches, tokens, config.optim.lr)
        found = entries(TrainState(1, 0, params, opt), pipe)

    def tables():
        with simulated(shape):
            return hashes(found, odd_weights(1 << 10))

    sizes = {axis: n for axis, n in shape.atoms.items() if axis != "pp"}
    return sizes, found, tables


def judge(sizes, found, every, without: str = "") -> tuple[bool, list[Difference]]:
    """Judge hashes of simulated ranks. ``without``: an axis that a mutant leaves out."""
    axes = [axis for axis in sizes if axis != without]
    factor = factors(found, axes, "cpu")
    sums = torch.stack([joined(every[r], factor) for r in sorted(every)])
    listed = {
        r: [(e.name, e.whole, h) for e, h in zip(found, own.tolist(), strict=True)]
        for r, own in every.items()
    }
    return differ(sizes, axes, sums), differences(sizes, listed)


def no_false_alarm_and_no_miss(
    config: RunConfig, seed: int, without: str = "", dtype: torch.dtype = torch.float32
) -> None:
    sizes, found, tables = stepped(config, dtype)
    assert judge(sizes, found, tables(), without) == (False, [])
    rng = random.Random(seed)
    copies = [e for e in found if e.whole - {TIED}]
    for entry in rng.sample(copies, min(4, len(copies))):
        every = by_rank(to_local(entry.tensor), 0)
        r = rng.choice([r for r, x in every.items() if x.numel()] or [0])
        x = every[r]
        if not x.numel() or not x.is_contiguous():
            continue
        place = rng.randrange(x.numel()), rng.randrange(8 * x.dtype.itemsize)
        flip(x, *place)
        seen, different = judge(sizes, found, tables(), without)
        flip(x, *place)
        assert seen and {d.name for d in different} == {entry.name}
        (one,) = different
        assert one.odd == (r,) or not one.others and r in one.odd


@settings(max_examples=examples(2, thorough=40))
@given(
    config=st.sampled_from(AXES[1:]).flatmap(runs),
    name=st.sampled_from(["adamw", "muon", "lion"]),
    in_few_bits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_false_alarm_on_any_mesh_and_every_flipped_bit_is_named(config, name, in_few_bits, seed):
    """In few bits, moments are rounded at random."""
    optim = replace(config.optim, name=name)
    if in_few_bits and name == "adamw":
        optim = replace(optim, moments="bfloat16", master_weights="split", ema=0.9)
    dtype = torch.bfloat16 if in_few_bits else torch.float32
    if in_few_bits:  # the kernel of other dispatchers takes multiples of 8
        config = replace(config, moe_dispatch="static")
    no_false_alarm_and_no_miss(replace(config, optim=optim), seed, dtype=dtype)


SMALL = RunConfig(zero=3, batch=8, model=MODEL, data=DataConfig(seq_len=16))


@pytest.mark.parametrize(
    ("mesh", "axis"), [("dp_replicate=2,dp=2", "dp_replicate"), ("tp=2", "tp")]
)
def test_a_check_that_leaves_out_an_axis_is_caught(mesh, axis):
    config = replace(SMALL, mesh=mesh)
    no_false_alarm_and_no_miss(config, 0)
    assert_caught(lambda: no_false_alarm_and_no_miss(config, 0, axis))


def test_copies_of_a_tied_embedding_are_compared_over_the_pipeline():
    config = replace(SMALL, mesh="pp=2,dp=2", model=replace(MODEL, tied=True), micro_batch=2)
    sizes, found, tables = stepped(config)
    twins = [e for e in found if TIED in e.whole and e.name.startswith("params.")]
    assert len(twins) == 2 and judge(sizes, found, tables()) == (False, [])
    flip(by_rank(to_local(twins[1].tensor), 0)[1], 3, 5)
    (one,) = judge(sizes, found, tables())[1]
    assert one.name == "params.embedding.w_tokens" and 1 in one.odd
    for last, differs in ((8, True), (7, False), (0, False)):  # 0: a rank without a copy
        sums = torch.tensor([[7], [7], [7], [last]])
        assert differ({"pp": 2, "dp": 2}, [TIED], sums) == differs


def test_the_line_names_the_rank_or_the_pair():
    names = [f"rank {r} (host, cpu)" for r in range(4)]
    odd = Difference("m.norm.scale", (2,), (0, 1, 3))
    assert describe([odd], names) == (
        "m.norm.scale on rank 2 (host, cpu) differs from the same shard on ranks 0, 1, 3"
    )
    pair = Difference("m.norm.scale", (0, 2), ())
    assert describe([pair, odd], names) == (
        "m.norm.scale differs between rank 0 (host, cpu) and rank 2 (host, cpu) (2 tensors differ)"
    )


# ---- real ranks


class Watched:
    """A step that checks its replicas. One rank flips a bit of a weight after one of the steps."""

    def __init__(self, step, mesh: str, rank: int, at: int) -> None:
        self.step, self.pipe, self.rank, self.at, self.number = step, step.pipe, rank, at, 0
        self.checks = ReplicaCheck(2, step.pipe, MeshShape.parse(mesh).atoms, dist.group.WORLD)
        self.optimizer = step.optimizer

    def __call__(self, *args):
        loss, norm, reports, params, opt = self.step(*args)
        self.number += 1
        if self.number == self.at and dist.get_rank() == self.rank:
            flip(to_local(params[0].blocks[1].norm_2.scale), 3, 0)  # the lowest bit
        self.checks.launch(TrainState(self.number, 0, params, opt))
        self.checks.advance(self.number)
        if self.number == self.at + 6:
            self.checks.check(TrainState(self.number, 0, params, opt))
        return loss, norm, reports, params, opt


def flipped(mesh: str, zero: int, rank: int, at: int) -> str:
    """A job for the pool: train, and return the error."""
    config = replace(SMALL, mesh=mesh, zero=zero, steps=7)
    try:
        on_pool(mesh, config, change_step=partial(Watched, mesh=mesh, rank=rank, at=at))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.xdist_group("pool")
def test_real_ranks_find_the_rank_the_weight_and_the_step(pool):
    mesh = "dp_replicate=2,tp=2"
    assert pool.run(flipped, mesh, 1, -1, 3) == [""] * 4
    error, *others = pool.run(flipped, mesh, 1, 2, 3)
    assert others == [error] * 3
    assert error.startswith("step 4: params.blocks.1.norm_2.scale ")
    assert "rank 2 (" in error and "all ranks agreed after step 2" in error
    assert "resume from a checkpoint of step 2 or before" in error


@pytest.mark.parametrize("every", [0, 2])
def test_a_run_that_asked_for_no_checks_gets_a_warning(every, monkeypatch):
    def differ(self) -> None:
        raise UserError("step 4: w differs")

    monkeypatch.setattr(ReplicaCheck, "_hash", lambda self, state: None)
    monkeypatch.setattr(ReplicaCheck, "finish", differ)
    checks = ReplicaCheck(every, None, {}, object())
    if every:
        with pytest.raises(UserError, match="w differs"):
            checks.check(TrainState(4, 0, (), None))
    else:
        assert checks.check(TrainState(4, 0, (), None)) == ["warning: step 4: w differs"]
