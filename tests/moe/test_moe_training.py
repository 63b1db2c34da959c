"""Experts in training: real ranks, compiled stages, checkpoints across ep, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from dtron import checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.flops import active_count, flops_per_token, parameter_count
from dtron.model.lora import LoraConfig
from dtron.model.stages import layers_per_stage
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.runtime.validate import check, check_dispatch, check_expert_sizes
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.reports import describe_experts, expert_totals
from dtron.tree import flat, tree_map
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL, on_pool, train
from tests.helpers.values import ADAMW

ONE = Layout()
EXPERTS = MoEConfig(
    8, 2, 16, aux_loss=0.02, z_loss=1e-3, bias_rate=1e-3, shared=24, aux_level="global_batch"
)
SPARSE = replace(MODEL, moe=EXPERTS)
FOUR = RunConfig(model=SPARSE, data=DataConfig(seq_len=16), batch=8, steps=4, seed=3)


@pytest.fixture(scope="module")
def one_device():
    return train(ONE, MeshShape(), FOUR)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero", "dispatch"),
    [
        ("dp=4,ep=4", 1, "auto"),
        ("dp=2,tp=2,ep=4", 3, "static"),
        pytest.param("dp=2,tp=2,ep=2,etp=2", 2, "allgather", marks=pytest.mark.slow),
        ("pp=2,dp=2,ep=2", 1, "auto"),
    ],
)
def test_steps_on_real_ranks(pool, one_device, mesh, zero, dispatch):
    config = replace(FOUR, zero=zero, moe_dispatch=dispatch)
    want = one_device
    if "pp" in mesh:  # more microbatches; an auxiliary loss depends on the tokens of a microbatch
        config = replace(config, micro_batch=1)
        want = train(ONE, MeshShape(), replace(config, micro_batch=2))
    for losses, norms, initial in pool.run(on_pool, mesh, config):
        assert initial == one_device.initial or "pp" in mesh
        assert losses == pytest.approx(want.losses, rel=1e-5)
        assert norms == pytest.approx(want.norms, rel=1e-4)
    assert want.losses[-1] < want.losses[0]


def test_balance_biases_move(one_device):
    assert all(p.moe.router.balance.abs().max() > 0 for p in one_device.params[0].blocks)


# ---- compiled


ROWS = torch.arange(8 * 17).view(8, 17) % 61


def gradients_of(functions, model: ModelConfig, layout=ONE, zero: int = 1, dtype=torch.float32):
    pipe = one_stage(model, 2, layout)
    params = init(pipe.spec, model.dims(), 0, layout, dtype)
    batches = [make_batch(r, layout) for r in ROWS.chunk(2)]
    return gradients(functions, params, batches, 64, pipe, zero)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("recompute", "choices"),
    [
        ("none", {"bias": True, "shared_gate": True}),
        pytest.param("selective", {"capacity_factor": 1.0}, marks=SLOW),
        pytest.param("full", {"score": "sigmoid", "groups": 4, "group_top_k": 2}, marks=SLOW),
        pytest.param("none", {"aux_level": "sequence", "activation": "clamped_swiglu"}, marks=SLOW),
    ],
)
def test_compiled_gradients_are_those_of_eager(recompute, choices):
    torch.compiler.reset()
    m = replace(SPARSE, layers=1, moe=replace(EXPERTS, **choices))
    how = ComputeConfig(recompute)
    want = gradients_of(program(m, ONE, how), m)
    got = gradients_of(compiled(program(m, ONE, how), ONE, backend="aot_eager"), m)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    for spec, a, b in zip(flat(declare_model(m)), flat(got[1]), flat(want[1]), strict=True):
        assert (a.abs().max() > 0) != spec.buffer, spec.path
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, x in want[2][0].items():
        torch.testing.assert_close(got[2][0][name], x)


def compiled_on_pool(mesh: str, zero: int, dispatch: str, backend: str | None) -> list[float]:
    """A job for the pool: loss and norms of gradients."""
    torch.compiler.reset()
    layout = Layout(real_mesh(mesh), rules_for(zero))
    m = replace(SPARSE, layers=1, moe=replace(EXPERTS, aux_level="micro_batch"))
    functions = program(m, layout, ComputeConfig(moe_dispatch=dispatch), splits=False)
    functions = compiled(functions, layout, backend=backend) if backend else functions
    loss, grads, reports = gradients_of(functions, m, layout, zero)
    return [
        full(loss).item(),
        *(full(g).norm().item() for g in flat(grads)),
        *reports[0]["load"].flatten().tolist(),
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero", "dispatch"),
    [
        ("dp=4,ep=2", 1, "auto"),
        ("dp=2,tp=2,ep=4", 3, "static"),
        ("dp=2,tp=2,ep=2,etp=2", 2, "allgather"),
    ],
)
def test_sharded_experts_compile_too(pool, mesh, zero, dispatch):
    want = pool.run(compiled_on_pool, mesh, zero, dispatch, None)
    got = pool.run(compiled_on_pool, mesh, zero, dispatch, "aot_eager")
    assert got[0] == pytest.approx(want[0], rel=1e-4)


# ---- checkpoints


def test_resuming_with_another_ep(tmp_path):
    """Saved on dp=4,ep=4, loaded on dp=2,tp=2,ep=2 and on one device; router biases too."""
    identity = {"a": 1}

    def state(layout: Layout, seed: int):
        spec = declare_model(SPARSE)
        params = init(spec, SPARSE.dims(), seed, layout)
        return checkpoint.TrainState(3, 24, params, init_state(ADAMW, spec, params)), spec

    with simulated(MeshShape.parse("dp=4,ep=4")) as mesh:
        saved, spec = state(Layout(mesh, rules_for(3)), 1)
        for p in saved.params.blocks:
            p.moe.router.balance._local_tensor.add_(0.5)
        want = tree_map(full, saved.params)
        path = checkpoint.save(tmp_path, saved, spec, identity)
    for text in ("dp=2,tp=2,ep=2", "dp=1"):
        with simulated(MeshShape.parse(text)) as mesh:
            fresh, spec = state(Layout(mesh, rules_for(1)), 2)
            got = checkpoint.load(path, fresh, spec, identity)
            assert got.step == 3
            for a, b in zip(flat(tree_map(full, got.params)), flat(want), strict=True):
                assert torch.equal(a, b)
            assert (full(got.params.blocks[0].moe.router.balance) == 0.5).all()


# ---- what a run says


def test_reports_of_layers():
    """The load of 2 x 64 tokens. A layer's report has the layer's number in the model."""
    m = replace(SPARSE, moe=replace(EXPERTS, dense_layers=1))
    pipe = one_stage(m, 2, ONE)
    _, _, reports = gradients_of(program(m, ONE), m, dtype=torch.float64)
    totals = expert_totals(reports, pipe, m.moe)
    assert totals.shape == (1, 8 + 6) and totals[0, :8].sum() == 2 * 128 and totals[0, 8] == 128
    said = describe_experts(totals, m)
    names = ("load_max", "load_min", "entropy", "dropped", "aux_loss", "z_loss")
    assert set(said) == {f"experts.1.{name}" for name in names}
    assert (
        said["experts.1.load_max"] >= 1 >= said["experts.1.load_min"]
        and said["experts.1.dropped"] == 0
    )
    assert 0 < said["experts.1.entropy"] <= math.log(8) + 1e-9 and said["experts.1.aux_loss"] > 0.9
    assert (
        describe_experts(None, ModelConfig())
        == {}
        == describe_experts(expert_totals({}, pipe, MoEConfig()), ModelConfig())
    )
    few = replace(m, moe=replace(m.moe, capacity_factor=0.5))
    _, _, reports = gradients_of(program(few, ONE), few, dtype=torch.float64)
    dropped = describe_experts(expert_totals(reports, pipe, few.moe), few)["experts.1.dropped"]
    assert 0.4 < dropped < 0.9
    json.dumps(said)


def test_only_the_experts_that_a_token_uses_are_counted():
    dense, sparse = MODEL, replace(MODEL, moe=MoEConfig(8, 2, 20))
    per_expert, router = 3 * 24 * 20, 24 * 8
    mlp = 3 * 24 * 40
    assert parameter_count(sparse) - parameter_count(dense) == 2 * (8 * per_expert + router - mlp)
    assert active_count(sparse) - active_count(dense) == 2 * (2 * per_expert + router - mlp)
    gain = flops_per_token(sparse, 16) - flops_per_token(dense, 16)
    assert gain == 6 * (active_count(sparse) - active_count(dense))
    assert layers_per_stage(replace(sparse, layers=4), 2, 16) == [2, 2]


# ---- what is refused


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"experts": 4, "top_k": 5}, r"top_k=5 of model.moe.experts=4.*use --model.moe.top-k 4"),
        ({"experts": 8, "groups": 3}, r"groups must divide experts; use --model.moe.groups 2"),
        ({"experts": 8, "groups": 4, "group_top_k": 5}, "at most 4; use --model.moe.group-top-k 1"),
        (
            {"experts": 8, "groups": 4, "group_top_k": 1, "top_k": 3},
            "of 4 groups of 2 experts, each token needs at least 2 for its top_k=3",
        ),
        ({"experts": 8, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"experts": 8, "aux_loss": float("nan")}, "aux_loss=nan"),
        ({"experts": 8, "shared_gate": True}, "without a shared expert"),
    ],
)
def test_experts_that_cannot_be(choices, message):
    with pytest.raises(ValueError, match=message) as error:
        MoEConfig(**choices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "moe", "message"),
    [
        (
            "dp=4,ep=4",
            MoEConfig(6),
            r"experts=6 over ep=4: ep must divide experts; use ep=3 or .*experts 8",
        ),
        ("dp=4,ep=3", MoEConfig(6), r"ep=3 must divide dp\*cp\*tp/etp = 4/1; use ep=2"),
        (
            "tp=2,etp=2",
            MoEConfig(6, mlp=5),
            r"mlp=5 over etp=2: etp must divide mlp; use etp=1 or .*mlp 6",
        ),
        ("tp=2", MoEConfig(6, shared=5), r"shared=5 over tp=2"),
        ("dp=2,ep=2", MoEConfig(), "the model has no experts; leave ep and etp out"),
    ],
)
def test_meshes_that_cannot_be(mesh, moe, message):
    with pytest.raises(ValueError, match=message) as error:
        check(replace(MODEL, moe=moe), MeshShape.parse(mesh), 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("embed", "mlp", "mesh", "message"),
    [
        (
            20,
            16,
            "ep=2,dp=2",
            r"model.embed=20: .* multiples of 8.* use --model.embed 24, or --moe-d",
        ),
        (24, 16, "tp=4,etp=4", r"model.moe.mlp=16 over etp=4: .* use --model.moe.mlp 32, or"),
    ],
)
def test_sizes_that_the_kernel_of_bfloat16_does_not_take(embed, mlp, mesh, message):
    model, shape = replace(MODEL, embed=embed, moe=MoEConfig(4, 2, mlp)), MeshShape.parse(mesh)
    refuse = lambda how, dtype: check_expert_sizes(how, model, shape, dtype)
    with pytest.raises(ValueError, match=message):
        refuse(ComputeConfig(), torch.bfloat16)
    refuse(ComputeConfig(), torch.float32)
    refuse(ComputeConfig(moe_dispatch="static"), torch.bfloat16)


def test_ranks_of_updates_that_the_kernel_of_bfloat16_does_not_take():
    """Known bug: such a run failed in its first step."""
    model = replace(MODEL, moe=MoEConfig(4, 2, 16))

    def refuse(targets: str, rank: int, dispatch: str = "auto") -> None:
        how, lora = ComputeConfig(moe_dispatch=dispatch), LoraConfig(rank=rank, targets=targets)
        check_expert_sizes(how, model, MeshShape(), torch.bfloat16, lora)

    with pytest.raises(ValueError, match=r"--lora.rank 12: .* multiples of 8; use --lora.rank 16"):
        refuse("*", 12)
    refuse("*", 16)
    refuse("attention.*", 12)
    refuse("*", 12, "static")


def test_dispatchers_that_cannot_be():
    m = replace(MODEL, moe=MoEConfig(8, capacity_factor=1.0))
    with pytest.raises(ValueError, match="it drops nothing; use --moe-dispatch static"):
        check_dispatch(ComputeConfig(moe_dispatch="alltoall"), m, False)
    with pytest.raises(ValueError, match="cannot be compiled; use --moe-dispatch allgather"):
        check_dispatch(ComputeConfig(moe_dispatch="alltoall"), SPARSE, True)
    with pytest.raises(ValueError, match="no layer would have experts"):
        replace(MODEL, moe=MoEConfig(8, dense_layers=2))
