"""Context parallelism: one step on ranks that have parts of sequences is one device's; mutants of
every piece; and what it sends, to the byte."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed import bucketing, collectives
from dtron.distributed.mesh_shape import MeshShape
from dtron.layers import ring_attention
from dtron.layers.attention_kernels import attention_and_lse
from dtron.layers.context_parallel import ContextParallelMask
from dtron.mesh import Layout, build_mesh
from dtron.model.batch import make_batch
from dtron.params import init
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.runtime.generation import Sampling, generate
from dtron.runtime.validate import check, sequence_unit
from dtron.testing import assert_caught, meshes
from dtron.tools import verify_step
from dtron.tools.compare_steps import StepResult, compare
from dtron.tools.count_collectives import Collective
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from dtron.training.pipeline import one_stage
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, on_pool, simulate, train
from tests.model.test_equivalence import model_config

METHODS = ("ring", "allgather", "ulysses")


def configured(
    mesh: str, method: str = "ring", group: int = 2, kv: int = 1, **choices
) -> RunConfig:
    """Whose kv heads are ``kv`` a rank, under ulysses a multiple of cp."""
    shape = MeshShape.parse(mesh)
    heads = kv * shape.tp * (shape.cp if method == "ulysses" else 1)
    documents = choices.pop("documents", False)
    seq_len = sequence_unit(shape, zigzag=True) * math.ceil(12 / sequence_unit(shape, zigzag=True))
    choices = (
        dict(
            heads=heads * group, kv_heads=heads, context=64, batch=2 * shape.data, cp_method=method
        )
        | choices
    )
    data = DataConfig(seq_len=seq_len, document_mask=documents)
    return replace(model_config(mesh, 1, **choices), data=data)


def assert_same_step(config: RunConfig, mutate=lambda layout: layout) -> StepResult:
    alone = replace(on_one_device(config), recompute="none", micro_batch=None)
    want = one_step(alone, MeshShape())
    got = one_step(config, MeshShape.parse(config.mesh), mutate)
    loss, rows = compare(want, got)
    assert loss <= 1e-9
    for row in rows:
        assert row.grad <= 1e-9 and row.weight <= 1e-9, row
    return got


CHOICES = dict(
    mesh=meshes(8, ("dp", "cp", "tp")).filter(lambda mesh: "cp" in mesh), method=st.sampled_from(METHODS),
    zigzag=st.sampled_from(["on", "off"]), documents=st.booleans(), group=st.sampled_from([1, 2, 3]),
    kv=st.sampled_from([1, 2]), window=st.sampled_from([None, None, 3, 7]), sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 2.0]), attention_kernel=st.sampled_from(["auto", "reference"]),
    zero=st.sampled_from([0, 1, 2, 3]), recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99), learned=st.booleans(),
)  # fmt: skip

FEW = {**CHOICES, "mesh": meshes(6, ("dp", "cp", "tp")).filter(lambda mesh: "cp" in mesh)}


def one_case(mesh, learned, **choices):
    choices |= {"positions": "learned"} if learned else {}
    assert_same_step(configured(mesh, **choices))


test_a_step_is_that_of_one_device = settings(max_examples=examples(2))(given(**FEW)(one_case))
test_many_steps_are_those_of_one_device = pytest.mark.slow(
    settings(max_examples=100)(given(**CHOICES)(one_case))
)


@pytest.mark.parametrize("zigzag", ["on", "off"])
def test_the_fused_ring_on_three_ranks(zigzag):
    """With two, no chunk is passed on twice, and no rank is between others."""
    assert_same_step(configured("cp=3", zigzag=zigzag))


def test_with_a_pipeline():
    assert_same_step(
        configured("pp=2,cp=2", layers=2, batch=4, micro_batch=1, zero=3, documents=True)
    )


# ---- mutants


def changed(name: str, **places):
    """A batch in which a field is that of contiguous order, or of no document."""
    make = make_batch

    def wrong(rows, layout, *others, **choices):
        batch = make(rows, layout, *others, **choices)
        if layout.mesh is None:
            return batch
        contiguous = make(rows, layout, *others, **{**choices, "zigzag": False})
        return replace(batch, **{name: getattr(contiguous, name)})

    return mock.patch.object(verify_step, "make_batch", wrong)


def merged_without_rescaling(a, b):
    seen = (~b[1].isinf())[..., None]
    return a[0] + b[0] * seen, torch.logaddexp(a[1], b[1])


def forgets(which: int):
    """The n-th shift brings nothing."""
    calls = count(1)

    def shift(x: Tensor, *ring, by: int = 1) -> Tensor:
        return torch.zeros_like(x) if next(calls) == which else collectives.shift(x, *ring, by=by)

    return mock.patch.object(ring_attention, "shift", shift)


def unsummed_gradients():
    """Of what was gathered."""
    scatter = collectives._reduce_scatter
    return mock.patch.object(
        collectives, "_reduce_scatter", lambda x, ranks: scatter(x, ranks) * 0.5
    )


MUTANTS = {
    "positions left in order": ({}, changed("positions_T"), None),
    "targets left in order": ({}, changed("targets_T"), None),
    "documents ignored": (
        {"documents": True},
        mock.patch.object(
            ring_attention,
            "attention_and_lse",
            lambda q, k, v, documents, *rest: attention_and_lse(q, k, v, None, *rest),
        ),
        None,
    ),
    "a merge without rescaling": (
        {},
        mock.patch.object(ring_attention, "merge", merged_without_rescaling),
        None,
    ),
    "a block too many skipped": (
        {},
        mock.patch.object(
            ContextParallelMask, "later", property(lambda c: torch.ones(2, dtype=torch.bool))
        ),
        None,
    ),
    "a block too few skipped": (
        {},
        mock.patch.object(
            ContextParallelMask, "later", property(lambda c: torch.zeros(2, dtype=torch.bool))
        ),
        None,
    ),
    "pairs of the wrong half": (
        {},
        mock.patch.object(
            ring_attention,
            "_pairs",
            lambda x, late, first: torch.cat([x.chunk(2, dim=2)[first], x.chunk(2, dim=2)[1]]),
        ),
        None,
    ),
    "keys that never come": ({}, forgets(1), None),
    "keys that never come in backward": ({}, forgets(2), None),
    "gradients of keys that never come home": ({}, forgets(3), None),
    "gathered gradients not summed": ({"method": "allgather"}, unsummed_gradients(), None),
    "a row out of order": ({"method": "ulysses", "zigzag": "on"}, changed("zigzag"), None),
    "the wrong rank's sinks": (
        {"method": "ulysses", "sinks": True},
        None,
        lambda layout: ShiftedPlaces(layout.mesh, layout.rules),
    ),
}


class ShiftedPlaces(Layout):
    def iota(self, axis: str, size: int, device) -> Tensor:
        order = torch.arange(size, device=device)
        return self.shard(order.roll(1) if axis == "sequence" else order, axis)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    choices, patch, mutate = MUTANTS[name]
    config = configured("cp=2", seed=1, **choices)
    with patch or nullcontext():
        assert_caught(lambda: assert_same_step(config, *([mutate] if mutate else [])))


# ---- what it sends


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["auto", "reference"])
@pytest.mark.parametrize(("mesh", "recompute"), [("dp=2,cp=2", "none"), ("cp=3", "full")])
def test_bytes_and_counts_are_those_of_the_page(mesh, recompute, method, attention):
    """Of one layer and its backward: docs/context-parallelism.md. Recomputing repeats forward's.
    (ZeRO 0, because what gathers weights over dp does it over cp.)"""
    shape = MeshShape.parse(mesh)
    config = configured(mesh, method, kv=2, attention_kernel=attention, recompute=recompute, zero=0)
    m, n, again = config.model, shape.cp, 2 if recompute == "full" else 1
    got = one_step(config, shape).collectives
    tokens = config.batch * config.data.seq_len // shape.data // n  # of one rank
    kv, q = 8 * tokens * 2 * m.kv_heads * m.head_dim, 8 * tokens * m.heads * m.head_dim
    moved = {
        kind: got.bytes[Collective(kind, "cp")]
        for kind in ("all_to_all", "all_gather", "reduce_scatter")
    }
    count = {kind: got.count[Collective(kind, "cp")] for kind in moved}
    if method == "ring":
        back = (
            2 if attention == "auto" else 1
        )  # keys again, and gradients; written out, keys were kept
        hops = (again + back) * (n - 1)
        assert moved == {"all_to_all": hops * kv, "all_gather": 0, "reduce_scatter": 0}
        assert count["all_to_all"] == hops
    elif method == "allgather":
        assert moved == {"all_to_all": 0, "all_gather": again * n * kv, "reduce_scatter": n * kv}
        assert count == {"all_to_all": 0, "all_gather": again, "reduce_scatter": 1}
    else:
        assert moved == {
            "all_to_all": (again + 1) * (2 * q + kv),
            "all_gather": 0,
            "reduce_scatter": 0,
        }
        assert count["all_to_all"] == 2 * (again + 1)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_nothing_else_goes_over_cp_but_weights_and_their_gradients(zero, monkeypatch):
    """Which are those that go over dp; at stage 0, over a replica of the whole mesh too. One by
    one, because not all that can be cut by dp into equal pieces can be by both."""
    monkeypatch.setattr(bucketing, "SMALL", 0)
    config = configured("dp=2,cp=2", zero=zero, documents=True)
    over = lambda mesh, axis: {
        c.kind: n
        for c, n in one_step(config, MeshShape.parse(mesh)).collectives.count.items()
        if c.axis == axis and c.kind != "all_to_all"
    }
    want = over("dp=2", "dp") if zero else over("dp_replicate=2,dp=2", "dp_replicate")
    assert over("dp=2,cp=2", "cp") == want
    assert want.keys() == {"all_reduce", *(("all_gather", "reduce_scatter") if zero else ())}


# ---- real ranks, and the edge


CP_MODEL = replace(MODEL, heads=8, kv_heads=4)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("cp=4", "ring"),
        ("dp=2,cp=2", "ulysses"),
        pytest.param("cp=2,tp=2", "ring", marks=pytest.mark.slow),
        pytest.param("cp=2,tp=2", "allgather", marks=pytest.mark.slow),
        pytest.param("pp=2,cp=2", "ring", marks=pytest.mark.slow),
    ],
)
def test_real_ranks_have_the_losses_of_one_device(pool, mesh, method):
    config = RunConfig(
        model=CP_MODEL,
        data=DataConfig(seq_len=16),
        batch=8,
        steps=2,
        seed=3,
        cp_method=method,
        micro_batch=2,
    )
    want = train(Layout(), MeshShape(), config)
    losses, norms, initial = pool.run(on_pool, mesh, config)[0]
    assert initial == want.initial or "pp" in mesh
    assert losses == pytest.approx(want.losses, rel=1e-5) and norms == pytest.approx(
        want.norms, rel=1e-4
    )


@pytest.mark.parametrize(
    ("mesh", "seq_len", "method", "message", "fine"),
    [
        (
            "cp=2,tp=2",
            30,
            "ring",
            "data.seq_len=30 over cp=2,tp=2.*multiple of 4; use --data.seq-len 32",
            32,
        ),
        ("cp=3", 9, "ring", "two parts a rank, so.*multiple of 6; use --data.seq-len 12", 12),
        (
            "cp=8",
            16,
            "ulysses",
            "kv_heads=4, which cp must divide; use --cp-method ring.*--model.kv-heads 8",
            None,
        ),
        ("cp=2,tp=4", 16, "ulysses", "a rank has 1 of .*--model.kv-heads 8", None),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_remedy(mesh, seq_len, method, message, fine):
    shape, model = MeshShape.parse(mesh), ModelConfig()
    with pytest.raises(ValueError, match=message) as error:
        check(model, shape, seq_len, method)
    assert "\n" not in str(error.value)
    if fine:
        check(model, shape, fine, method)
    else:
        check(model, shape, seq_len, "ring")
        check(replace(model, kv_heads=8), shape, seq_len, method)


PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def generated_on_pool(mesh: str) -> list[list[int]]:
    """A job for the pool: the likeliest tokens after a few, on real ranks."""
    shape = MeshShape.parse(mesh)
    layout = Layout(build_mesh(shape, "cpu"))
    pipe = one_stage(CP_MODEL, 1, layout)
    params = init(pipe.spec, CP_MODEL.dims(), 0, layout, torch.float64)
    return generate(params, PROMPTS, 6, CP_MODEL, pipe, Sampling(0))


@pytest.mark.xdist_group("pool")
def test_generation_over_cp_says_what_one_device_says(pool):
    """Where cp cuts rows, of which there are fewer than ranks."""
    pipe = one_stage(CP_MODEL, 1, Layout())
    params = init(pipe.spec, CP_MODEL.dims(), 0, Layout(), torch.float64)
    want = generate(params, PROMPTS, 6, CP_MODEL, pipe, Sampling(0))
    assert len(set(want[0])) > 4 and pool.run(generated_on_pool, "dp=2,cp=2") == [want] * 4


def test_fp8_over_cp_follows_one_device():
    """To the rounding of FP8: a rank's scales are those of its own tokens."""
    pytest.importorskip("torchao")
    config = RunConfig(
        model=replace(CP_MODEL, embed=32, mlp=48, head_dim=8), data=DataConfig(seq_len=16), batch=8, steps=2,
        micro_batch=4, fp8="rowwise", fp8_first_last=True, fp8_min_weights=0,
    )  # fmt: skip
    want = train(Layout(), MeshShape(), config).losses
    assert simulate("cp=2", config).losses == pytest.approx(want, rel=1e-4)
    assert train(Layout(), MeshShape(), replace(config, fp8="none")).losses != pytest.approx(
        want, rel=1e-4
    )
