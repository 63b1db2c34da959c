"""Change the mesh, not the result: ten steps, initial weights, and resuming, in float32, on simulated ranks
and on real gloo processes."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import MODEL, digest, on_pool, simulate, train

from dtron import checkpoint
from dtron.config import DataConfig, RunConfig
from dtron.dtensor import full
from dtron.layers.rope import Rope
from dtron.mesh import Layout, build_mesh, rules_for
from dtron.model import declare_model
from dtron.optim import adam_init
from dtron.params import flat, init, tree_map
from dtron.shape import MeshShape
from dtron.simulate import simulated

TEN = RunConfig(model=MODEL, data=DataConfig(sequence=16), batch=8, steps=10, seed=3)
MESHES = ["dp=4", "tp=4", "dp_replicate=2,dp=2"]


@pytest.fixture(scope="module")
def one_device():
    return train(Layout(), MeshShape(), TEN)


def agree(got: list[float], want: list[float]) -> None:
    assert got == pytest.approx(want, rel=1e-5)
    assert want[-1] < want[0] - 0.5  # it learns: the agreement is not that of two programs that stand still


def test_microbatches_do_not_change_the_losses(one_device):
    for micro_batch in (1, 2, 4):
        agree(train(Layout(), MeshShape(), replace(TEN, micro_batch=micro_batch)).losses, one_device.losses)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_does_not_change_the_losses(one_device, recompute):
    assert train(Layout(), MeshShape(), replace(TEN, recompute=recompute)).losses == one_device.losses


@pytest.mark.parametrize(
    ("mesh", "zero", "micro_batch"),
    [*((m, 1, None) for m in MESHES), *(("dp=2,tp=2", z, 2 if z == 2 else None) for z in (0, 1, 2, 3))],
)
def test_ten_steps_on_simulated_ranks(one_device, mesh, zero, micro_batch):
    got = simulate(mesh, replace(TEN, zero=zero, micro_batch=micro_batch))
    assert got.initial == one_device.initial
    agree(got.losses, one_device.losses)
    assert got.norms == pytest.approx(one_device.norms, rel=1e-4)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero", "micro_batch"),
    [
        *((m, 1, None) for m in MESHES),
        *(("dp=2,tp=2", z, 2 if z == 2 else None) for z in (0, 1, 2, 3)),
        ("dp_replicate=2,dp=2", 3, 1),
    ],
)
def test_ten_steps_on_real_ranks(pool, one_device, mesh, zero, micro_batch):
    for losses, norms, initial in pool.run(on_pool, mesh, replace(TEN, zero=zero, micro_batch=micro_batch)):
        assert initial == one_device.initial
        agree(losses, one_device.losses)
        assert norms == pytest.approx(one_device.norms, rel=1e-4)


@pytest.mark.xdist_group("pool")
def test_real_and_simulated_ranks_agree_in_float64(pool):
    """And with a weight that dp does not divide: embed=10 over four ranks."""
    config = replace(TEN, model=replace(MODEL, embed=10), zero=3, steps=3)
    want = simulate("dp=4", config, torch.float64)
    for losses, _, _ in pool.run(on_pool, "dp=4", config, torch.float64):
        assert losses == pytest.approx(want.losses, rel=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_no_tensor_behind(recompute):
    """A reference cycle keeps a step's tensors until the garbage collector comes by: on a GPU, memory that
    grows for a while."""

    def alive() -> int:
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()
    try:
        for steps in (1, 1, 4):  # the first fills torch's own caches
            history = train(Layout(), MeshShape(), replace(TEN, steps=steps, recompute=recompute))
            counts.append(alive())
            del history
    finally:
        gc.enable()
    assert counts[1] == counts[2]


def test_another_seed_is_another_run(one_device):
    other = train(Layout(), MeshShape(), replace(TEN, seed=4))
    assert other.initial != one_device.initial
    with pytest.raises(AssertionError):
        agree(other.losses, one_device.losses)


def test_bfloat16_gradients_reduced_in_float32_stay_close():
    """Compute in bfloat16 with float32 masters: the loss follows float32's, on one device and under
    ZeRO-3."""
    config = replace(TEN, zero=3, steps=3)
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


# ---- checkpoints


SPEC, SAME = declare_model(MODEL), checkpoint.identity_of(TEN, "text")


def fresh(layout: Layout, seed: int = 3) -> checkpoint.TrainState:
    params = init(declare_model(MODEL), MODEL.dims(), seed, layout)
    return checkpoint.TrainState(0, 0, params, adam_init(params))


def used(layout: Layout) -> checkpoint.TrainState:
    """A state in which every tensor differs from a fresh one's."""
    state = fresh(layout)
    move = lambda tree, by: tree_map(lambda t: t + by, tree)
    opt = replace(state.opt, step=7, m=move(state.opt.m, 0.5), v=move(state.opt.v, 0.25))
    return checkpoint.TrainState(7, 56, move(state.params, 1.0), opt)


