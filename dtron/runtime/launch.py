"""Launch: turn a config into running ranks, and choose device, dtype and processes.

There are three ways to launch the same program: one process with one device, several processes
started by torchrun (gloo on CPU, NCCL on GPU), or all ranks simulated in this process. Invalid
configs are refused before a process group exists. So no rank waits for a rank that has exited.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import check_ranks, simulated
from dtron.distributed.symmetric_memory import backends
from dtron.errors import UserError
from dtron.mesh import Layout, build_mesh, stage_mesh
from dtron.model.lora import check_lora
from dtron.model.transformer import declare_model
from dtron.rules import rules_for, zero_axes
from dtron.runtime.check_loss import check_loss
from dtron.runtime.check_memory import check_host_memory, check_memory
from dtron.runtime.check_values import check_unused
from dtron.runtime.config import RunConfig
from dtron.runtime.roll_call import join_job, leave_job
from dtron.runtime.validate import (
    check,
    check_attention,
    check_capability,
    check_dispatch,
    check_expert_sizes,
    check_fp8,
    check_recompute,
    ramp_microbatches,
)
from dtron.training.config import RunPlan
from dtron.training.low_bit_state import check_formats
from dtron.training.optim_config import build_optimizer
from dtron.training.parameter_groups import check_groups
from dtron.training.pipeline import Pipeline, on_ranks, pipeline


def plan_run(config: RunConfig) -> RunPlan:
    """Resolve the config. Raises UserError for an invalid mesh, batch, model or device."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.simulate and world > 1:
        raise UserError(
            f"--simulate under torchrun with {world} processes: it runs all ranks in one; drop "
            "torchrun"
        )
    shape = MeshShape.parse(config.mesh, None if config.simulate else world)
    if config.simulate:
        check_ranks(shape)
    plan, pipe = resolve(config, shape, _device(config))
    check_capability(config.how, plan.device)
    check_memory(config, plan, pipe.table)
    check_host_memory(config, pipe, shape, plan.rows, plan.compute)
    return plan


def resolve(config: RunConfig, shape: MeshShape, device: str) -> tuple[RunPlan, Pipeline]:
    """Resolve the config for ranks on a kind of device, which this machine may lack. Return the
    plan, and the pipeline with all its ranks. Raises UserError for an invalid config."""
    check(config.model, shape, config.data.seq_len, config.cp_method, config.zigzags)
    optimizer = build_optimizer(config.optim, config.model.mup)
    check_lora(declare_model(config.model), config.lora, shape, config.zero)
    check_groups(optimizer, config.declare())
    check_loss(config, shape)
    counts, rows = ramp_microbatches(config.ramp, config.micro_batch, shape)
    # Checks schedule and layers.
    pipe = pipeline(config, shape, counts[0], config.data.seq_len, Layout(), counts)
    check_unused(config, shape)
    gpu = device.startswith("cuda")
    compiles = config.compile == "on" or (config.compile == "auto" and gpu)
    check_recompute(config.how, compiles)
    names = {"auto": torch.bfloat16 if gpu else torch.float32}
    compute = names.get(config.dtype) or getattr(torch, config.dtype)
    tokens = rows // shape.data * config.data.seq_len // shape.cp
    check_fp8(config.how, config.model, shape, tokens, compute)
    if config.fp8_gather and not config.gathers_each(shape):
        more = " --zero3-gather microbatch" if shape.pp > 1 else ""
        raise UserError(
            f"--fp8-gather --zero {config.zero}, mesh {shape}: is for weights that every block "
            f"gathers; use --zero 3{more}, or drop --fp8-gather"
        )
    check_attention(config.attention_kernel, config.model, compute, device)
    check_dispatch(config.how, config.model, compiles)
    check_expert_sizes(config.how, config.model, shape, compute, config.lora)
    master = torch.promote_types(compute, torch.float32)
    check_formats(optimizer, config.declare(), shape, config.zero, compute)
    plan = RunPlan(
        shape=shape,
        device=device,
        compute=compute,
        master=master,
        counts=counts,
        rows=rows,
        gather_each=config.gathers_each(shape),
        splits=config.splits(shape),
        compile=compiles,
        cuda_graph=_records(config, compiles and gpu),
    )
    return plan, pipe


