"""A check of memory before anything is allocated.

The weights and the optimizer's state have a size that is known from the config. If their smallest
possible share of a rank is larger than the memory of its device, no run can begin, and a line says
so. Otherwise the system would end the process without a word, or torch with a traceback.

Left out: activations, gradients and buffers. ``dtron.tools.memory_estimate`` estimates them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.transformer import declare_model
from dtron.runtime.config import RunConfig
from dtron.training.low_bit_state import master_bytes
from dtron.training.optim_config import build_optimizer
from dtron.tree import flat

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(config: RunConfig, shape: MeshShape, device: str, master: torch.dtype) -> None:
    """Raise UserError if weights and optimizer state cannot fit into the memory of a rank, or of
    all ranks of this machine, even if they are sharded over all ranks."""
    optimizer, element = build_optimizer(config.optim), master.itemsize
    weights = flat(declare_model(config.model))
    whole = sum(
        w.numel * master_bytes(optimizer, w, element) + optimizer.state_bytes(w, w.shape, element)
        for w in weights
    )
    processes = 1 if config.simulate else shape.size
    here = 1 if config.simulate else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = device.startswith("cuda")
    needed = whole / processes * (1 if on_gpu else here)
    memory = _gpu_memory(device) if on_gpu else _host_memory()
    if needed > memory:
        where = "each GPU" if on_gpu else "this machine"
        raise UserError(
            f"model: its weights and optimizer state take {needed / 2**30:,.0f} GiB or more on "
            f"{where}, which has {memory / 2**30:,.0f} GiB; use a smaller model, or more ranks "
            "(--mesh) with --zero 3"
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
