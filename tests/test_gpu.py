"""What only a GPU can show: bfloat16 training, the fused kernels it picks, and NCCL. ``pytest -m gpu``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import MODEL, train

from dtron.config import DataConfig, RunConfig
from dtron.layers.attention import Mask, attention_fused, attention_reference
from dtron.mesh import Layout
from dtron.shape import MeshShape

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
TEN = RunConfig(model=MODEL, data=DataConfig(sequence=16), batch=8, steps=10, seed=3)


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
    """The runner and backwards in halves; the stages share the GPU and hand over."""
    config = replace(TEN, model=replace(MODEL, layers=4), schedule=schedule, batch=8, micro_batch=1)
    want = train(Layout(compute=torch.bfloat16), MeshShape(), replace(config, schedule="1f1b"), device="cuda")
    got = train(Layout(compute=torch.bfloat16), MeshShape(pp=2), config, device="cuda")
    assert got.losses == pytest.approx(want.losses, rel=1e-3)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_fused_attention_in_bfloat16_is_the_reference(window, documents):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 8, 512, 128, device="cuda", generator=g)
    k, v = (torch.randn(2, 2, 512, 128, device="cuda", generator=g) for _ in range(2))
    ids = (torch.rand(2, 512, device="cuda", generator=g) < 0.01).cumsum(1) if documents else None
    mask = Mask(512, window)

    def run(core, dtype):
        xs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = core(*xs, ids, mask)
        return y, *torch.autograd.grad(y, xs, torch.ones_like(y))

    for want, got in zip(
        run(attention_reference, torch.float32), run(attention_fused, torch.bfloat16), strict=True
    ):
        assert ((got.float() - want).norm() / want.norm()) < 1e-2


def losses(folder: Path, *flags: str, processes: int = 1) -> list[float]:
    """Of train.py, started as a user would."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "train.py")]
    common = ["--run-dir", str(folder), "--steps", "10", "--dtype", "float32", "--sample", "0"]
    subprocess.run([*program, *common, *flags], check=True, cwd=ROOT, timeout=300)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize(
    "flags",
    [
        "--mesh dp=2 --zero 3",
        "--mesh tp=2",
        "--mesh dp=2 --zero 1",
        "--mesh pp=2",
        "--mesh pp=2 --schedule zb-v",
    ],
)
def test_two_gpus_have_the_losses_of_one(tmp_path, flags):
    want = losses(tmp_path / "one")
    got = losses(tmp_path / "two", *flags.split(), processes=2)
    assert got == pytest.approx(want, rel=1e-5)
