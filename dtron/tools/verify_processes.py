"""The compiled step on real processes, for ``dtron.verify --compile``.

The parent starts one process for each rank, with gloo between them. Every process builds and takes
the compiled step that training takes. It writes the whole gradients, weights and states of its
stages to a file. The parent combines these files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dtron.checkpoint.safetensors import TensorReader, header
from dtron.checkpoint.safetensors_writer import write_file
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout, build_mesh, stage_mesh
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.determinism import deterministic
from dtron.tools.compare_steps import StepResult
from dtron.tools.verify_step import compute_copies_in, plan_of, second_model, take_step
from dtron.training.build import build_step
from dtron.training.pipeline import Pipeline, on_ranks, pipeline
from dtron.training.step import TrainStep
from dtron.tree import leaves, unflatten, with_specs


def step_of_processes(
    config: RunConfig,
    shape: MeshShape,
    like: StepResult,
    dtype: torch.dtype,
    backend: str = "inductor",
) -> StepResult:
    """Take the step, compiled, on ``shape.size`` processes that are started here.

    ``like``: a step of the same model, for the shape of the trees.
    Raises ProcessRaisedException if a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        # Each rank is a fork of one process that has imported everything. An import takes seconds.
        mp.set_forkserver_preload([__name__])
        args = config, shape, dtype, backend, folder
        mp.start_processes(_rank, args, nprocs=shape.size, start_method="forkserver")
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(Path(folder).glob("rank*.safetensors")):
            reader = TensorReader(header(file))
            for key in reader.entries:
                group, _, name = key.partition(":")
                found.setdefault(group, {})[name] = reader.read(key)
            reader.close()

    def tree(name: str, like: Any) -> Any:
        return unflatten(like, [found[name][path] for path, _ in leaves(like)])

    state = {name: tree(f"state.{name}", one) for name, one in like.state.items()}
    loss, norm = (found["numbers"][name].item() for name in ("loss", "norm"))
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
    plan = replace(plan_of(config, shape, dtype), compile=True)
    mesh = build_mesh(shape, "cpu")
    layout = Layout(stage_mesh(mesh), rules_for(config.zero), compute=compute_copies_in(dtype))
    template = torch.empty(0, config.model.embed, dtype=dtype)
    pipe = pipeline(config, shape, plan.count, config.data.seq_len, layout)
    pipe = on_ranks(pipe, mesh, template)
    step = build_step(config, plan, pipe, backend, reference=second_model(config, pipe, plan))
    assert isinstance(step, TrainStep)  # ``plan`` records no CUDA graph
    with deterministic(config.deterministic):
        taken = take_step(config, step, plan, partial(_whole, step.pipe))
    groups = {"grads": taken.grads, "params": taken.params}
    groups |= {f"state.{name}": tree for name, tree in taken.state.items()}
    numbers = {"loss": taken.loss, "norm": taken.norm}
    groups["numbers"] = {n: torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()}
    here = {f"{group}:{name}": x for group, tree in groups.items() for name, x in tree.items()}
    shapes = {key: (x.dtype, x.shape) for key, x in here.items()}
    write_file(Path(f"{folder}/rank{rank:05}.safetensors"), shapes, here.__getitem__, {})
    dist.barrier()
    dist.destroy_process_group()


def _whole(pipe: Pipeline, trees: Any) -> dict[str, Any]:
    """Return the whole tensors of this rank's stages by path. Twins are left out."""
    return {w.path: full(x).clone() for w, x in with_specs(pipe.spec, trees) if not w.twin}
