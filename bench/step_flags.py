"""The flags of a case of bench/train.py, and the config of a run that they stand for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, get_args

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.compute_config import Fp8
from dtron.model.lora import LoraConfig
from dtron.model.presets import preset
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.runtime.exit import Parser
from dtron.training.low_bit_state import Masters, Moments
from dtron.training.optim_config import OptimConfig

USUAL: dict[str, Any] = dict.fromkeys(("moments", "master_weights", "reduce_dtype"), "float32")
USUAL |= {"optim": "adamw", "offload_state": False, "lora_rank": 0, "quantize_base": "none"}


def model_name(o: argparse.Namespace) -> str:
    """Return the model of a case, with the number of its layers if that is not the preset's."""
    return f"{o.model} of {o.layers} layers" if o.layers else o.model


def run_config(o: argparse.Namespace, world: int | None = None) -> RunConfig:
    """Return the config of a case.

    ``world``: the number of processes (None: as many as the mesh has)."""
    m, shape = preset(o.model), MeshShape.parse(o.mesh, world)
    return RunConfig(
        mesh=o.mesh,
        zero=o.zero,
        model=replace(m, layers=o.layers or m.layers, context=max(m.context, o.seq_len)),
        recompute=o.recompute,
        recompute_budget=o.recompute_budget,
        batch=o.rows * o.microbatches * shape.data,
        micro_batch=o.rows,
        fp8=o.fp8,
        fp8_first_last=o.fp8_first_last,
        fp8_gather=o.fp8_gather,
        attention_kernel=o.attention_kernel,
        cp_method=o.cp_method,
        zigzag=o.zigzag,
        reduce_dtype=o.reduce_dtype,
        cuda_graph=o.cuda_graph,
        copy_engines="off" if o.no_copy_engines else "auto",
        data=DataConfig(seq_len=o.seq_len),
        pipeline=PipelineConfig(o.schedule),
        lora=LoraConfig(o.lora_rank, quantize_base=o.quantize_base),
        optim=OptimConfig(
            o.optim,
            moments=o.moments,
            master_weights=o.master_weights,
            offload_state=o.offload_state,
        ),
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time training steps of one case; one JSON line.")
    add, on = p.add_argument, {"action": "store_true"}
    add("--model", default="bench-1.3b", help="name of a preset (bench-1.3b)")
    add("--layers", type=int, default=0, help="number of blocks (the preset's number)")
    add("--mesh", default="", help="axes of the mesh, as dp=2,tp=2")
    add("--zero", type=int, default=1, help="ZeRO stage (1)")
    add("--rows", type=int, default=2, help="sequences per microbatch and data rank (2)")
    add("--microbatches", type=int, default=1, help="microbatches per step (1)")
    add("--schedule", default="1f1b", help="order of forwards and backwards over pp (1f1b)")
    add("--optim", default=USUAL["optim"], help="name of the optimizer (adamw)")
    add("--moments", default=USUAL["moments"], choices=get_args(Moments))
    add("--master-weights", default=USUAL["master_weights"], choices=get_args(Masters))
    add("--offload-state", **on, help="keep the optimizer's state on the host")
    add("--lora-rank", type=int, default=USUAL["lora_rank"], help="LoRA of this rank (0: none)")
    add("--quantize-base", default=USUAL["quantize_base"], choices=("none", "nf4", "fp8"))
    add("--seq-len", type=int, default=4096, help="tokens per sequence (4096)")
    add("--steps", type=int, default=20, help="steps; the first is timed separately (20)")
    add("--recompute", default="none", help="activation policy (none)")
    add("--recompute-budget", type=float, help="the share of activations to keep")
    add("--reduce-dtype", default=USUAL["reduce_dtype"], choices=("float32", "bfloat16"))
    add("--fp8", default="none", choices=get_args(Fp8))
    add("--fp8-first-last", **on, help="FP8 in the first and the last block too")
    add("--fp8-gather", **on, help="ZeRO-3 gathers weights in 8 bits")
    add("--attention-kernel", default="auto", choices=get_args(AttentionPath))
    add("--cp-method", default="ring", choices=get_args(Method), help="attention over cp")
    add("--zigzag", default="auto", choices=("auto", "on", "off"))
    add("--no-overlap", **on, help="leave collectives at their place in the program")
    add("--no-copy-engines", **on, help="NCCL gathers weights and sends messages")
    add("--cuda-graph", default="auto", choices=("auto", "off"), help="off: not recorded")
    add("--eager", **on, help="do not compile")
    add("--data", **on, help="read each step's batch from a .bin/.idx that is written first")
    add("--turn", default="", help="after the first step, wait until this file exists")
    add("--profile", default="", help="write a Chrome trace to this file; print a time breakdown")
    return p.parse_args(argv)