def _records(config: RunConfig, compiled_on_gpu: bool) -> bool:
    """Whether the step is recorded as a CUDA graph."""
    if config.loss.objective.second_model is not None:
        if config.cuda_graph == "on":
            raise UserError(
                f"--cuda-graph on --loss.name {config.loss.name}: a step with a second model is "
                "not recorded; use --cuda-graph auto"
            )
        return False
    if config.cuda_graph == "on" and not compiled_on_gpu:
        raise UserError(
            "--cuda-graph on: it takes a GPU and compiled stages; use --cuda-graph auto"
        )
    return config.cuda_graph != "off" and compiled_on_gpu


def _device(config: RunConfig) -> str:
    available = torch.cuda.is_available()
    if config.simulate or config.device == "cpu" or (config.device == "auto" and not available):
        if config.simulate and config.device == "cuda":
            raise UserError(
                "--simulate --device cuda: simulated ranks run on the CPU; drop one of the two"
            )
        return "cpu"
    if not available:
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"local rank {local}: this machine has {count} GPUs; start {count} processes, or "
            "--device cpu"
        )
    return f"cuda:{local}"


def keep_memory() -> None:
    """Keep freed memory in a process that computes on a CPU. By default glibc returns a large
    tensor to the system at once. Then each page of the next tensor costs a page fault: a fifth of a
    step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def same_on_all_ranks(values: dict[str, Any]) -> None:
    """Raise UserError unless every process has the same values. If a flag or a file differed
    between machines, training would continue, but the result would be worthless."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return
    own = {name: repr(value) for name, value in values.items()}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    for name, value in by_rank[0].items():
        for rank, others in enumerate(by_rank):
            if others[name] != value:
                raise UserError(
                    f"{name}: rank 0 has {value[:80]} and rank {rank} has {others[name][:80]}; "
                    "start all ranks with the same flags and files"
                )


def host_group(timeout_seconds: int) -> Any:
    """Create a gloo group of all processes; gloo needs no GPU. Each call creates a new group,
    because threads must not share one. Returns None if there is one process."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def _stages(config: RunConfig, plan: RunPlan, layout: Layout) -> Pipeline:
    return pipeline(config, plan.shape, plan.count, config.data.seq_len, layout, plan.counts)


@contextmanager
def start_ranks(config: RunConfig, plan: RunPlan) -> Iterator[Pipeline]:
    """Start the ranks and yield the pipeline stages of this process, with their layout."""
    if plan.device == "cpu":
        keep_memory()
    rules = rules_for(config.zero)
    compute = None if plan.compute == plan.master else plan.compute
    reduce = torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
    if config.simulate:
        with simulated(plan.shape) as mesh:
            layout = Layout(mesh, rules, compute, reduce)
            yield _stages(config, plan, layout)
        return
    kind, timeout = plan.device.partition(":")[0], timedelta(seconds=config.timeout_seconds)
    if kind == "cuda":
        torch.cuda.set_device(plan.device)
    if plan.shape.size > 1:
        backend = {"cuda": "nccl", "cpu": "gloo"}[kind]
        device_id = torch.device(plan.device) if kind == "cuda" else None
        # P2P messages of the pipeline have groups of their own (schedules/p2p.py), so this warning
        # does not apply.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        store = join_job(timeout)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device_id,
        )
    group_backends: Any = None
    if config.zero == 3 and config.copy_engines == "auto":
        group_backends = backends(plan.shape, kind, zero_axes(tuple(plan.shape.atoms)))
    mesh = build_mesh(plan.shape, kind, group_backends)
    layout = Layout(stage_mesh(mesh), rules, compute, reduce)
    template = torch.empty(0, config.model.embed, dtype=plan.compute, device=plan.device)
    stages = _stages(config, plan, layout)
    yield on_ranks(stages, mesh, template, timeout, config.copy_engines == "auto")
    if plan.shape.size > 1:  # not after an error: other ranks may still be in a collective
        dist.barrier()
        dist.destroy_process_group()
        leave_job()
