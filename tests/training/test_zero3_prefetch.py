"""ZeRO-3's messages beside compiled units: when they are sent, what is kept, and the gradients."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dtron.training.gathered_weight as gathered_weight
import dtron.training.zero3_prefetch as zero3_prefetch
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.training.compiled_stage import compiled
from dtron.training.compiled_units import CompiledUnits
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.training.traced_function import TracedFunction
from dtron.training.zero3_prefetch import Handle, UnitWeights
from dtron.tree import flat
from tests.helpers.compiled import BLOCK, ROWS, lone_rank
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL

pytestmark = pytest.mark.usefixtures("fresh_compiler")
WIDE = replace(MODEL, embed=64, mlp=256, layers=3)


def grads(layout: Layout, model, how: ComputeConfig, dtype: torch.dtype, backend: str | None):
    """Gradients of two microbatches under ZeRO-3."""
    functions = program(model, layout, how, splits=False)
    functions = compiled(functions, layout, how, backend) if backend else functions
    pipe = one_stage(model, 2, layout)
    params = init(pipe.spec, model.dims(), 0, layout, dtype)
    batches = [make_batch(rows, layout) for rows in ROWS.chunk(2)]
    return gradients(functions, params, batches, 64, pipe, 3)[1]


def grads_on_pool(mesh: str, model, how: ComputeConfig, dtype, compute, backend, mutant=""):
    """A job for the pool: the whole gradients."""
    torch.compiler.reset()
    if mutant == "late":  # gradients that autograd adds up are not waited for
        zero3_prefetch.UnitWeights.alone = False
    try:
        layout = Layout(real_mesh(mesh), rules_for(3), compute=compute)
        tree = grads(layout, model, how, dtype, backend)
    finally:
        if mutant:
            zero3_prefetch.UnitWeights.alone = ALONE
    return [full(g).float() for g in flat(tree)]


ALONE = zero3_prefetch.UnitWeights.alone
TIED = replace(BLOCK, tied=True)
CASES = [
    ("dp=2", BLOCK, ComputeConfig()),
    ("dp=2", TIED, ComputeConfig("full")),
    ("dp=2", replace(BLOCK, embed=25, mlp=41), ComputeConfig()),  # unequal shards
    ("dp=2", replace(BLOCK, moe=MoEConfig(experts=4, top_k=2, mlp=16)), ComputeConfig()),
]
SLOW = [
    ("dp=2,cp=2", BLOCK, ComputeConfig()),  # all-gathers over two axes
    ("dp_replicate=2,dp=2", TIED, ComputeConfig("selective")),
    ("dp=2,tp=2", replace(BLOCK, mlp=44), ComputeConfig()),
    ("dp=4,ep=2", replace(BLOCK, moe=MoEConfig(experts=4, top_k=2, mlp=16)), ComputeConfig()),
]


def close(got: list[Tensor], want: list[Tensor], within: float) -> bool:
    return all((a - b).norm() <= within * b.norm() + 1e-9 for a, b in zip(got, want, strict=True))


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "model", "how"), [*CASES, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)]
)
@pytest.mark.parametrize(
    "compute", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16]
)
def test_gradients_are_those_of_eager(request, mesh, model, how, compute):
    pool = request.getfixturevalue("pair" if MeshShape.parse(mesh).size == 2 else "pool")
    dtype = torch.promote_types(compute, torch.float32)
    (want, *_), (got, *_) = (
        pool.run(grads_on_pool, mesh, model, how, dtype, compute, backend)
        for backend in (None, "aot_eager")
    )
    assert close(got, want, 1e-6 if compute == torch.float64 else 0.03)
    assert not close(got[::-1], want, 0.5) and all(x.norm() > 0 for x in want)


@pytest.mark.xdist_group("pool")
def test_an_embedding_that_is_the_head_too_waits_for_its_gradients(pair):
    """Both units of a tied embedding have a gradient, and autograd adds the two."""
    args = "dp=2", TIED, ComputeConfig(), torch.float32, torch.bfloat16
    want, mutant = (
        pair.run(grads_on_pool, *args, backend, kind)[0]
        for backend, kind in ((None, ""), ("aot_eager", "late"))
    )
    assert not close(mutant, want, 0.03)


@pytest.mark.xdist_group("pool")
def test_weights_in_8_bits(pair):
    how = ComputeConfig(fp8="tensorwise", fp8_first_last=True, fp8_min_weights=0, fp8_gather=True)
    args = "dp=2", replace(WIDE, layers=1), how, torch.float32, torch.bfloat16
    want, got = (pair.run(grads_on_pool, *args, b)[0] for b in (None, "aot_eager"))
    assert close(got, want, 0.05)


def events_of_a_step(monkeypatch) -> list[str]:
    """The order of messages and units in a step. Units are numbered by the time they first run."""
    events: list[str] = []
    numbers: dict[int, int] = {}

    def name(unit: UnitWeights) -> int:
        return numbers.setdefault(id(unit), len(numbers))

    def noted(owner, method: str, text: str) -> None:
        plain = getattr(owner, method)

        def run(self, *args):
            new = self._whole is None if method == "take" else method == "backward"
            new = new or (method == "start" and self._coming is None and self._whole is None)
            if new:
                events.append(f"{text} {name(self)}")
            return plain(self, *args)

        monkeypatch.setattr(owner, method, run)

    noted(UnitWeights, "start", "start")
    noted(UnitWeights, "take", "wait")
    noted(UnitWeights, "backward", "send")
    layout = Layout(lone_rank("dp=2"), rules_for(3), compute=torch.bfloat16)
    grads(layout, WIDE, ComputeConfig(), torch.float32, "aot_eager")
    return events


def test_weights_are_gathered_one_unit_ahead(monkeypatch):
    """Units: the embedding, three blocks, the end, which keeps its weights. Two microbatches. The
    embedding needs no weight in backward."""
    forward = ["start 0", "wait 0", "start 1", "start 2", "wait 1", "start 3", "wait 2"]
    forward += ["start 4", "wait 3", "wait 4", "start 3"]
    backward = ["send 4", "start 2", "wait 3", "send 3", "start 1", "wait 2", "send 2", "wait 1"]
    backward += ["send 1", "send 0"]
    assert events_of_a_step(monkeypatch) == 2 * (forward + backward)


@pytest.mark.parametrize(
    ("recompute", "fp8"),
    [
        ("none", "gather"),
        ("none", "cast"),
        ("full", "cast"),
        ("offload", "cast"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("none", ""), ("selective", "gather"), ("full", "gather"))
        ),
    ],
)
def test_no_gathered_weight_is_kept_for_backward(monkeypatch, recompute, fp8):
    """The compiler's own choice would keep weights that it has cast to FP8."""
    how = ComputeConfig(recompute)
    if fp8:
        how = replace(how, fp8="tensorwise", fp8_first_last=True, fp8_min_weights=0)
        how = replace(how, fp8_gather=fp8 == "gather")
    kept: list[Tensor] = []
    pack = UnitWeights.pack

    def noted(self: UnitWeights, x: Tensor):
        saved = pack(self, x)
        if not isinstance(saved, Handle):
            kept.append(x)
        return saved

    monkeypatch.setattr(UnitWeights, "pack", noted)
    alive: list[weakref.ref] = []
    arrived = gathered_weight.GatheredWeight.arrived

    def watched(self, rows):
        x = arrived(self, rows)
        alive.append(weakref.ref(x))
        return x

    monkeypatch.setattr(gathered_weight.GatheredWeight, "arrived", watched)
    layout = Layout(lone_rank("dp=2"), rules_for(3), compute=torch.bfloat16)
    units, most = CompiledUnits.__call__, []

    def counted(self, fn, *args):
        result = units(self, fn, *args)
        del args
        most.append(sum(x() is not None for x in alive))
        return result

    monkeypatch.setattr(CompiledUnits, "__call__", counted)
    functions = compiled(
        program(WIDE, layout, how, splits=False), layout, how, "aot_eager_decomp_partition"
    )
    pipe = one_stage(WIDE, 1, layout)
    params = init(pipe.spec, WIDE.dims(), 0, layout, torch.float32)
    gradients(functions, params, [make_batch(ROWS, layout)], 64, pipe, 3)
    block = len([w for w in flat(pipe.spec[0].blocks[0]) if w.decays])
    assert max(most) <= 2 * block + 1
    sizes = {w.numel for w in flat(pipe.spec) if w.decays}
    assert not [x.shape for x in kept if x.numel() in sizes and x.dtype.itemsize == 1]
    gc.collect()
    assert not [x for x in alive if x() is not None]


def test_a_kept_copy_is_noticed(monkeypatch):
    kind = TracedFunction.kind
    unmarked = lambda *args, static=(), **more: kind(*args, **more)
    monkeypatch.setattr(TracedFunction, "kind", unmarked)
    with pytest.raises(AssertionError):
        test_no_gathered_weight_is_kept_for_backward(monkeypatch, "none", "cast")


def test_a_gather_whose_weights_backward_does_not_read_is_waited_for(monkeypatch):
    """A CUDA graph cannot be recorded if a message is not waited for."""
    units, start = [], UnitWeights.start
    monkeypatch.setattr(UnitWeights, "start", lambda self: (units.append(self), start(self))[1])
    monkeypatch.setattr(UnitWeights, "pack", lambda self, x: x)
    layout = Layout(lone_rank("dp=2"), rules_for(3), compute=torch.bfloat16)
    grads(layout, WIDE, ComputeConfig(), torch.float32, "aot_eager")
    assert units and not [unit for unit in units if unit._coming is not None]
