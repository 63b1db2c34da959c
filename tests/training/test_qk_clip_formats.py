"""QK-clip in every format of weights, compiled, and on real ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.layers.attention_mixer import AttentionMixer
from dtron.mesh import Layout, stage_mesh
from dtron.model.batch import make_batch
from dtron.model.block_outputs import LARGEST_LOGITS
from dtron.model.compute_config import ComputeConfig
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import OptimConfig, RunConfig
from dtron.testing import assert_caught
from dtron.training.build import build_step
from dtron.training.clip_factors import clip_factors
from dtron.training.compiled_stage import compiled
from dtron.training.config import RunPlan
from dtron.training.gradients import gradients
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import (
    Optimizer,
    OptimizerState,
    apply_update,
    init_state,
    stored_params,
    with_compute_copies,
)
from dtron.training.pipeline import on_ranks, one_stage, pipeline, program
from dtron.training.qk_clip import QKClip
from dtron.training.state_formats import values
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.compiled import ROWS
from tests.helpers.real_mesh import destroy_groups, real_mesh
from tests.helpers.runs import MODEL
from tests.helpers.values import F64, ONE, close, normal
from tests.model.test_context_models import LATENT
from tests.training.test_qk_clip import clipped

# ---- formats


NEEDS = {"blocks.0.attention.w_q": [1.0, 0.25, 0.7, 1.0], "blocks.0.attention.w_k": [1.0, 0.3]}
SMALL = replace(MODEL, layers=1, qk_norm=False, kv_heads=2, embed=32)


def updated(optim: OptimConfig, factors: dict, ok: bool = True, backend: str = ""):
    """Weights in float32, and those that compute in bfloat16, after an update of a weight."""
    spec = declare_model(SMALL)
    params = init(spec, SMALL.dims(), 0, ONE)
    optimizer = build_optimizer(optim)
    optimizer = optimizer.compiled(backend) if backend else optimizer
    state = init_state(optimizer, spec, params)
    params = stored_params(params, spec, state)
    state = with_compute_copies(state, params, spec, torch.bfloat16)
    grads = tree_map(lambda w: normal(*w.shape).detach().float(), params)
    scalars = UpdateScalars(0.1, 0.7, torch.tensor(ok), factors=factors)
    params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
    copies = params if state.compute_copies is None else state.compute_copies
    masters, trees = values(spec, params, state.trees)
    return {
        "masters": dict(leaves(masters)),
        "copies": {path: w.clone() for path, w in leaves(copies)},
        "ema": dict(leaves(trees["ema"])) if "ema" in trees else {},
    }


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["", "aot_eager"])
@pytest.mark.parametrize(
    "choices", [{}, {"name": "muon"}, {"master_weights": "split", "moments": "bfloat16"}]
)
def test_masters_and_their_copies_are_scaled(choices, backend):
    optim = OptimConfig(qk_clip=1.0, **choices)
    factors = {path: torch.tensor(x)[:, None] for path, x in NEEDS.items()}
    got, want = updated(optim, factors, backend=backend), updated(optim, {}, backend=backend)
    for path, w in want["masters"].items():
        expected = w * factors[path] if path in factors else w
        assert got["masters"][path].equal(expected)
        # A tie in rounding may go to the other side.
        rounded = got["copies"][path].float()
        assert ((rounded - expected).abs() <= (expected.bfloat16().float() - expected).abs()).all()
    kept, skipped = updated(optim, factors, ok=False), updated(optim, {}, ok=False)
    for name in ("masters", "copies"):
        assert all(w.equal(skipped[name][path]) for path, w in kept[name].items())


def test_the_average_follows_the_scaled_weights():
    factors = {path: torch.tensor(x)[:, None] for path, x in NEEDS.items()}
    got = updated(OptimConfig(qk_clip=1.0, ema=0.5), factors)
    initial = init(declare_model(SMALL), SMALL.dims(), 0, ONE)
    for path, w in leaves(initial):
        d = 2 / 11  # of the first update
        want = d * w + (1 - d) * got["masters"][path]
        torch.testing.assert_close(got["ema"][path], want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "choices", [{"window": 5, "softcap": 2.0}, {"pattern": "M", "mla": LATENT}]
)
def test_compiled_is_eager(recompute, choices):
    m, how = replace(SMALL, **choices), ComputeConfig(recompute, attention_logits=True)
    batches = [make_batch(r, ONE) for r in ROWS[:4].chunk(2)]
    pipe = one_stage(m, 2, ONE)
    params = init(pipe.spec, m.dims(), 0, ONE, F64)
    functions = program(m, ONE, how)
    take = partial(gradients, params=params, microbatches=batches, tokens=64, pipe=pipe, zero=1)
    (_, want, reports), (_, got, found) = (
        take(f) for f in (functions, compiled(functions, ONE, how, "aot_eager"))
    )
    close(found[0]["largest_logits"], reports[0]["largest_logits"], 1e-12)
    close(flat(got), flat(want), 1e-10)


# ---- real ranks


def clipped_on_pool(config: RunConfig, backend: str | None) -> dict[str, float]:
    """A job for the pool: after two steps, the largest logit of each and the norms of this rank's
    weights.

    ``backend``: compiles the step; None is eager."""
    torch.compiler.reset()
    shape, m, found = MeshShape.parse(config.mesh), config.model, {}
    whole = real_mesh(config.mesh)
    layout = Layout(stage_mesh(whole), rules_for(config.zero))
    pipe = pipeline(config, shape, 2, config.data.seq_len, layout)
    pipe = on_ranks(pipe, whole, torch.empty(0, m.embed, dtype=F64))
    plan = RunPlan.eager(config, shape, (2, 4), F64, F64)
    step = build_step(config, replace(plan, compile=backend is not None), pipe, backend or "")
    params = init(pipe.spec, m.dims(), 0, layout, F64)
    opt = init_state(step.optimizer, pipe.spec, params)
    for number in range(2):
        batches = [make_batch(r % m.vocab, layout) for r in ROWS[:, :13].chunk(2)]
        _, _, reports, params, opt = step(params, opt, batches, 96, 1e-2)
        found[f"logit {number}"] = reports.attention_logit.item()
    destroy_groups(pipe)
    pairs = zip(flat(pipe.spec), flat(params), strict=True)
    return found | {w.path: full(x).norm().item() for w, x in pairs}


@pytest.mark.xdist_group("pool")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("mesh", "layers", "backend"),
    [
        ("dp=2,tp=2", 1, None),
        ("dp=2,tp=2", 1, "aot_eager"),
        ("pp=2,dp=2", 2, None),
        pytest.param("pp=2,dp=2", 2, "aot_eager", marks=pytest.mark.slow),
        pytest.param("cp=2,tp=2", 1, None, marks=pytest.mark.slow),
        pytest.param("cp=2,tp=2", 1, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_real_ranks_eager_and_compiled(pool, mesh, layers, backend):
    config = clipped(mesh, group=1, layers=layers, zero=3, heads=2, kv_heads=2)
    want = clipped_on_pool(replace(config, mesh="dp=1"), None)
    assert want["logit 0"] > 6.0 and want["logit 0"] > want["logit 1"]
    for got in pool.run(clipped_on_pool, config, backend):
        assert got == pytest.approx({name: want[name] for name in got}, rel=1e-9)
    assert len(got) > 10


class NoNumberRead(TorchDispatchMode):
    """Fails where the host would wait for the device to read a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero"), name
        return func(*args, **kwargs or {})


