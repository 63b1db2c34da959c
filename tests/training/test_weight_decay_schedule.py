"""The schedule of the weight decay: what torch computes, in every optimizer and on any mesh."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.training.adamw import AdamW
from dtron.training.elementwise_optimizer import ElementwiseOptimizer
from dtron.training.lion import Lion
from dtron.training.lr_schedule import Progress, weight_decay_factor
from dtron.training.muon import Muon
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.sgd import SGD
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, train
from tests.helpers.texts import one_line
from tests.helpers.values import F64, ONE, assert_steps_of_torch, close, normal

FACTORS = (1.0, 0.5, 3.0, 0.25, 1.5)
NAMES = ("adamw", "muon", "lion", "sgd")
LINEAR = OptimConfig(
    weight_decay=0.5, weight_decay_schedule="linear", final_weight_decay=2.0, warmup=1
)


@pytest.fixture(autouse=True)
def no_kernels():
    """Forget compiled kernels: a function has at most 64 in a process."""
    torch._dynamo.reset()


# ---- the schedule


def decays(config: OptimConfig, steps: int) -> list[float]:
    """The weight decay of each step of a run."""
    at = (Progress(step, 1, config.warmup, steps - 1) for step in range(steps))
    factors = [weight_decay_factor(config, progress) for progress in at]
    return [config.largest_weight_decay * (1.0 if x is None else x) for x in factors]


def test_the_shapes_of_schedules():
    assert decays(OptimConfig(), 3) == [0.1] * 3
    assert decays(LINEAR, 4) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    cosine = replace(LINEAR, weight_decay_schedule="cosine")
    assert decays(cosine, 5) == pytest.approx([0.5, 0.5 + 1.5 * 0.1464466, 1.25, 1.7803301, 2.0])
    assert decays(replace(LINEAR, final_weight_decay=0.0), 3) == pytest.approx([0.5, 0.25, 0.0])


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    first=st.floats(0, 10),
    final=st.floats(0, 10),
    last=st.integers(1, 50),
)
def test_a_schedule_goes_from_the_first_to_the_final_decay(kind, first, final, last):
    """As Megatron's ``get_wd`` computes it, where ``ratio`` is the share of the run."""
    config = OptimConfig(
        weight_decay=first, weight_decay_schedule=kind, final_weight_decay=final, warmup=7
    )
    for done in range(last + 1):
        factor = weight_decay_factor(config, Progress(done, 1, 7, last))
        ratio = torch.tensor(done / last, dtype=F64)
        coefficient = ratio if kind == "linear" else 0.5 * ((torch.pi * (1 - ratio)).cos() + 1)
        want = first + coefficient * (final - first)
        assert config.largest_weight_decay * factor == pytest.approx(want.item(), abs=1e-9)


# ---- what it computes


def steps_of_torch(optimizer: ElementwiseOptimizer, reference, **options) -> None:
    model = replace(MODEL, qkv_bias=True, bias=True)
    assert_steps_of_torch(optimizer, model, reference, FACTORS, **options)


