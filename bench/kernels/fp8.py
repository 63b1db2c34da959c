"""Time one matmul in FP8 and in bfloat16: forward and both gradients, compiled.

    python bench/kernels/fp8.py
    python bench/kernels/fp8.py --sizes 8192x4096x4096 16384x2048x5632 --recipes tensorwise

Sizes are tokens x in x out. Prints one JSON line per size and recipe, then a table. Several calls
are captured in one CUDA graph, so no matmul waits for the host. Each call casts the weight, as in a
model. A CPU emulates FP8, so its times mean nothing; ``--device cpu`` only tests this program.
Needs torch and torchao, nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dtron.fp8.matmul import compile_options, matmul
from dtron.fp8.recipe import Recipe
from dtron.fp8.recipes import RECIPES

SIZES = [
    "8192x2048x2048",
    "8192x2048x5632",
    "16384x2048x5632",
    "8192x2048x11264",
    "8192x4096x1024",
    "8192x4096x4096",
    "8192x4096x14336",
    "8192x14336x4096",
    "8192x4096x28672",
    "16384x4096x14336",
]


def milliseconds(fn: Callable[[], object], calls: int, repeats: int, device: str) -> float:
    """Return the time of one call: the median of ``repeats`` measurements of ``calls`` calls."""
    if device == "cpu":
        fn()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            times.append((time.perf_counter() - start) * 1e3 / calls)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and cuBLAS's allocations cannot be captured
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()
    graph.replay()
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for one, other in zip(begin, end, strict=True):
        one.record()
        graph.replay()
        other.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(begin, end, strict=True)) / calls


def measure(
    tokens: int, inner: int, outer: int, recipe: Recipe | None, args: argparse.Namespace
) -> dict:
    torch.compiler.reset()
    make = partial(torch.randn, device=args.device, dtype=torch.bfloat16)
    x, w = make(tokens, inner).requires_grad_(), make(inner, outer).requires_grad_()
    g = make(tokens, outer)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return matmul(x, w, recipe)

    options = compile_options(recipe)
    compiled = torch.compile(product, fullgraph=True, dynamic=False, options=options)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(x, w), (x, w), g)

    ms = milliseconds(run, args.calls, args.repeats, args.device)
    return {
        "size": f"{tokens}x{inner}x{outer}",
        "recipe": recipe.name if recipe else "bfloat16",
        "ms": round(ms, 4),
        "tflops": round(6e-9 * tokens * inner * outer / ms, 1),
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description="Time matmuls in FP8 and in bfloat16, forward and backward."
    )
    p.add_argument(
        "--sizes", nargs="+", default=SIZES, help="tokens x in x out, as 8192x4096x14336"
    )
    p.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    p.add_argument("--calls", type=int, default=10, help="captured in one graph")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no GPU; use --device cpu")
    name = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    rows = [f"{name}, torch {torch.__version__}", "", "| tokens x in x out | bf16 TFLOP/s | "]
    rows[-1] += " | ".join(args.recipes) + " |"
    rows.append("|---" * (2 + len(args.recipes)) + "|")
    for size in args.sizes:
        t, i, o = map(int, size.split("x"))
        recipes = [replace(RECIPES[name], min_weights=0) for name in args.recipes]
        results = [measure(t, i, o, recipe, args) for recipe in (None, *recipes)]
        for result in results:
            print(json.dumps(result), flush=True)
        plain, *others = results
        times = " | ".join(f"{plain['ms'] / r['ms']:.2f}x" for r in others)
        rows.append(f"| {t} x {i} x {o} | {plain['tflops']:.0f} | {times} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
