"""What only a GPU can show: bfloat16 training, the fused kernels it picks, and NCCL. ``pytest -m
gpu``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.compute_config import ComputeConfig
from dtron.model.presets import preset
from dtron.params import init
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.gradients import gradients
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage, pipeline, program
from dtron.training.step import TrainStep
from dtron.tree import flat, tree_map
from tests.helpers.paths import ROOT
from tests.helpers.runs import MODEL, random_rows, train
from tests.helpers.values import ADAMW

pytestmark = pytest.mark.gpu
TEN = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=8, steps=10, seed=3)


def test_ten_steps_in_float32_are_those_of_the_cpu():
    want = train(Layout(), MeshShape(), TEN)
    got = train(Layout(), MeshShape(), TEN, device="cuda")
    assert got.losses == pytest.approx(want.losses, rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_ten_steps_in_bfloat16_follow_float32(recompute):
    want = train(Layout(), MeshShape(), TEN, device="cuda")
    config = replace(TEN, recompute=recompute)
    got = train(Layout(compute=torch.bfloat16), MeshShape(), config, device="cuda")
    assert got.losses == pytest.approx(want.losses, rel=3e-2) and got.losses != want.losses
    assert got.losses[-1] < got.losses[0] - 0.5


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_pipeline_stages_on_one_gpu(schedule):
    """The runner and split backwards. The stages share the GPU."""
    config = replace(
        TEN,
        model=replace(MODEL, layers=4),
        pipeline=PipelineConfig(schedule),
        batch=8,
        micro_batch=1,
    )
    want = train(
        Layout(compute=torch.bfloat16),
        MeshShape(),
        replace(config, pipeline=PipelineConfig()),
        device="cuda",
    )
    got = train(Layout(compute=torch.bfloat16), MeshShape(pp=2), config, device="cuda")
    assert got.losses == pytest.approx(want.losses, rel=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_a_model_with_every_mask(recompute, compile):
    """``auto`` is flex here. Eager and compiled stages in float32 against the reference. The
    microbatches have different documents."""
    model = replace(MODEL, head_dim=16, context=200, window=50, softcap=2.0, sinks=True)
    layout, g = Layout(), torch.Generator().manual_seed(0)
    rows = torch.randint(model.vocab, (4, 201), generator=g).cuda()
    documents = (torch.rand(4, 200, generator=g) < 0.02).cumsum(1).cuda()
    batches = [
        make_batch(r, layout, d) for r, d in zip(rows.chunk(2), documents.chunk(2), strict=True)
    ]
    pipe = one_stage(model, 2, layout)
    params = tree_map(lambda w: w.cuda(), init(pipe.spec, model.dims(), 0, layout))

    def run(how: ComputeConfig, compile: bool) -> list:
        functions = program(model, layout, how)
        functions = compiled(functions, layout) if compile else functions
        loss, grads, _ = gradients(functions, params, batches, 800, pipe, 1)
        return [loss, *flat(grads)]

    want = run(ComputeConfig(attention_kernel="reference"), False)
    got = run(ComputeConfig(recompute), compile)
    for a, b in zip(got, want, strict=True):
        assert b.norm() > 0 and ((a - b).norm() / b.norm()).item() < 2e-3


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-deepseek"])
def test_compiled_gradients_in_bfloat16_are_those_of_eager(name):
    """Tokens choose experts by a fixed rule, so that rounding sends no token to another expert."""
    m = preset(name)
    m = replace(m, layers=3, moe=replace(m.moe, balanced=True)) if m.moe.experts else m
    layout = Layout(compute=torch.bfloat16)
    pipe = one_stage(m, 1, layout)
    params = tree_map(lambda w: w.cuda(), init(pipe.spec, m.dims(), 0, layout))
    rows = torch.randint(m.vocab, (2, 129), generator=torch.Generator().manual_seed(0)).cuda()
    batches = [make_batch(rows, layout, depth=m.mtp.depth)]
    plain = program(m, layout)
    want, got = (
        gradients(fn, params, batches, 256, pipe, 1)[:2] for fn in (plain, compiled(plain, layout))
    )
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-3)
    for w, a, b in zip(flat(pipe.spec), flat(got[1]), flat(want[1]), strict=True):
        assert w.buffer or (
            b.norm() > 0 and (a.float() - b.float()).norm() / b.float().norm() < 5e-2
        ), w.path


@pytest.mark.parametrize("count", [1, 2])
def test_a_recorded_step_is_the_step(count):
    """Replayed with other batches, learning rates and token counts than at recording."""
    config, layout = replace(TEN, batch=8, micro_batch=8 // count), Layout()
    found = []
    for record in (False, True):
        pipe = one_stage(MODEL, count, layout)
        params = tree_map(lambda w: w.cuda(), init(pipe.spec, MODEL.dims(), 0, layout))
        opt, functions = (
            init_state(ADAMW, pipe.spec, params),
            compiled(program(MODEL, layout), layout),
        )
        step = TrainStep(functions, pipe, RunConfig(model=MODEL), ADAMW.compiled())
        step = CudaGraphStep(step, "cuda") if record else step
        for number in range(8):
            rows = random_rows(config, number)
            rows[:number, -3:] = IGNORE
            batches = [make_batch(r, layout) for r in rows.cuda().chunk(count)]
            loss, norm, _, params, opt = step(
                params, opt, batches, valid_tokens(rows), 1e-2 / (1 + number)
            )
            found.append((loss.item(), norm.item()))
        assert opt.step == 8
    plain, recorded = found[:8], found[8:]
    assert recorded == [pytest.approx(x, rel=1e-5) for x in plain] and len(set(plain)) == 8


def test_each_size_of_a_ramp_is_recorded():
    """Steps of one, two and one microbatches, with the weight decay of a schedule."""
    counts, config, layout = (1,) * 6 + (2,) * 6 + (1,) * 5, replace(TEN, micro_batch=4), Layout()
    found = {}
    for record in (False, True):
        pipe = pipeline(RunConfig(model=MODEL), MeshShape(), 1, 16, layout, (2,))
        params = tree_map(lambda w: w.cuda(), init(pipe.spec, MODEL.dims(), 0, layout))
        opt = init_state(ADAMW, pipe.spec, params)
        functions = compiled(program(MODEL, layout), layout)
        step = TrainStep(functions, pipe, RunConfig(model=MODEL), ADAMW.compiled())
        step = CudaGraphStep(step, "cuda") if record else step
        found[record] = []
        for number, count in enumerate(counts):
            rows = random_rows(replace(config, batch=4 * count), number)
            batches = [make_batch(r, layout) for r in rows.cuda().chunk(count)]
            loss, norm, _, params, opt = step(
                params, opt, batches, valid_tokens(rows), 1e-2, decay=20 / (1 + number)
            )
            found[record].append((loss.item(), norm.item()))
    assert found[True] == [pytest.approx(x, rel=1e-5) for x in found[False]]


def losses(folder: Path, *flags: str, processes: int = 1, dtype: str = "float32") -> list[float]:
    """The losses of train.py, started as a user starts it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "train.py")]
    common = ["--run-dir", str(folder), "--steps", "10", "--dtype", dtype, "--sample-tokens", "0"]
    subprocess.run([*program, *common, *flags], check=True, cwd=ROOT, timeout=300)
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize(
    "flags",
    [
        "--mesh dp=2 --zero 3",
        "--mesh tp=2",
        "--mesh dp=2 --zero 1",
        "--mesh tp=2 --recompute full",
        "--mesh cp=2 --cp-method ulysses --recompute full",
        "--mesh pp=2",
        "--mesh pp=2 --pipeline.schedule zb-v",
    ],
)
def test_two_gpus_have_the_losses_of_one(tmp_path, flags):
    want = losses(tmp_path / "one")
    got = losses(tmp_path / "two", *flags.split(), processes=2)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize("compile", ["on", "off"])
def test_two_gpus_by_copy_engines_have_the_losses_of_nccl(tmp_path, compile):
    """In bfloat16: copy engines read weights from other GPUs, and each GPU sums the gradients that
    it receives. Compiled steps are in a CUDA graph from the fourth step on."""
    flags = ["--mesh", "dp=2", "--zero", "3", "--compile", compile]
    want, got = (
        losses(tmp_path / how, *flags, "--copy-engines", how, processes=2, dtype="bfloat16")
        for how in ("off", "auto")
    )
    assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
def test_two_gpus_in_a_pipeline_say_what_diverged(tmp_path):
    """The diagnosis runs kernels that no step has run, while messages are in flight."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "train.py"),
    ]
    flags = [
        "--mesh",
        "pp=2",
        "--optim.lr",
        "1e30",
        "--max-nonfinite-steps",
        "2",
        "--run-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, *launch, *flags], cwd=ROOT, timeout=300, capture_output=True, text=True
    )
    assert done.returncode and "The run has diverged: lower --optim.lr" in done.stdout + done.stderr
