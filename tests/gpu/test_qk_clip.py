"""QK-clip on GPUs: the largest logits of plain matmuls, compiled and recorded as eager, on two as
on one."""

from __future__ import annotations

import pytest
import torch

from dtron.layers.attention_logits import largest_logits
from dtron.layers.attention_mask import AttentionMask
from tests.gpu.test_training import losses

pytestmark = pytest.mark.gpu
CLIP = ["--optim.qk-clip", "1", "--model.init-std", "0.1", "--optim.warmup", "2"]


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_largest_logits_of_long_rows(window, packed):
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda heads: torch.randn(2, heads, 2048, 64, generator=g, device="cuda").bfloat16()
    q, k, i = make(32), make(8), torch.arange(2048, device="cuda")
    documents = i.repeat(2, 1) // 700 if packed else None
    got = largest_logits(q, k, documents, AttentionMask(2048, window))
    logits = q.float() @ k.float().repeat_interleave(4, 1).mT / 8
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or 2048))
    if documents is not None:
        seen = seen & (documents[0][:, None] == documents[0])
    want = logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_compiled_and_recorded_as_eager(tmp_path, name):
    own = [*CLIP, "--optim.name", name]
    want = losses(tmp_path / "eager", *own, "--compile", "off", dtype="bfloat16")
    got = losses(tmp_path / "compiled", *own, dtype="bfloat16")
    assert got == pytest.approx(want, rel=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "cp=2", "pp=2"])
def test_two_gpus_have_the_losses_of_one(tmp_path, mesh):
    want = losses(tmp_path / "one", *CLIP, dtype="bfloat16")
    two = ["--mesh", mesh, "--zero", "3"]
    got = losses(tmp_path / "two", *CLIP, *two, processes=2, dtype="bfloat16")
    assert got == pytest.approx(want, rel=5e-3)
