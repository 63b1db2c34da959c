"""Measure the rates of a GPU that a plan needs, and write them as a file of ``dtron plan --gpu``.

    python bench/calibrate.py --out dtron/planner/gpu/h200.json          # two minutes
    torchrun --nproc-per-node 2 bench/calibrate.py --out h200.json       # links between GPUs too

Kernels are timed under load (kernels/under_load.py). Rates that this machine cannot give stay as
they are in the file: links, if there is one GPU. A file for a GPU that nobody has is written by
hand: a rate may be one number instead of a table (planner/gpu/b200.json)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels.under_load import Fn, Load, Pool, Timing, query
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli

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
BYTES = [1 << n for n in (16, 18, 20, 22, 24, 25, 26, 27, 28, 29, 30)]
MESSAGES = [1 << n for n in (16, 20, 24, 28)]


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


def memory(load: Load) -> dict[str, list[list[float]]]:
    """Return rows of bytes, read and written, and GB/s, for each kind of access."""
    pool = load.bf16

    def stream(i: int, n: int) -> Tensor:
        return pool.take((n // 4,), i) * 1.0009765625

    @partial(torch.compile, dynamic=False)
    def normalize(x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    @partial(torch.compile, dynamic=False)
    def transposed(x: Tensor) -> Tensor:
        return (x * 2).to(torch.float8_e4m3fn).t().contiguous()

    @partial(torch.compile, dynamic=False)
    def chosen(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index) * 2

    @partial(torch.compile, dynamic=False)
    def norm_backward(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y, dy = x.float(), g.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        y = y * scale
        dx = scale * (dy - y * (dy * y).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dy * y).sum(0)

    def columns(i: int, n: int) -> tuple[Tensor, Tensor]:
        shape = (max(1, n // 6 // 2048), 2048)
        return norm_backward(pool.take(shape, i), pool.take(shape, i, 1))

    def added(i: int, n: int) -> Tensor:
        return sums.take((n // 10,), i).add_(pool.take((n // 10,), i))

    def of_rows(i: int, n: int) -> Tensor:
        return normalize(pool.take((max(1, n // 8192), 2048), i))

    def turned(i: int, n: int) -> Tensor:
        return transposed(pool.take((max(16, n // 3 // 4096), 4096), i))

    def gathered(i: int, n: int) -> Tensor:
        rows = max(1, n // 8192)
        return chosen(pool.take((rows, 2048), i), order[:rows] % rows)

    sums, order = Pool(torch.float32, 1 << 28), torch.randperm(1 << 20, device="cuda")
    kinds: dict[str, Callable] = {"stream": stream, "rows": of_rows, "columns": columns}
    kinds |= {"transposed": turned, "gathered": gathered, "added": added}
    found = {}
    for name, fn in kinds.items():
        torch.compiler.reset()
        sizes = BYTES if name == "stream" else BYTES[2::2]
        found[name] = [[n, round(n / load.measure(partial(fn, n=n)).seconds * 1e-9)] for n in sizes]
    return found


def host_copies(load: Load) -> float:
    """Return GB/s from the GPU to pinned memory of the host."""
    x = load.bf16.take((1 << 27,), 0)
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    timing = load.measure(lambda _: there.copy_(x, non_blocking=True), eager=True)
    return round(2e-9 * x.numel() / timing.seconds, 1)


def watts(load: Load) -> dict[str, float]:
    """Return the GPU's power. A kind of work takes watts times the cube of the clock in GHz,
    beside the watts of an idle GPU; ``limit`` is the most that the GPU takes."""
    pool, fp8 = load.bf16, Pool(torch.float8_e4m3fn, 1 << 28)
    one = torch.ones((), device="cuda")
    a, b, c, d = (p.take((8192, 8192), 0, i) for p in (pool, fp8) for i in (0, 1))
    q, k, v = (pool.take((1, 32, 8192, 128), 0, i) for i in range(3))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    time.sleep(2)  # the power is a mean over a second
    found = {"idle": query("power.draw")}
    work: dict[str, Fn] = {
        "matmul 16": lambda _: torch.mm(a, b),
        "matmul 8": lambda _: torch._scaled_mm(c, d.t(), one, one, out_dtype=torch.bfloat16),
        "attention": lambda _: attend(q, k, v),
        "elementwise": lambda i: pool.take((1 << 26,), i) * 1.5,
    }
    for name, fn in work.items():
        power_of, ghz = load.alone(fn)
        print(f"{name}: {power_of:.0f} W at {ghz:.3f} GHz", file=sys.stderr)
        found["limit"] = max(power_of, found.get("limit", 0))
        found[name] = round((power_of - found["idle"]) / ghz**3, 1)
    return found


def link() -> dict[str, float]:
    """Return GB/s and the microseconds of an empty message, of NCCL's all-gather between the
    ranks of torchrun."""
    world, times = dist.get_world_size(), []
    for n in MESSAGES:
        x = torch.empty(n // world, dtype=torch.uint8, device="cuda")
        out = torch.empty(n // world * world, dtype=torch.uint8, device="cuda")
        for repeat in range(2):  # the first round sets NCCL up
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                dist.all_gather_into_tensor(out, x)
            end.record()
            torch.cuda.synchronize()
            if repeat:
                times.append(begin.elapsed_time(end) / 20 * 1e-3)
    sent = MESSAGES[-1] * (world - 1) / world
    return {"gbs": round(sent / times[-1] * 1e-9), "us": round(1e6 * times[0], 1)}


def measure() -> dict[str, Any]:
    """Return the rates of this GPU, by the names of ``Gpu`` (dtron/planner/gpu_rates.py)."""
    load = Load()
    found = {
        "ghz": GHZ,
        "watts": watts(load),
        "matmul": {"16": matmuls(load), "8": fp8_matmuls(load), "32": float32_matmuls(load)},
        "batched_matmul": batched(load),
        "grouped_matmul": grouped(load),
        "attention": attention(load, ATTENTION, flex=False),
        "flex_attention": attention(load, FLEX, flex=True),
        "memory": (rows := memory(load)),
        "memory_gbs": rows["stream"][-2][-1],
        "gap_us": round(1e6 * load.gap, 2),
        "host_gbs": host_copies(load),
    }
    return found


def main(argv: list[str]) -> int:
    p = Parser(description="Measure the rates of a GPU, for dtron plan --gpu.")
    p.add_argument(
        "--out", type=Path, required=True, help="file of rates; made or brought up to date"
    )
    o = p.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU; run this on the machine whose rates are wanted")
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.cuda.set_device(rank)
    found = measure() if rank == 0 else {}
    if world > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
        found["nvlink"] = link()
        dist.destroy_process_group()
    if rank == 0:
        write(o.out, found)
    return 0


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the rates, and keep those of the file that were not measured."""
    old = json.loads(path.read_text()) if path.exists() else {}
    today = f"torch {torch.__version__}, {date.today().isoformat()}, under load"
    notes = old.get("measured", {}) | dict.fromkeys(found, f"bench/calibrate.py, {today}")
    properties = torch.cuda.get_device_properties()
    new = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        **{k: x for k, x in old.items() if k not in ("name", "memory_gib")},
        **found,
        "measured": notes,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in new.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