@pytest.mark.parametrize("compile", [False, True])
def test_adamw_and_sgd_are_those_of_torch(compile, monkeypatch):
    """Eager AdamW is torch's fused kernel, which takes no tensor as its weight decay."""
    kind = lambda o: o.compiled("aot_eager") if compile else o
    adamw = lambda: steps_of_torch(
        kind(AdamW(0.8, 0.9, 1e-3, 0.3)), torch.optim.AdamW, betas=(0.8, 0.9), eps=1e-3
    )
    sgd = lambda: steps_of_torch(kind(SGD(0.3, 0.8)), torch.optim.SGD, momentum=0.8)
    adamw()
    sgd()
    # The mutant: the factor is ignored.
    monkeypatch.setattr(ElementwiseOptimizer, "at", lambda self, scalars: self)
    assert_caught(adamw)
    assert_caught(sgd)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "compile"),
    [*((name, kind) for name in NAMES for kind in (None, "aot_eager")), ("adamw", "inductor")],
)
def test_a_factor_is_another_decay(name, compile):
    """One step with a factor is the step of an optimizer with this multiple of the decay, to the
    rounding of float64. A step that is not finite changes nothing."""
    block, found = declare_model(MODEL).blocks[0], []
    spec = (block.mlp, block.norm_2)  # matrices, and a weight that does not decay
    for decay, factor in ((0.3, 0.5), (0.15, None)):
        optimizer = build_optimizer(OptimConfig(name=name, weight_decay=decay))
        optimizer = optimizer.compiled(compile) if compile else optimizer
        params = init(spec, MODEL.dims(), 0, ONE, F64)
        state = init_state(optimizer, spec, params)
        for number in range(3):
            draw = lambda w, number=number: normal(*w.shape, seed=number).detach()
            grads, ok = tree_map(draw, params), torch.tensor(number != 1)
            before = [w.clone() for w in flat(params)]
            one = None if factor is None else torch.tensor(factor, dtype=F64)
            scalars = UpdateScalars(0.1, 0.7, ok, number + 1, one)
            params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
            same = [a.equal(b) for a, b in zip(flat(params), before, strict=True)]
            assert all(same) if number == 1 else not any(same)
        found.append([w.clone() for w in flat((params, *state.trees.values()))])
    close(*found, 1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_factor_multiplies_the_decay_of_a_group(name):
    """Without gradients a weight only decays, by its own group's decay. Norms do not decay."""
    spec = declare_model(MODEL)
    groups = "*.w_up: weight_decay=0.7; vocab: weight_decay=0"
    optimizer = build_optimizer(OptimConfig(name=name, groups=groups, weight_decay=0.2))
    params = init(spec, MODEL.dims(), 0, ONE, F64)
    before = {path: w.clone() for path, w in leaves(params)}
    state = init_state(optimizer, spec, params)
    scalars = UpdateScalars(0.1, decay=3.0)
    apply_update(optimizer, spec, params, tree_map(torch.zeros_like, params), state, scalars, ONE)
    for path, w in leaves(params):
        last = path.rpartition(".")[2]
        decay = {"w_up": 0.7, "w_tokens": 0.0, "w_head": 0.0}.get(last, 0.2)
        kept = 1 - 0.1 * 3 * (decay if last.startswith("w_") else 0.0)
        torch.testing.assert_close(w, before[path] * kept, rtol=1e-12, atol=0)


def test_a_compiled_update_is_compiled_once():
    """The factor is a tensor, so another factor is no other kernel."""
    spec, seen = declare_model(MODEL).blocks[0].mlp.w_up, []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    for kind in (AdamW(0.9, 0.95, 1e-8, 0.3), Muon(0.9, 0.95, 1e-8, 0.3), Lion(0.9, 0.9, 0.3)):
        optimizer, counts = kind.compiled(backend), []
        params = (normal(*spec.shape).float().detach(),)
        state = init_state(optimizer, (spec,), params)
        for step in range(4):
            scalars = UpdateScalars(0.1, decay=torch.tensor(0.5 + step))
            _, state = apply_update(
                optimizer, (spec,), params, (params[0].clone(),), state, scalars, ONE
            )
            counts.append(len(seen))
        assert counts[0] == counts[-1] and counts[0] > 0


# ---- on any mesh


@cache
def one_device(name: str) -> tuple[list[float], list[float]]:
    found = train(Layout(), MeshShape(), config(name), F64, change_step=scheduled)
    return found.losses, found.norms


def config(name: str) -> RunConfig:
    optim = replace(LINEAR, name=name)
    return RunConfig(
        model=MODEL, data=DataConfig(seq_len=16), batch=12, steps=4, seed=3, optim=optim
    )


def scheduled(step, factor=lambda done, config: weight_decay_factor(config, done)):
    """Take the steps of a run with the factors of its schedule, as train.py does."""

    class Scheduled:
        done = 0

        def __call__(self, params, opt, batches, tokens, lr):
            at = Progress(self.done, 1, 1, 3)
            self.done += 1
            # A large rate, so that the decay shows in the next loss.
            return step(params, opt, batches, tokens, 10 * lr, decay=factor(at, LINEAR))

    return Scheduled()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(1, thorough=20))
@given(
    mesh=meshes(max_ranks=4).filter(lambda m: MODEL.kv_heads % MeshShape.parse(m).tp == 0),
    zero=zero_stages(),
)
def test_a_run_on_any_mesh(name, mesh, zero):
    agrees(name, mesh, zero)


def agrees(name: str, mesh: str, zero: int, **how) -> None:
    c, shape = replace(config(name), zero=zero, mesh=mesh), MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(zero))
        found = train(layout, shape, c, F64, change_step=lambda s: scheduled(s, **how))
    losses, norms = one_device(name)
    assert found.losses == pytest.approx(losses, rel=1e-9)
    assert found.norms == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_decay_on_a_mesh_is_seen(name):
    """The mutant: the ranks of a mesh do not follow the schedule."""
    assert_caught(lambda: agrees(name, "dp=2", 1, factor=lambda at, c: None))


# ---- flags


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"final_weight_decay": 0.2}, ["optim.final_weight_decay=0.2", "linear"]),
        ({"weight_decay_schedule": "cosine"}, ["=cosine", "--optim.final-weight-decay"]),
        (
            {"weight_decay_schedule": "linear", "final_weight_decay": -1.0},
            ["optim.final_weight_decay=-1.0", "from 0"],
        ),
        (
            {"weight_decay_schedule": "linear", "final_weight_decay": float("inf")},
            ["optim.final_weight_decay=inf"],
        ),
    ],
)
def test_wrong_values_are_one_line(values, said):
    one_line(lambda: OptimConfig(**values), *said)


@pytest.mark.usefixtures("toy_optimizers")
def test_an_optimizer_without_decay_has_no_schedule():
    values = {"weight_decay_schedule": "linear", "final_weight_decay": 0.2}
    one_line(
        lambda: OptimConfig(name="normalized-sgd", **values),
        "optim.weight_decay_schedule=linear",
        "normalized-sgd has no weight decay",
    )
