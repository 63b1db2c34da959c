"""Runs of train.py on a GPU that watch themselves, and runs that are the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtron.distributed.bit_hash import bit_hash, odd_weights
from tests.helpers.checkpoints import weights
from tests.helpers.texts import corpus
from tests.helpers.train_cli import SIX, enter, losses, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]
BITWISE = [*SIX, "--device=cuda", "--deterministic"]
WATCHED = ["--watch-every=2"]
MODELS = {
    "dense": [],
    "experts": ["--model.moe.experts=4", "--model.moe.top-k=2", "--model.moe.mlp=32"],
    "delta net": ["--model.pattern=LA", "--model.layers=2"],
}


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enter(corpus(tmp_path).parent, monkeypatch)
    return tmp_path / "run"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_run_twice_has_the_same_bits(run_dir, name):
    """The second run watches itself. A look beside a recorded step changes nothing."""
    second = run_dir.with_name("second")
    want = run(run_dir, *BITWISE, *MODELS[name])
    got = run(second, *BITWISE, *MODELS[name], *WATCHED)
    assert losses(got) == losses(want) and len(set(losses(want))) == 6
    assert weights(second) == weights(run_dir)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_a_hash_is_that_of_the_cpu(dtype):
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    want = bit_hash(x, odd_weights(1 << 12))
    assert bit_hash(x.cuda(), odd_weights(1 << 12, "cuda")).item() == want.item()
    x.view(torch.uint8)[1234] ^= 16
    assert bit_hash(x.cuda(), odd_weights(1 << 12, "cuda")).item() != want.item()
