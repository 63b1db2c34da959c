"""A check of memory before anything is allocated.

The weights and the optimizer's state have a size that is known from the config. If their smallest
possible share of a rank is larger than the memory of its device, no run can begin, and a line says
so. Otherwise the system would end the process without a word, or torch with a traceback.

The same holds for activations that ``--recompute offload`` moves to the host. There the system
would end the process in the middle of a step.

Left out: activations on the device, gradients and buffers. dtron.tools.memory_estimate estimates
them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.activation_bytes import host_bytes
from dtron.runtime.config import RunConfig
from dtron.runtime.second_memory import second_model_bytes
from dtron.schedules.table import Table, peaks
from dtron.training.config import RunPlan
from dtron.training.low_bit_state import master_bytes
from dtron.training.offloaded_state import OffloadedState
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import find
from dtron.training.pipeline import Pipeline
from dtron.tree import flat

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(config: RunConfig, plan: RunPlan, table: Table) -> None:
    """Raise UserError if weights and optimizer state cannot fit into the memory of a rank, or of
    all ranks of this machine, even if they are sharded over all ranks. The weights of a second
    model count as they are sharded.

    ``table``: the schedule, which places the stages on pipeline ranks."""
    optimizer, element = build_optimizer(config.optim), plan.master.itemsize
    shape, device = plan.shape, plan.device
    weights = flat(config.declare())
    whole = sum(
        w.numel * (w.dtype or plan.compute).itemsize
        if w.frozen
        else w.numel * master_bytes(optimizer, w, element)
        + optimizer.state_bytes(w, w.shape, element)
        for w in weights
    )
    offloaded = find(optimizer, OffloadedState)
    on_host = sum(offloaded.base.state_bytes(w, w.shape, element) for w in weights if offloaded)
    processes = 1 if config.simulate else shape.size
    here = 1 if config.simulate else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = device.startswith("cuda")
    if (state := on_host / processes * here) > _host_memory():
        raise UserError(
            f"--optim.offload-state: the state of {here} ranks takes {state / 2**30:,.0f} GiB or "
            f"more of the host's memory, which is {_host_memory() / 2**30:,.0f} GiB; use "
            "--optim.moments bfloat16, or more ranks (--mesh)"
        )
    needed = whole / processes if on_gpu else (whole + on_host) / processes * here
    second = second_model_bytes(config, shape, table, plan.compute, plan.master)
    ranks = shape.size if config.simulate else here
    needed += max(second) if on_gpu else sum(second) / len(second) * ranks
    memory = _gpu_memory(device) if on_gpu else _host_memory()
    if needed > memory:
        where = "each GPU" if on_gpu else "this machine"
        what = "weights and optimizer state" + (" and the second model" if any(second) else "")
        raise UserError(
            f"model: its {what} take {needed / 2**30:,.0f} GiB or more on "
            f"{where}, which has {memory / 2**30:,.0f} GiB; use a smaller model, or more ranks "
            "(--mesh) with --zero 3"
        )


def check_host_memory(
    config: RunConfig, pipe: Pipeline, shape: MeshShape, rows: int, compute: torch.dtype
) -> None:
    """Raise UserError if the activations that move to the host cannot fit into its memory, for all
    ranks of this machine together.

    ``rows``: sequences in a microbatch, over all ranks."""
    tokens = rows // shape.data * config.data.seq_len
    moved, start, policy = [], 0, config.how.policy
    for stage in pipe.specs:
        blocks = range(start, start := start + len(stage.blocks))
        moved.append(host_bytes(config.model, shape, tokens, policy, blocks, compute.itemsize))
    table = pipe.table
    # A rank has its peak of activations in flight at least for the smallest of its stages.
    by_rank = [
        peak * min(moved[s] for s in table.stages_of(rank))
        for rank, peak in enumerate(peaks(table, policy.splits))
    ]
    here = shape.size if config.simulate else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, memory = sum(by_rank) * here / shape.pp, _host_memory()
    if needed > memory:
        raise UserError(
            f"--recompute {config.recompute}: the activations of {here} ranks take "
            f"{needed / 2**30:,.0f} GiB or more of the host's memory, which is "
            f"{memory / 2**30:,.0f} GiB; use --recompute full, a smaller --micro-batch, or "
            "--recompute-budget 0.5"
        )


def _gpu_memory(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _host_memory() -> int:
    """Return the bytes of memory that processes of this machine may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_GROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return memory
