"""Context parallelism: its traffic to the byte, real ranks, generation, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.distributed import bucketing
from dtron.distributed.mesh_shape import MeshShape
from dtron.generation.sampling import Sampling
from dtron.mesh import Layout
from dtron.params import init
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.runtime.generation import generate
from dtron.runtime.validate import check
from dtron.tools.count_collectives import Collective
from dtron.tools.verify_step import one_step
from dtron.training.pipeline import one_stage
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL, on_pool, simulate, train
from tests.layers.test_context_parallel import METHODS, configured


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["auto", "reference"])
@pytest.mark.parametrize(("mesh", "recompute"), [("dp=2,cp=2", "none"), ("cp=3", "full")])
def test_bytes_and_counts_are_those_of_the_page(mesh, recompute, method, attention):
    """One layer and its backward, as in docs/context-parallelism.md. Recomputation repeats the
    forward's traffic. ZeRO is 0, because a gather of weights over dp goes over cp too."""
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
        )  # keys again, and gradients; the reference keeps its keys
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
    """The collectives over cp are those over dp; at stage 0, those over a replica of the whole
    mesh. Buckets are off, because not every weight with equal shards over dp has equal shards over
    both."""
    monkeypatch.setattr(bucketing, "SMALL", 0)
    config = configured("dp=2,cp=2", zero=zero, documents=True)

    def over(mesh, axis):
        return {
            c.kind: n
            for c, n in one_step(config, MeshShape.parse(mesh)).collectives.count.items()
            if c.axis == axis and c.kind != "all_to_all"
        }

    want = over("dp=2", "dp") if zero else over("dp_replicate=2,dp=2", "dp_replicate")
    assert over("dp=2,cp=2", "cp") == want
    assert want.keys() == {"all_reduce", *(("all_gather", "reduce_scatter") if zero else ())}


# ---- real ranks


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
    """A job for the pool: the likeliest tokens after each prompt, on real ranks."""
    layout = Layout(real_mesh(mesh))
    pipe = one_stage(CP_MODEL, 1, layout)
    params = init(pipe.spec, CP_MODEL.dims(), 0, layout, torch.float64)
    return generate(params, PROMPTS, 6, CP_MODEL, pipe, Sampling(0))


@pytest.mark.xdist_group("pool")
def test_generation_over_cp_says_what_one_device_says(pool):
    """cp shards rows in generation, and there are fewer rows than ranks."""
    pipe = one_stage(CP_MODEL, 1, Layout())
    params = init(pipe.spec, CP_MODEL.dims(), 0, Layout(), torch.float64)
    want = generate(params, PROMPTS, 6, CP_MODEL, pipe, Sampling(0))
    assert len(set(want[0])) > 4 and pool.run(generated_on_pool, "dp=2,cp=2") == [want] * 4


def test_fp8_over_cp_follows_one_device():
    """To the rounding of FP8: the scales of a rank cover its own tokens."""
    pytest.importorskip("torchao")
    config = RunConfig(
        model=replace(CP_MODEL, embed=32, mlp=48, head_dim=8),
        data=DataConfig(seq_len=16),
        batch=8,
        steps=2,
        micro_batch=4,
        fp8="rowwise",
        fp8_first_last=True,
        fp8_min_weights=0,
    )
    want = train(Layout(), MeshShape(), config).losses
    assert simulate("cp=2", config).losses == pytest.approx(want, rel=1e-4)
    assert train(Layout(), MeshShape(), replace(config, fp8="none")).losses != pytest.approx(
        want, rel=1e-4
    )
