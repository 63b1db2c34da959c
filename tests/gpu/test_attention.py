"""Attention in bfloat16 on a GPU: its fused kernels against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.layers.attention_kernels import CORES, attention_reference
from dtron.layers.attention_mask import AttentionMask
from tests.helpers.compiled import as_unit

pytestmark = pytest.mark.gpu


# Every feature of a mask, alone and together: window, documents, soft-cap, sinks.
MASKS = {
    "causal": (None, False, None, False),
    "window": (100, False, None, False),
    "documents": (None, True, None, False),
    "softcap": (None, False, 2.0, False),
    "sinks": (None, False, None, True),
    "window, documents": (100, True, None, False),
    "all": (100, True, 2.0, True),
}


def inputs(seq_len: int, documents: bool, sinks: bool, head_dim: int = 128):
    """Queries, keys, values, sinks and documents. bfloat16 represents the values exactly."""
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=g).bfloat16()
    # The layer's memory layout: token-major, heads inside.
    q, k, v = (draw(2, seq_len, n, head_dim).transpose(1, 2) for n in (8, 2, 2))
    ids = (
        (torch.rand(2, seq_len, device="cuda", generator=g) < 0.01).cumsum(1) if documents else None
    )
    return [q, k, v, *([draw(8)] if sinks else [])], ids


def forward_and_backward(core, xs: list, ids, mask: AttentionMask, dtype: torch.dtype) -> list:
    xs = [x.detach().to(dtype).requires_grad_() for x in xs]
    y = core(*xs[:3], ids, xs[3] if len(xs) > 3 else None, mask)
    g = torch.Generator("cuda").manual_seed(1)
    return [
        y,
        *torch.autograd.grad(y, xs, torch.randn(y.shape, device="cuda", generator=g).to(dtype)),
    ]


def difference(
    core, xs: list, ids, mask: AttentionMask, wrong: AttentionMask | None = None
) -> float:
    """The error of a kernel in bfloat16 against the reference in float32: the largest relative
    error of output and gradients."""
    want = forward_and_backward(attention_reference, xs, ids, wrong or mask, torch.float32)
    got = forward_and_backward(core, xs, ids, mask, torch.bfloat16)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("seq_len", [512, 1000])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("path", ["sdpa", "flex"])
def test_attention_in_bfloat16_is_the_reference(path, name, compile, seq_len):
    window, documents, softcap, sinks = MASKS[name]
    if path == "sdpa" and (compile or softcap or sinks):
        pytest.skip("sdpa has no soft-cap and no sinks, and compiled it is the same kernels")
    core = CORES[path]
    if compile:
        core = as_unit(CORES[path])
    xs, ids = inputs(seq_len, documents, sinks)
    mask = AttentionMask(seq_len, window, softcap)
    assert difference(core, xs, ids, mask) < 2e-2
    assert difference(core, xs, ids, mask, replace(mask, window=50)) > 5e-2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
def test_flex_takes_any_head_dim_from_16(head_dim):
    window, documents, softcap, sinks = MASKS["all"]
    xs, ids = inputs(300, documents, sinks, head_dim)
    assert difference(CORES["flex"], xs, ids, AttentionMask(300, window, softcap)) < 2e-2


@pytest.mark.usefixtures("fresh_compiler")
def test_flex_in_the_eager_program_makes_no_square_matrix():
    """A square matrix would be 2 rows by 8 heads by 8192 by 8192 scores: 2 GiB in bfloat16."""
    xs, ids = inputs(8192, True, True)

    def run():
        return forward_and_backward(
            CORES["flex"], xs, ids, AttentionMask(8192, 1000, 2.0), torch.bfloat16
        )

    run()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.max_memory_allocated() - before < 2**30
