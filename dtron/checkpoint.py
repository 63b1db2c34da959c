"""Save and resume, on any mesh: a checkpoint is the tree of whole tensors, whoever holds which part.

torch.distributed.checkpoint lets each rank write its shards with their offsets in the whole tensor and read
back the ranges it needs, so the mesh and ZeRO stage that load need not be those that saved. Weights have the
same paths and shapes on every mesh; nothing else is needed to make that true.

A checkpoint is the folder ``checkpoints/step-00000100``. It is written under another name and renamed when it
is whole, and ``meta.json`` inside, written last, lists its files with their sizes: one that was cut short is
refused with the remedy, not loaded. Left out for now: asynchronous writing and checksums.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.dtensor import full, rank, shard_like
from dtron.optim import AdamState
from dtron.params import flat, leaves, unflatten
from dtron.simulate import is_simulated, paused

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on. ``samples``: how many sequences of the data have been used."""

    step: int
    samples: int
    params: Any
    opt: AdamState


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted(folder(run_dir).glob("step-*/meta.json"))
    return found[-1].parent if found else None


def save(run_dir: Path, state: TrainState, model: Any, seed: int) -> Path:
    """Write the state; every rank calls this. Raises ValueError where the folder cannot be written."""
    target = folder(run_dir) / f"step-{state.step:08d}"
    part = target.with_suffix(".part")
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        _wait()
        with paused(), _quiet():
            dcp.save(_tensors(state), checkpoint_id=str(part), no_dist=not _processes(state))
        if rank() == 0:
            files = {f.name: f.stat().st_size for f in sorted(part.iterdir())}
            meta = {"format": FORMAT, "step": state.step, "samples": state.samples, "updates": state.opt.step}
            meta |= {"seed": seed, "model": asdict(model), "files": files}
            (part / "meta.json").write_text(json.dumps(meta, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        _wait()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # torch's writer raises all three
        why = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{target}: cannot write the checkpoint ({why}); free space, or choose another --run-dir"
        ) from error
    return target


def load(path: Path, state: TrainState, model: Any, seed: int) -> TrainState:
    """Fill ``state``, whose tensors lie as this run wants them, from a checkpoint; they are overwritten.

    Raises ValueError for a checkpoint of another model or seed, or one that is not whole.
    """
    meta = read_meta(path)
    _same_model(path, meta, model, seed)
    whole = _tensors(state)
    try:
        with paused(), _quiet():
            dcp.load(whole, checkpoint_id=str(path), no_dist=not _processes(state))
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        first = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{path}: cannot be read ({first}); delete it to resume from the one before"
        ) from error
    if any(is_simulated(t) for t in _locals(state)):
        state = _placed(state, whole)
    return TrainState(
        meta["step"], meta["samples"], state.params, AdamState(meta["updates"], state.opt.m, state.opt.v)
    )


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint's ``meta.json``, with every file it lists present and of its size; ValueError
    otherwise."""
    remedy = "delete it to resume from the one before"
    try:
        meta = json.loads((path / "meta.json").read_text())
        files, version = meta["files"], meta["format"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no readable checkpoint ({error}); {remedy}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path}: format {version}, this version reads {FORMAT}; use the version that wrote it"
        )
    for name, size in files.items():
        file = path / name
        have = file.stat().st_size if file.is_file() else 0
        if have != size:
            raise ValueError(f"{file}: has {have} of {size} bytes, the checkpoint is not whole; {remedy}")
    return meta


def _same_model(path: Path, meta: dict[str, Any], model: Any, seed: int) -> None:
    saved, now = meta["model"], json.loads(json.dumps(asdict(model)))
    for name in now:
        if saved.get(name) != now[name]:
            flag = name.replace("_", "-")
            raise ValueError(
                f"{path}: is of a model with {name}={saved.get(name)}, this one has {name}={now[name]}; "
                f"use --model.{flag} {saved.get(name)}, or another --run-dir"
            )
    if meta["seed"] != seed:
        raise ValueError(
            f"{path}: was trained with seed {meta['seed']}, not {seed}; use --seed {meta['seed']}"
        )


def _trees(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "m": state.opt.m, "v": state.opt.v}


def _locals(state: TrainState) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in flat(state.params)]


def _processes(state: TrainState) -> bool:
    """Whether several processes hold the state (simulated ranks are one)."""
    return dist.is_initialized() and any(
        isinstance(t, DTensor) and not is_simulated(t.to_local()) for t in flat(state.params)
    )


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Flat and by name; simulated tensors whole, all others as they lie."""
    named = {f"{kind}.{path}": t for kind, tree in _trees(state).items() for path, t in leaves(tree)}
    if any(is_simulated(t) for t in _locals(state)):
        named = {name: full(t) for name, t in named.items()}
    return named


def _placed(state: TrainState, whole: dict[str, Tensor]) -> TrainState:
    """Simulated tensors that lie as those of ``state`` do, from whole ones."""

    def place(kind: str, tree: Any) -> Any:
        values = [shard_like(whole[f"{kind}.{path}"], t) for path, t in leaves(tree)]
        return unflatten(tree, values)

    trees = {kind: place(kind, tree) for kind, tree in _trees(state).items()}
    return TrainState(
        state.step, state.samples, trees["params"], AdamState(state.opt.step, trees["m"], trees["v"])
    )


def _wait() -> None:
    if dist.is_initialized() and dist.get_backend() != "fake":
        dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint speaks of single processes and of its own plans; none of it helps here."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
