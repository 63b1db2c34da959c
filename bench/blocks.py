"""Two ways to compile a stage of many equal blocks: as one graph, or one block that is used again
for each.

    python bench/blocks.py --model bench-1.3b

One graph is what dtron does (training/compiled_stage.py). One block is compiled in a fraction of
the time, but is called once for each of them, forward and backward, and nothing moves across its
edges: no kernel that joins two blocks, and no gather of the next block's weights behind this one's
work. A third way, ``region``, is one graph in which torch compiles the marked block once. A line of
JSON for each way; each in a process of its own, with an empty cache of compiled code and then again
with what the first left there. One device, random tokens. The ways must agree on the gradient's
norm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dtron.layers.attention import AttentionInputs, AttentionMixer
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import prepare
from dtron.layers.cross_entropy import Loss, cross_entropy
from dtron.layers.norm import norm
from dtron.layers.rope import rope_tables
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.block import BlockInputs, block
from dtron.model.presets import preset
from dtron.params import flat, init
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.metrics import elapsed, mark, peak_memory_gib
from dtron.schedules.runner import Program
from dtron.torch_compile import jit
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program

WAYS = ("stage", "block", "region")


def functions(way: str, m, layout: Layout) -> Program:
    whole = program(m, layout)
    if way == "stage":
        return compiled(whole, layout)

    def one(p_block, x_TD, table_TH, mask):
        inputs = AttentionInputs(table_TH=table_TH, mask=mask, path="sdpa", eps=m.norm_eps)
        return block(p_block, x_TD, None, BlockInputs(AttentionMixer(m), inputs), m, layout)[0]

    if way == "block":
        return replace(
            whole,
            stage=partial(by_blocks, jit(one), jit(partial(head, m=m, layout=layout)), m, layout),
        )
    marked = torch.compiler.nested_compile_region(one)
    return replace(
        whole, stage=jit(partial(by_blocks, marked, partial(head, m=m, layout=layout), m, layout))
    )


def by_blocks(one: Callable, last: Callable, m, layout: Layout, p, x_TD, batch):
    table = rope_tables(m.rope, batch.positions_T, m.head_dim, x_TD.dtype)
    mask = AttentionMask(batch.seq_len, m.window, m.softcap)
    mask, _ = prepare(mask, None, m.sinks, AttentionMixer(m).head_dims, x_TD, layout, "sdpa")
    for p_block in p.blocks:
        x_TD = one(p_block, x_TD, table, mask)
    return last(p.norm, p.w_head, x_TD, batch.targets_T), None


def head(p_norm, w_head, x_TD, targets_T, m, layout: Layout):
    return cross_entropy(norm(p_norm, x_TD, m.norm_eps), w_head, targets_T, Loss(m.vocab), layout)


def measure(o: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    m, layout = preset(o.model), Layout(compute=compute)
    m = replace(m, layers=o.layers) if o.layers else m
    pipe, run = one_stage(m, 1, layout), functions(o.way, m, layout)
    params = init(pipe.spec, m.dims(), 0, layout, torch.float32, device)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(m.vocab, (o.rows, o.seq_len + 1), device=device, generator=generator)
    batches = [make_batch(ids, layout)]
    start = time.perf_counter()
    marks, norms = [mark(device)], []
    for step in range(o.steps):
        _, grads, _ = gradients(run, params, batches, ids.numel(), pipe, 1)
        norms.append(torch.stack(torch._foreach_norm(flat(grads))).norm())
        del grads
        marks.append(mark(device))
        if step == 0:
            norms[0].item()
            first = time.perf_counter() - start
    seconds = statistics.median([elapsed(a, b) for a, b in pairwise(marks)][2:])
    return {
        "way": o.way, "model": o.model, "layers": m.layers, "cache": o.cache, "first_step_s": round(first, 1),
        "gradients_ms": round(1e3 * seconds, 2), "peak_memory_gib": round(peak_memory_gib(device), 1),
        "norm": round(norms[0].item(), 4), "torch": torch.__version__,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    p = Parser(description="One graph for a stage, or one for a block.")
    p.add_argument("--model", default="bench-1.3b", help="a preset")
    p.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    p.add_argument("--cache", default="empty", help=argparse.SUPPRESS)
    for name, default in (("layers", 0), ("rows", 2), ("seq-len", 4096), ("steps", 12)):
        p.add_argument(f"--{name}", type=int, default=default)
    o = p.parse_args(argv)
    if o.way:
        print(json.dumps(measure(o)), flush=True)
        return 0
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "full"):
                given = {k: v for k, v in vars(o).items() if k not in ("way", "cache")}
                options = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
                command = [sys.executable, __file__, *options, f"--way={way}", f"--cache={state}"]
                subprocess.run(
                    command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, check=False
                )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
