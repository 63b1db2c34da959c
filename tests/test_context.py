"""Context parallelism: one step on ranks that have parts of sequences is one device's; mutants of every
piece; and what it sends, to the byte."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import MODEL, on_pool, train
from test_equivalence import model_config
from torch import Tensor
from values import close, normal, same

from dtron import verify
from dtron.checks import check, sequence_unit
from dtron.collectives import Collective
from dtron.config import DataConfig, ModelConfig, RunConfig
from dtron.layers import fused, ring
from dtron.layers.context import Context
from dtron.layers.cores import Mask, attention_and_lse, attention_reference, with_sinks
from dtron.mesh import Layout
from dtron.model import make_batch
from dtron.order import as_rows, as_tokens, row_order
from dtron.shape import MeshShape
from dtron.simulate import simulated
from dtron.testing import assert_caught, meshes
from dtron.verify import compare, on_one_device, one_step

METHODS = ("ring", "allgather", "ulysses")


def configured(mesh: str, method: str = "ring", group: int = 2, kv: int = 1, **choices) -> RunConfig:
    """Whose kv heads are ``kv`` a rank, under ulysses a multiple of cp."""
    shape = MeshShape.parse(mesh)
    heads = kv * shape.tp * (shape.cp if method == "ulysses" else 1)
    documents = choices.pop("documents", False)
    sequence = sequence_unit(shape, zigzag=True) * math.ceil(12 / sequence_unit(shape, zigzag=True))
    choices = dict(heads=heads * group, kv_heads=heads, context=64, batch=2 * shape.data, cp=method) | choices
    data = DataConfig(sequence=sequence, document_mask=documents)
    return replace(model_config(mesh, 1, **choices), data=data)


def assert_same_step(config: RunConfig, mutate=lambda layout: layout) -> verify.StepResult:
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
    softcap=st.sampled_from([None, None, 2.0]), attention=st.sampled_from(["auto", "reference"]),
    zero=st.sampled_from([0, 1, 2, 3]), recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99), learned=st.booleans(),
)  # fmt: skip


def one_case(mesh, learned, **choices):
    choices |= {"positions": "learned"} if learned else {}
    assert_same_step(configured(mesh, **choices))


test_a_step_is_that_of_one_device = settings(max_examples=12)(given(**CHOICES)(one_case))
test_many_steps_are_those_of_one_device = pytest.mark.slow(
    settings(max_examples=250)(given(**CHOICES)(one_case))
)


@pytest.mark.parametrize("zigzag", ["on", "off"])
def test_the_fused_ring_on_three_ranks(zigzag):
    """With two, no chunk is passed on twice, and no rank is between others."""
    config = configured("cp=3", zigzag=zigzag)
    assert_same_step(config)


def test_with_a_pipeline():
    assert_same_step(configured("pp=2,cp=2", layers=2, batch=4, micro_batch=1, zero=3, documents=True))


# ---- mutants


def changed(name: str, **places):
    """A batch in which a field is that of contiguous order, or of no document."""
    make = make_batch

    def wrong(rows, layout, documents, positions, zigzag):
        batch = make(rows, layout, documents, positions, zigzag)
        if layout.mesh is None:
            return batch
        return replace(batch, **{name: getattr(make(rows, layout, documents, positions, False), name)})

    return mock.patch.object(verify, "make_batch", wrong)


def merged_without_rescaling(a, b):
    seen = (~b[1].isinf())[..., None]
    return a[0] + b[0] * seen, torch.logaddexp(a[1], b[1])


class Forgets(Layout):
    """Whose n-th shift brings nothing, or whose gathered gradients are not summed."""

    calls = 0
    which = -1

    def shift(self, x: Tensor, axis: str, by: int = 1) -> Tensor:
        type(self).calls += 1
        return torch.zeros_like(x) if self.calls == self.which else super().shift(x, axis, by)

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        return super().reduce_scatter(x, axis) * 0.5


def forgets(which: int):
    cls = type("Forgets", (Forgets,), {"which": which})
    return lambda layout: cls(layout.mesh, layout.rules)


MUTANTS = {
    "positions left in order": ({}, changed("positions_T"), None),
    "targets left in order": ({}, changed("targets_T"), None),
    "documents ignored": ({"documents": True}, mock.patch.object(
        ring, "attention_and_lse", lambda q, k, v, documents, *rest: attention_and_lse(q, k, v, None, *rest)
    ), None),
    "a merge without rescaling": ({}, mock.patch.object(ring, "merge", merged_without_rescaling), None),
    "a block too many skipped": (
        {}, mock.patch.object(Context, "later", property(lambda c: torch.ones(2, dtype=torch.bool))), None
    ),
    "a block too few skipped": (
        {}, mock.patch.object(Context, "later", property(lambda c: torch.zeros(2, dtype=torch.bool))), None
    ),
    "pairs of the wrong half": ({}, mock.patch.object(ring, "_pairs", lambda x, late, first: torch.cat(
        [x.chunk(2, dim=2)[first], x.chunk(2, dim=2)[1]]
    )), None),
    "keys that never come": ({}, None, forgets(1)),
    "keys that never come in backward": ({}, None, forgets(2)),
    "gradients of keys that never come home": ({}, None, forgets(3)),
    "gathered gradients not summed": ({"method": "allgather"}, None, forgets(0)),
    "a row out of order": ({"method": "ulysses", "zigzag": "on"}, changed("zigzag"), None),
    "the wrong rank's sinks": (
        {"method": "ulysses", "sinks": True}, None, lambda layout: ShiftedPlaces(layout.mesh, layout.rules)
    ),
}  # fmt: skip


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


# ---- the pieces


@settings(max_examples=30)
@given(
    mesh=meshes(12, ("dp_replicate", "dp", "cp")), rows=st.integers(1, 3), chunk=st.integers(1, 3),
    zigzag=st.booleans(),
)  # fmt: skip
def test_the_order_is_a_permutation_that_is_undone(mesh, rows, chunk, zigzag):
    """And every rank has its chunks of its rows: an early and a late one, together as long as all others'."""
    shape = MeshShape.parse(mesh)
    n, sequence = shape.cp, 2 * shape.cp * chunk
    x = torch.arange(rows * shape.data * sequence).view(-1, sequence)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh)
        placed = layout.shard(as_tokens(x, layout, zigzag), "tokens")
        held = list(placed.to_local()._local_tensors.values())
    assert torch.equal(as_rows(as_tokens(x, layout, zigzag), layout, sequence, zigzag), x)
    for rank, got in enumerate(held):
        data, part = divmod(rank, n)
        early = (
            slice(part * chunk, (part + 1) * chunk)
            if zigzag
            else slice(2 * part * chunk, (2 * part + 1) * chunk)
        )
        last = 2 * n - 1 - part if zigzag else 2 * part + 1
        mine = x[data * rows : (data + 1) * rows]
        want = torch.cat([mine[:, early], mine[:, last * chunk : (last + 1) * chunk]], dim=1)
        assert torch.equal(got, want.flatten())


