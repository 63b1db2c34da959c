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
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels.matmul_rates import (
    ATTENTION,
    FLEX,
    GHZ,
    attention,
    batched,
    float32_matmuls,
    fp8_matmuls,
    grouped,
    matmuls,
)
from kernels.memory_rates import memory
from kernels.under_load import Fn, Load, Pool, query

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli
from dtron.tools.html_page import check_output

MESSAGES = [1 << n for n in (16, 20, 24, 28)]


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
    check_output("--out", str(o.out))
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
        properties = torch.cuda.get_device_properties()
        write(o.out, found, properties.name, round(properties.total_memory / 2**30, 1))
    return 0


def write(path: Path, found: dict[str, Any], name: str, memory_gib: float) -> None:
    """Write the rates, and keep those of the file that were not measured. A new file has those of
    the H200, and says so."""
    others = {"other rates": "not measured: those of h200.json"}
    new_file: dict[str, Any] = {"based_on": "h200", "measured": others}
    old = json.loads(path.read_text()) if path.exists() else new_file
    today = f"torch {torch.__version__}, {date.today().isoformat()}, under load"
    notes = old.get("measured", {}) | dict.fromkeys(found, f"bench/calibrate.py, {today}")
    new = {
        "name": name,
        "memory_gib": memory_gib,
        **{k: x for k, x in old.items() if k not in ("name", "memory_gib")},
        **found,
        "measured": notes,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in new.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
