"""The rates of matmuls and attention, for calibrate.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernels.under_load import Load, Pool, Timing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

GHZ = 1.6  # the clock of all rates in the file
SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384]
BATCHED = [
    *((n, 64, 64, 128) for n in (256, 1024, 4096, 16384)),
    *((n, 64, 128, 64) for n in (256, 1024, 4096, 16384)),
    *((n, 128, 128, 64) for n in (256, 1024, 4096)),
    *((n, 1024, 1024, 128) for n in (16, 64)),
    *((n, 2048, 2048, 2048) for n in (4, 24)),
    *((64, m, 768, 2048) for m in (256, 2048)),
]
GROUPED = [
    (tokens, n, k, experts)
    for tokens in (8192, 32768, 131072)
    for n, k, experts in ((768, 2048, 128), (2048, 768, 128), (1408, 2048, 64), (4096, 4096, 8))
]
ATTENTION = [(d, s) for d in (64, 128) for s in (1024, 2048, 4096, 8192, 32768, 131072)]
FLEX = [(64, 4096), (128, 4096), (128, 32768)]


def tflops(flops: float, timing: Timing) -> float:
    """Return TFLOP/s at a clock of ``GHZ``. Matmuls and attention are as fast as the clock."""
    return round(1e-12 * flops / timing.seconds * GHZ / timing.ghz, 1)


def grid(time_of: Callable[[int, int, int], Timing]) -> list[list[list[float]]]:
    """Return TFLOP/s for all M, N and K of ``SIZES``."""
    return [
        [[tflops(2 * m * n * k, time_of(m, n, k)) for k in SIZES] for n in SIZES] for m in SIZES
    ]


def matmuls(load: Load) -> dict[str, Any]:
    """Return the rates of matmuls in bfloat16, by layout: x w, g wᵀ and xᵀ g."""
    pool = load.bf16

    def seconds(layout: str, m: int, n: int, k: int) -> Timing:
        def call(i: int) -> Tensor:
            a = pool.take((m, k), i) if layout[0] == "n" else pool.take((k, m), i).t()
            b = pool.take((k, n), i, 1) if layout[1] == "n" else pool.take((n, k), i, 1).t()
            return torch.mm(a, b, out=load.result((m, n), i))

        return load.measure(call, repeats=3)

    return {"sizes": SIZES, **{x: grid(partial(seconds, x)) for x in ("nn", "nt", "tn")}}


def fp8_matmuls(load: Load) -> dict[str, Any]:
    """Return the rates of matmuls in FP8 with one scale a tensor: the layout that GPUs take."""
    pool, one = Pool(torch.float8_e4m3fn, 1 << 30), torch.ones((), device="cuda")

    def seconds(m: int, n: int, k: int) -> Timing:
        def call(i: int) -> Tensor:
            a, b = pool.take((m, k), i), pool.take((n, k), i, 1).t()
            return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        return load.measure(call, repeats=3)

    return {"sizes": SIZES, "nt": grid(seconds)}


def float32_matmuls(load: Load) -> list[list[float]]:
    """Return rows of M, N, K and TFLOP/s, for the shapes of a router."""
    pool, rows = Pool(torch.float32, 1 << 28), []
    for m, n, k in [(8192, 64, 2048), (16384, 128, 2048), (16384, 2048, 128), (2048, 128, 16384)]:

        def call(i: int, m: int = m, n: int = n, k: int = k) -> Tensor:
            return torch.mm(pool.take((m, k), i), pool.take((k, n), i, 1))

        rows.append([m, n, k, tflops(2 * m * n * k, load.measure(call))])
    return rows


def batched(load: Load) -> list[list[float]]:
    """Return rows of batch, M, N, K and TFLOP/s."""
    rows = []
    for b, m, n, k in BATCHED:

        def call(i: int, b: int = b, m: int = m, n: int = n, k: int = k) -> Tensor:
            return torch.bmm(load.bf16.take((b, m, k), i), load.bf16.take((b, k, n), i, 1))

        rows.append([b, m, n, k, tflops(2 * b * m * n * k, load.measure(call))])
    return rows


def grouped(load: Load) -> list[list[float]]:
    """Return rows of M (rows of all experts), N, K and TFLOP/s of experts' matmuls."""
    rows = []
    for m, n, k, experts in GROUPED:
        ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (m // experts)

        def call(i: int, shape: Any = (m, n, k, experts), ends: Tensor = ends) -> Tensor:
            m, n, k, experts = shape
            x, w = load.bf16.take((m, k), i), load.bf16.take((experts, n, k), i, 1)
            return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

        rows.append([m, n, k, tflops(2 * m * n * k, load.measure(call))])
    return rows


def attention(load: Load, cases: list[tuple[int, int]], flex: bool) -> list[list[float]]:
    """Return rows of head dim, sequence, and TFLOP/s of causal attention forward and backward."""
    rows = []
    for d, s in cases:
        heads = max(16, (1 << 18) // s)
        shape = (1, s, heads, d)  # as in a layer: a token's heads are side by side
        q, k, v, g = (load.bf16.take(shape, 0, x).transpose(1, 2) for x in (0, 1, 2, 1))
        q, k, v = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v))
        if flex:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s, device="cuda")
            run = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
        else:
            run = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = run(q, k, v)
            forward = load.measure(lambda _, r=run, a=(q, k, v): r(*a).detach(), eager=True)
            backward = load.measure(
                lambda _, y=y, a=(q, k, v), g=g: torch.autograd.grad(y, a, g, retain_graph=True),
                eager=True,
            )
        flops = 2 * heads * s * s * d
        rows.append([d, s, tflops(flops, forward), tflops(2.5 * flops, backward)])
    return rows
