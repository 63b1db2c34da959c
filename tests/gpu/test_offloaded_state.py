"""The optimizer's state in pinned memory: the losses of state on the GPU, and less memory."""

from __future__ import annotations

import json

import pytest
import torch

from tests.gpu.test_training import losses

pytestmark = pytest.mark.gpu
BIG = ["--model.embed", "1024", "--model.mlp", "4096", "--model.layers", "8", "--batch", "4"]


def peak(folder) -> float:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["peak_memory_gib"]


@pytest.mark.parametrize("compile", ["on", "off"])
def test_losses_and_memory(tmp_path, compile):
    own = [*BIG, "--compile", compile]
    want = losses(tmp_path / "device", *own, dtype="bfloat16")
    got = losses(tmp_path / "host", *own, "--optim.offload-state", dtype="bfloat16")
    assert got == pytest.approx(want, rel=1e-3)
    assert peak(tmp_path / "host") < peak(tmp_path / "device") - 0.2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_gpus_have_the_losses_of_one(tmp_path, name):
    flags = ["--optim.offload-state", "--optim.name", name]
    flags += [
        "--optim.moments",
        "bfloat16",
        "--optim.master-weights",
        "split",
        "--optim.ema",
        "0.9",
    ]
    want = losses(tmp_path / "one", *flags, dtype="bfloat16")
    two = ["--mesh", "dp=2", "--zero", "3"]
    got = losses(tmp_path / "two", *flags, *two, processes=2, dtype="bfloat16")
    assert got == pytest.approx(want, rel=5e-3)