def test_zigzag_gives_all_ranks_the_same_number_of_pairs():
    for n in (2, 3, 8):
        order = row_order(48, n, True).view(n, -1)
        assert (
            len(set((order + 1).sum(1).tolist())) == 1
        )  # a query sees as many keys as its place, and itself
        assert len(set((row_order(48, n, False).view(n, -1) + 1).sum(1).tolist())) == n


@settings(max_examples=20)
@given(
    owners=st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(lambda xs: 0 in xs),
    window=st.none() | st.integers(1, 12), softcap=st.sampled_from([None, 0.5]), sinks=st.booleans(),
    packed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_to_parts_of_the_keys_merges_to_that_to_all(owners, window, softcap, sinks, packed, seed):
    """Tokens dealt out anyhow, of which a query may see none; but it sees itself, and its own part is
    first."""
    q, k, v = (normal(2, n, 12, 4, seed=seed + 100 * i) for i, n in enumerate((4, 2, 2)))
    sink = normal(4, seed=seed + 7) if sinks else None
    documents = (normal(2, 12, seed=seed) > 0.5).cumsum(-1) if packed else None
    mask, owner, found = Mask(12, window, softcap), torch.tensor(owners), None
    own = (owner == 0).nonzero().flatten()
    want = attention_reference(q, k, v, documents, sink, mask)[:, :, own]
    for part in ((owner == i).nonzero().flatten() for i in range(4)):
        if len(part):
            step = replace(mask, queries=own, keys=part)
            got = attention_and_lse(q[:, :, own], k[:, :, part], v[:, :, part], documents, step)
            found = got if found is None else ring.merge(found, got)
    got = found[0] if sink is None else with_sinks(*found, sink)
    same(got, want, [q, k, v, *([sink] if sinks else [])])


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_backward_under_the_softmax_of_all_keys(causal):
    """The parts' gradients, each from the whole's output and lse, are the whole's."""
    q, k, v = (normal(2, n, 6, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    more_k, more_v = normal(2, 2, 5, 4, seed=7), normal(2, 2, 5, 4, seed=8)
    one, two = fused.block_forward(q, k, v, causal), fused.block_forward(q, more_k, more_v, False)
    o, lse = ring.merge(one[:2], two[:2])
    inputs = [q, k, v, more_k, more_v]
    g = normal(*o.shape, seed=9).detach()
    want = torch.autograd.grad(o, inputs, g)
    with torch.no_grad():
        a = fused.block_backward(g, q, k, v, o, lse, None, causal)
        b = fused.block_backward(g, q, more_k, more_v, o, lse, None, False)
        alone = fused.block_backward(g, q, k, v, one[0], one[1], None, causal)
    close((a[0] + b[0], *a[1:], *b[1:]), want)
    with pytest.raises(AssertionError):  # with its own lse a part knows nothing of the others
        close((alone[0] + b[0], *alone[1:], *b[1:]), want)


# ---- what it sends


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["auto", "reference"])
@pytest.mark.parametrize(("mesh", "recompute"), [("dp=2,cp=2", "none"), ("cp=4", "none"), ("cp=4", "full")])
def test_bytes_and_counts_are_those_of_the_page(mesh, recompute, method, attention):
    """Of one layer and its backward: docs/context-parallelism.md. Recomputing repeats forward's."""
    shape = MeshShape.parse(mesh)
    config = configured(mesh, method, kv=2, attention=attention, recompute=recompute)
    m, n, again = config.model, shape.cp, 2 if recompute == "full" else 1
    got = one_step(config, shape).collectives
    tokens = config.batch * config.data.sequence // shape.data // n  # of one rank
    kv, q = 8 * tokens * 2 * m.kv_heads * m.head_dim, 8 * tokens * m.heads * m.head_dim
    moved = {
        kind: got.bytes[Collective(kind, "cp")] for kind in ("all_to_all", "all_gather", "reduce_scatter")
    }
    count = {kind: got.count[Collective(kind, "cp")] for kind in moved}
    if method == "ring":
        back = 2 if attention == "auto" else 1  # keys again, and gradients; written out, keys were kept
        hops = (again + back) * (n - 1)
        assert moved == {"all_to_all": hops * kv, "all_gather": 0, "reduce_scatter": 0}
        assert count["all_to_all"] == hops
    elif method == "allgather":
        assert moved == {"all_to_all": 0, "all_gather": again * n * kv, "reduce_scatter": n * kv}
        assert count == {"all_to_all": 0, "all_gather": again, "reduce_scatter": 1}
    else:
        assert moved == {"all_to_all": (again + 1) * (2 * q + kv), "all_gather": 0, "reduce_scatter": 0}
        assert count["all_to_all"] == 2 * (again + 1)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_nothing_else_goes_over_cp_but_the_sums_of_weight_gradients(zero):
    """Which are those that a replica of the whole mesh would need."""
    config = configured("dp=2,cp=2", zero=zero, documents=True)
    over = lambda mesh, axis: {
        c.kind: n
        for c, n in one_step(config, MeshShape.parse(mesh)).collectives.count.items()
        if c.axis == axis and c.kind != "all_to_all"
    }
    want = over("dp_replicate=2,dp=2", "dp_replicate")
    assert over("dp=2,cp=2", "cp") == want and want.keys() == {"all_reduce"}


# ---- real ranks, and the edge


CP_MODEL = replace(MODEL, heads=8, kv_heads=4)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("cp=4", "ring"),
        ("dp=2,cp=2", "ulysses"),
        pytest.param("cp=2,tp=2", "ring", marks=pytest.mark.slow),
        ("cp=2,tp=2", "allgather"),
        pytest.param("pp=2,cp=2", "ring", marks=pytest.mark.slow),
    ],
)
def test_real_ranks_have_the_losses_of_one_device(pool, mesh, method):
    config = RunConfig(
        model=CP_MODEL, data=DataConfig(sequence=16), batch=8, steps=4, seed=3, cp=method, micro_batch=2
    )
    want = train(Layout(), MeshShape(), config)
    losses, norms, initial = pool.run(on_pool, mesh, config)[0]
    assert initial == want.initial or "pp" in mesh
    assert losses == pytest.approx(want.losses, rel=1e-5) and norms == pytest.approx(want.norms, rel=1e-4)


@pytest.mark.parametrize(
    ("mesh", "sequence", "method", "message", "fine"),
    [
        (
            "cp=2,tp=2",
            30,
            "ring",
            "data.sequence=30 over cp=2,tp=2.*multiple of 4; use --data.sequence 32",
            32,
        ),
        ("cp=3", 9, "ring", "two parts a rank, so.*multiple of 6; use --data.sequence 12", 12),
        ("cp=8", 16, "ulysses", "kv_heads=4, which cp must divide; use --cp ring.*--model.kv-heads 8", None),
        ("cp=2,tp=4", 16, "ulysses", "a rank has 1 of .*--model.kv-heads 8", None),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_remedy(mesh, sequence, method, message, fine):
    shape, model = MeshShape.parse(mesh), ModelConfig()
    with pytest.raises(ValueError, match=message) as error:
        check(model, shape, sequence, method)
    assert "\n" not in str(error.value)
    if fine:
        check(model, shape, fine, method)
    else:
        check(model, shape, sequence, "ring")
        check(replace(model, kv_heads=8), shape, sequence, method)
