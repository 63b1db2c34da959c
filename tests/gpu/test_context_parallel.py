"""Context parallelism on GPUs: the fused blocks of a ring, and two GPUs against one."""

from __future__ import annotations

import pytest
import torch

from dtron.layers import attention_block_kernels, ring_attention
from tests.gpu.test_training import losses
from tests.helpers.compiled import as_unit

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("head_dim", "kernel"), [(128, "cudnn"), (64, "cudnn"), (256, "flash"), (12, "written")]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compile", [False, True])
def test_blocks_under_the_softmax_of_all_keys(head_dim, kernel, causal, compile):
    """Two shards of the keys, in bfloat16, against autograd through the reference in float64."""
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda n, s: torch.randn(2, n, s, head_dim, device="cuda", generator=g)
    q, k, v, k_2, v_2, grad = (
        draw(n, s) for n, s in ((4, 256), (2, 256), (2, 256), (2, 128), (2, 128), (4, 256))
    )
    exact = [x.double().requires_grad_() for x in (q, k, v, k_2, v_2)]

    def whole(q, k, v, k_2, v_2, block):
        return ring_attention.merge(block(q, k, v, causal)[:2], block(q, k_2, v_2, False)[:2])

    want_o, want_lse = whole(*exact, attention_block_kernels.block_forward)
    want = torch.autograd.grad(want_o, exact, grad.double())

    def run(q, k, v, k_2, v_2, grad):
        one, two = (
            attention_block_kernels.block_forward(q, k, v, causal),
            attention_block_kernels.block_forward(q, k_2, v_2, False),
        )
        o, lse = ring_attention.merge(one[:2], two[:2])
        o = o.to(q.dtype)
        result = attention_block_kernels.BlockResult(o, lse, one.dropout)
        a = attention_block_kernels.block_backward(grad, q, k, v, result, causal)
        b = attention_block_kernels.block_backward(grad, q, k_2, v_2, result, False)
        return o, lse, a[0] + b[0], *a[1:], *b[1:]

    half = [x.bfloat16() for x in (q, k, v, k_2, v_2, grad)]
    if kernel != "cudnn" or torch.cuda.get_device_capability() >= (9, 0):
        assert attention_block_kernels.kernel(half[0], half[2]) == kernel
    with torch.no_grad():
        got = (as_unit(run) if compile else run)(*half)
    for a, b in zip(got, (want_o, want_lse, *want), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize(
    "flags",
    ["--cp-method ring", "--cp-method allgather", "--cp-method ulysses", "--data.document-mask"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_have_the_losses_of_one(tmp_path, flags, dtype):
    """In bfloat16 with fused kernels, to the precision of bfloat16."""
    own = [*flags.split(), "--dtype", dtype]
    on_one = [*([] if "--cp-method" in flags else flags.split()), "--dtype", dtype]
    want = losses(tmp_path / "one", *on_one)
    got = losses(tmp_path / "two", "--mesh", "cp=2", *own, processes=2)
    assert got == pytest.approx(want, rel=1e-5 if dtype == "float32" else 5e-3)
