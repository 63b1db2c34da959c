"""Change the mesh, not the result: steps and initial weights in float32, on simulated ranks and on
gloo processes.

One mesh of simulated ranks takes ten steps. The others take three, because the second update shows
every mistake."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.tree import flat
from tests.helpers.runs import MODEL, on_pool, simulate, train

TEN = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=8, steps=10, seed=3)
THREE = replace(TEN, steps=3)
PLACES = [  # config, mesh, ZeRO stage, sequences per rank at once
    *((THREE, mesh, 1, None) for mesh in ("dp=4", "tp=4", "dp_replicate=2,dp=2")),
    (THREE, "dp=2,tp=2", 0, None),
    (TEN, "dp=2,tp=2", 1, None),
    (THREE, "dp=2,tp=2", 2, 2),
    (THREE, "dp=2,tp=2", 3, None),
]


@pytest.fixture(scope="module")
def one_device():
    return train(Layout(), MeshShape(), TEN)


def agree(got: list[float], want: list[float]) -> None:
    """Compare as many steps as were taken."""
    assert got == pytest.approx(want[: len(got)], rel=1e-5)
    assert want[-1] < want[0] - 0.5  # it learns, so the programs do not agree by standing still


def test_microbatches_do_not_change_the_losses(one_device):
    for micro_batch in (1, 2, 4):
        agree(
            train(Layout(), MeshShape(), replace(TEN, micro_batch=micro_batch)).losses,
            one_device.losses,
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_does_not_change_the_losses(one_device, recompute):
    assert (
        train(Layout(), MeshShape(), replace(TEN, recompute=recompute)).losses == one_device.losses
    )


@pytest.mark.parametrize(("config", "mesh", "zero", "micro_batch"), PLACES)
def test_steps_on_simulated_ranks(one_device, config, mesh, zero, micro_batch):
    got = simulate(mesh, replace(config, zero=zero, micro_batch=micro_batch))
    assert got.initial == one_device.initial
    agree(got.losses, one_device.losses)
    assert got.norms == pytest.approx(one_device.norms[: config.steps], rel=1e-4)
    assert len(got.losses) == config.steps


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero", "micro_batch"), [*(x[1:] for x in PLACES), ("dp_replicate=2,dp=2", 3, 1)]
)
def test_steps_on_real_ranks(pool, one_device, mesh, zero, micro_batch):
    config = replace(THREE, zero=zero, micro_batch=micro_batch)
    for losses, norms, initial in pool.run(on_pool, mesh, config):
        assert initial == one_device.initial
        agree(losses, one_device.losses)
        assert norms == pytest.approx(one_device.norms[: config.steps], rel=1e-4)
        assert len(losses) == config.steps


@pytest.mark.xdist_group("pool")
def test_real_and_simulated_ranks_agree_in_float64(pool):
    """A weight that dp does not divide: embed=10 over four ranks."""
    config = replace(TEN, model=replace(MODEL, embed=10), zero=3, steps=2)
    want = simulate("dp=4", config, torch.float64)
    for losses, _, _ in pool.run(on_pool, "dp=4", config, torch.float64):
        assert losses == pytest.approx(want.losses, rel=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_no_tensor_behind(recompute):
    """A reference cycle would keep a step's tensors until the garbage collector runs. On a GPU,
    memory would grow for a while."""

    def alive() -> int:
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    gc.collect()
    gc.freeze()  # the objects of before are not looked at
    gc.disable()
    try:
        for steps in (1, 1, 4):  # the first fills torch's own caches
            history = train(Layout(), MeshShape(), replace(TEN, steps=steps, recompute=recompute))
            counts.append(alive())
            del history
    finally:
        gc.enable()
        gc.unfreeze()
    assert counts[1] == counts[2]


def test_another_seed_is_another_run(one_device):
    other = train(Layout(), MeshShape(), replace(TEN, seed=4))
    assert other.initial != one_device.initial
    with pytest.raises(AssertionError):
        agree(other.losses, one_device.losses)


def test_bfloat16_gradients_reduced_in_float32_stay_close():
    """Compute in bfloat16 with float32 masters: the loss follows float32's, on one device and under
    ZeRO-3."""
    config = replace(TEN, zero=3, steps=2)
    want = train(Layout(), MeshShape(), config)
    one = train(Layout(compute=torch.bfloat16), MeshShape(), config)
    with simulated(MeshShape(dp=2, tp=2)) as mesh:
        many = train(Layout(mesh, rules_for(3), torch.bfloat16), MeshShape(dp=2, tp=2), config)
    for got in (one, many):
        assert got.losses == pytest.approx(want.losses, rel=2e-2)
        assert got.losses != want.losses
        assert all(w.dtype == torch.float32 for w in flat(got.params))


def test_gradients_may_be_reduced_in_bfloat16():
    config, shape = replace(TEN, steps=2), MeshShape(dp=2)
    with simulated(shape) as mesh:
        exact = train(Layout(mesh, rules_for(1)), shape, config)
        rough = train(Layout(mesh, rules_for(1), None, torch.bfloat16), shape, config)
    assert rough.norms == pytest.approx(exact.norms, rel=2e-2) and rough.norms != exact.norms


def test_metrics_survive_a_resume_with_every_step_once(tmp_path):
    from dtron.runtime.metrics import Metrics, Throughput

    def steps(start: int, end: int) -> None:
        metrics = Metrics(tmp_path, Throughput("cpu", 1, 1e6), 5, start, main=True)
        for step in range(start + 1, end + 1):
            metrics.write(metrics.step(step, 2.0, 1.0, 1e-3, 64))
        metrics.close()

    steps(0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    steps(2, 5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["tokens"] for line in lines] == [64, 128, 192, 256, 320]
    wanted = "step loss grad_norm lr tokens tokens_per_s tflops_per_device mfu peak_memory_gib"
    wanted += " step_seconds data_wait_ratio"
    assert set(lines[0]) == set(wanted.split()) and lines[0]["mfu"] is None


def test_full_of_a_simulated_tensor_checks_that_ranks_agree():
    """`full` does not hide ranks that have diverged."""
    with simulated(MeshShape(tp=2)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.arange(4.0), "act_embed")
        assert full(x).tolist() == [0, 1, 2, 3]
        part = layout.shard(torch.arange(4.0), "mlp").to_local()
        with pytest.raises((AssertionError, RuntimeError)):
            full(part)