class Still(Optimizer):
    """An optimizer that changes nothing."""

    def update(self, spec, params, grads, state, scalars, layout):
        return params, state


def clips_without_reading() -> None:
    config = clipped("dp=1")
    pipe = one_stage(config.model, 1, ONE)
    params = init(pipe.spec, config.model.dims(), 0, ONE, F64)
    before = params[0].blocks[0].mixer.w_q.clone()
    reports = {0: {LARGEST_LOGITS: torch.tensor([[3.0, 9.0]], dtype=F64)}}
    with NoNumberRead():
        factors = clip_factors(reports, pipe, config.model, 6.0)
        scalars = UpdateScalars(0.1, ok=torch.tensor(True), factors=factors)
        QKClip(Still()).update(pipe.spec, params, None, OptimizerState(0, {}), scalars, ONE)
    after = params[0].blocks[0].mixer.w_q
    assert after[:, 0].equal(before[:, 0]) and after[:, 1].norm() < before[:, 1].norm()


def test_the_host_reads_no_number():
    """So a CUDA graph can record the step."""
    clips_without_reading()
    usual = AttentionMixer.logit_factors
    reads = lambda self, p, factor_N: usual(self, p, factor_N) if factor_N.min() < 1 else {}
    with mock.patch.object(AttentionMixer, "logit_factors", reads):
        assert_caught(clips_without_reading)
