"""The compiled step on real processes, for ``dtron.verify --compile``.

The parent starts one process for each rank, with gloo between them. Every process builds the step that
training builds, compiled, and takes it. It writes the whole gradients, weights and states of its
stages to a file, which the parent puts together."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout, build_mesh, stage_mesh
from dtron.params import leaves, unflatten, with_specs
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.validate import microbatches
from dtron.tools.compare_steps import StepResult
from dtron.tools.poisoned_memory import poisoned_memory
from dtron.tools.verify_step import step_inputs
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import Pipeline, on_ranks, pipeline

BACKEND = "inductor"


def step_of_processes(
    config: RunConfig,
    shape: MeshShape,
    like: StepResult,
    dtype: torch.dtype,
    backend: str = BACKEND,
) -> StepResult:
    """Take the step, compiled, on ``shape.size`` processes that are started here.

    ``like``: a step of the same model, for the shape of the trees.
    Raises ProcessRaisedException if a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (config, shape, dtype, backend, folder), nprocs=shape.size)
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(Path(folder).glob("rank*.pt")):
            for name, tree in torch.load(file).items():
                found.setdefault(name, {}).update(tree)

    def tree(name: str, like: Any) -> Any:
        return unflatten(like, [found[name][path] for path, _ in leaves(like)])

    state = {name: tree(f"state.{name}", one) for name, one in like.state.items()}
    loss, norm = (found["numbers"][name] for name in ("loss", "norm"))
    grads, params = tree("grads", like.grads), tree("params", like.params)
    return StepResult(loss, norm, grads, params, state, None)


def _rank(
    rank: int, config: RunConfig, shape: MeshShape, dtype: torch.dtype, backend: str, folder: str
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", shape.size)
    dist.init_process_group(
        "gloo", rank=rank, world_size=shape.size, store=store, timeout=timedelta(minutes=10)
    )
    low = dtype.itemsize < 4
    master = torch.float32 if low else dtype
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    mesh = build_mesh(shape, "cpu")
    layout = Layout(stage_mesh(mesh), rules_for(config.zero), compute=dtype if low else None)
    template = torch.empty(0, config.model.embed, dtype=dtype)
    pipe = on_ranks(pipeline(config, shape, count, config.data.seq_len, layout), mesh, template)
    params, batches, tokens = step_inputs(config, pipe, count, master)
    plan = replace(RunPlan.eager(config, shape, count, master, dtype), compile=True)
    step = build_step(config, plan, pipe, backend)
    opt = init_state(step.optimizer, pipe.spec, params)
    opt = with_compute_copies(opt, params, pipe.spec, layout.compute)
    weights = params if opt.compute_copies is None else opt.compute_copies
    with poisoned_memory() if low else nullcontext():
        done = [*step.gradients(weights, batches)]
    here: dict[str, dict[str, Any]] = {"grads": _whole(pipe, done[1])}  # the update consumes them
    loss, norm, _, params, opt = step.update(params, opt, done, tokens, config.optim.lr)
    here["params"] = _whole(pipe, params)
    here |= {f"state.{name}": _whole(pipe, tree) for name, tree in opt.trees.items()}
    here["numbers"] = {"loss": loss.item(), "norm": norm.item()}
    torch.save(here, f"{folder}/rank{rank:05}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _whole(pipe: Pipeline, trees: Any) -> dict[str, Any]:
    """Return the whole tensors of this rank's stages by path. Twins are left out."""
    return {w.path: full(x).clone() for w, x in with_specs(pipe.spec, trees) if not w.twin}
