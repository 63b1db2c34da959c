"""Time one MoE layer and its parts on one GPU: compiled, forward and backward. Prints one line.

    python bench/kernels/experts.py --model bench-moe --tokens 8192

``products`` are the grouped matmuls alone, on rows that are sorted by expert already. ``router``
computes scores and chooses experts. The rest of the layer's time is ``permutation``: sorting,
copying tokens to rows, and adding up results. Needs torch and numpy, nothing else."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dtron.fp8.recipes import RECIPES
from dtron.mesh import Layout
from dtron.model.presets import preset
from dtron.moe.experts import compute
from dtron.moe.layer import MoELayer, moe
from dtron.moe.router import TokenInfo, route
from dtron.params import declare, init
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.metrics import peak_tflops
from dtron.tree import flat, tree_map


def main(argv: list[str]) -> int:
    o = arguments(argv)
    m, device, layout = preset(o.model), o.device, Layout()
    c, dims = m.moe, m.dims()
    dtype = torch.bfloat16

    def leaf(w: Tensor) -> Tensor:
        return w.to(dtype).requires_grad_()

    p = tree_map(leaf, init(declare(MoELayer, dims), dims, 0, layout, device=device))
    x = torch.randn(o.tokens, m.embed, device=device).to(dtype).requires_grad_()
    place = torch.arange(o.tokens, device=device)
    seen = TokenInfo(place >= 0, torch.zeros_like(place), 1, place)
    rows = torch.randn(o.tokens * c.top_k, m.embed, device=device).to(dtype).requires_grad_()
    ends = torch.arange(1, c.experts + 1, device=device) * (len(rows) // c.experts)

    recipe = replace(RECIPES["rowwise"], min_weights=0) if o.fp8 else None

    def layer(p: MoELayer, x: Tensor) -> Tensor:
        return moe(p, x, seen, c, layout, dispatch=o.moe_dispatch, recipe=recipe)[0]

    def router(p: MoELayer, x: Tensor) -> Tensor:
        return route(p.router, x, seen, c, layout).weights_TK

    def products(p: MoELayer, rows: Tensor) -> Tensor:
        return compute(p.experts, rows, ends, c.activation, recipe=recipe)

    parts = {"layer": (layer, x), "router": (router, x), "products": (products, rows)}
    ms = {name: 1e3 * seconds(fn, p, y, o.repeats) for name, (fn, y) in parts.items()}
    flops = 18.0 * len(rows) * m.embed * c.mlp
    peak = peak_tflops(device)
    tflops = flops / ms["products"] / 1e9
    report = {
        "model": o.model,
        "tokens": o.tokens,
        "moe_dispatch": o.moe_dispatch,
        "fp8": o.fp8,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        **{f"{name}_ms": round(t, 3) for name, t in ms.items()},
        "permutation_ms": round(ms["layer"] - ms["router"] - ms["products"], 3),
        "products_tflops": round(tflops, 1),
        "products_mfu": round(tflops / peak, 3) if peak else None,
    }
    print(json.dumps(report))
    return 0


def seconds(fn: Callable, p: MoELayer, x: Tensor, repeats: int) -> float:
    """Return the median seconds of forward and backward, compiled."""
    fn = torch.compile(fn, fullgraph=True, dynamic=False)
    step = partial(_step, fn, p, x)
    for _ in range(3):
        step()
    if not x.is_cuda:
        return statistics.median(_clocked(step) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _clocked(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _step(fn: Callable, p: MoELayer, x: Tensor) -> None:
    y = fn(p, x)
    torch.autograd.grad(y, [x, *flat(p)], torch.ones_like(y), allow_unused=True)


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time one MoE layer and its parts; one JSON line.")
    p.add_argument("--model", default="bench-moe", help="name of a preset with experts")
    p.add_argument("--moe-dispatch", default="auto")
    p.add_argument("--fp8", action="store_true", help="matmuls in FP8, of any size")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=20)
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