def digests(state: checkpoint.TrainState) -> tuple[str, str, str]:
    return digest(state.params), digest(state.opt.m), digest(state.opt.v)


def save_on_pool(mesh: str, zero: int, folder: str) -> None:
    layout = Layout(build_mesh(MeshShape.parse(mesh), "cpu"), rules_for(zero))
    checkpoint.save(Path(folder), used(layout), SPEC, SAME)


def load_on_pool(mesh: str, zero: int, folder: str) -> tuple:
    layout = Layout(build_mesh(MeshShape.parse(mesh), "cpu"), rules_for(zero))
    state = checkpoint.load(checkpoint.newest(Path(folder)), fresh(layout), SPEC, SAME)
    return state.step, state.samples, state.opt.step, digests(state)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(("dp=2,tp=2", 3), ("tp=4", 0)), (("dp=4", 1), ("dp_replicate=2,dp=2", 2)), (("tp=4", 0), ("dp=4", 3))],
)
def test_a_checkpoint_of_real_ranks_loads_on_any_mesh(pool, tmp_path, saved, loaded):
    """Known limit elsewhere: resuming could not change tp."""
    want = digests(used(Layout()))
    pool.run(save_on_pool, *saved, str(tmp_path))
    for step, samples, updates, got in pool.run(load_on_pool, *loaded, str(tmp_path)):
        assert (step, samples, updates) == (7, 56, 7) and got == want
    for mesh in ("dp=1", "dp=3,tp=2"):  # one device, and simulated ranks that divide nothing
        with simulated(MeshShape.parse(mesh)) as device_mesh:
            state = checkpoint.load(checkpoint.newest(tmp_path), fresh(Layout(device_mesh)), SPEC, SAME)
            assert digests(state) == want


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2,tp=2"])
def test_a_checkpoint_of_simulated_ranks_loads_on_one_device(tmp_path, mesh):
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        checkpoint.save(tmp_path, used(Layout(device_mesh)), SPEC, SAME)
    state = checkpoint.load(checkpoint.newest(tmp_path), fresh(Layout()), SPEC, SAME)
    assert digests(state) == digests(used(Layout())) != digests(fresh(Layout()))


def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, used(Layout()), SPEC, SAME)


def refused(path: Path, **changes) -> str:
    with pytest.raises(ValueError) as error:
        config = replace(TEN, **changes)
        checkpoint.load(path, fresh(Layout()), SPEC, checkpoint.identity_of(config, "text"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path)
    data = max(path.iterdir(), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    assert "not whole" in refused(path) and data.name in refused(path)
    data.unlink()
    assert "0 of" in refused(path)


def test_a_corrupt_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path)
    (path / ".metadata").write_bytes(b"x" * (path / ".metadata").stat().st_size)
    assert "delete it" in refused(path)
    (path / "meta.json").write_text("{")
    assert "no readable checkpoint" in refused(path)


def test_a_checkpoint_of_another_model_or_seed_is_refused(tmp_path):
    path = saved(tmp_path)
    assert "--model.mlp 40" in refused(path, model=replace(MODEL, mlp=48))
    assert "--model.qk-norm" in refused(path, model=replace(MODEL, qk_norm=False))
    assert "--model.rope.theta 10000.0" in refused(path, model=replace(MODEL, rope=Rope(5e5)))
    assert "--data.sequence 16" in refused(path, data=DataConfig(sequence=8))
    assert "--seed 3" in refused(path, seed=4)
    with pytest.raises(ValueError, match="other text"):
        checkpoint.load(path, fresh(Layout()), SPEC, SAME | {"text": "other"})


def test_a_checkpoint_in_the_making_is_not_found(tmp_path):
    path = saved(tmp_path)
    later = path.with_name("step-00000009.part")
    later.mkdir()
    (path.with_name("step-00000008")).mkdir()  # without meta.json: not whole
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_meta(path)["step"] == 7


def test_an_unwritable_folder_is_one_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot write the checkpoint"):
        checkpoint.save(blocked, used(Layout()), SPEC, SAME)


def test_metrics_survive_a_resume_with_every_step_once(tmp_path):
    from dtron.metrics import Metrics

    def steps(start: int, end: int) -> None:
        metrics = Metrics(tmp_path, "cpu", 1, 1e6, 5, start, main=True)
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
    wanted = (
        "step loss grad_norm lr tokens tokens_per_s tflops_per_device mfu memory_gib step_seconds data_wait"
    )
    assert set(lines[0]) == set(wanted.split()) and lines[0]["mfu"] is None


def test_full_of_a_simulated_tensor_checks_that_ranks_agree():
    """`full` does not paper over ranks that have drifted apart."""
    with simulated(MeshShape(tp=2)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.arange(4.0), "act_embed")
        assert full(x).tolist() == [0, 1, 2, 3]
        part = layout.shard(torch.arange(4.0), "mlp").to_local()
        with pytest.raises((AssertionError, RuntimeError)):
            full(part)
