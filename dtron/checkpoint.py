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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.config import RunConfig
from dtron.dtensor import full, local, rank, shard_like
from dtron.mesh import Layout
from dtron.optim import AdamState
from dtron.own import lay, own_box
from dtron.params import Weight, flat, tree_map, unflatten
from dtron.simulate import is_simulated, paused

FORMAT = 2

Identity = dict[str, Any]


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


def save(run_dir: Path, state: TrainState, spec: Any, identity: Identity) -> Path:
    """Write the state; every rank calls this. ``spec``, the declared tree, names the weights. Raises
    ValueError where the folder cannot be written."""
    target = folder(run_dir) / f"step-{state.step:08d}"
    part = target.with_suffix(".part")
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        _wait()
        with paused(), _quiet():
            dcp.save(_tensors(state, spec), checkpoint_id=str(part), no_dist=not _processes())
        if rank() == 0:
            files = {f.name: f.stat().st_size for f in sorted(part.iterdir())}
            meta = {"format": FORMAT, "step": state.step, "samples": state.samples, "updates": state.opt.step}
            meta |= {"identity": dict(identity), "files": files}
            (part / "meta.json").write_text(json.dumps(meta, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        _wait()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        why = str(error).strip().splitlines()[-1]
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
            raise
        raise ValueError(
            f"{target}: cannot write the checkpoint ({why}); free space, or choose another --run-dir"
        ) from error
    return target


def load(path: Path, state: TrainState, spec: Any, identity: Identity) -> TrainState:
    """Fill ``state``, whose tensors lie as this run wants them, from a checkpoint; they are overwritten.

    Raises ValueError for a checkpoint of another model, seed or text, or one that is not whole.
    """
    meta = read_meta(path)
    _same(path, meta["identity"], identity)
    whole = _tensors(state, spec)
    try:
        with paused(), _quiet():
            dcp.load(whole, checkpoint_id=str(path), no_dist=not _processes())
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        first = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{path}: cannot be read ({first}); delete it to resume from the one before"
        ) from error
    if any(is_simulated(t) for t in _locals(state)):
        state = _placed(state, spec, whole)
    else:
        _fill_twins(state, spec, whole)
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


def read_weight(path: Path, w: Weight) -> Tensor:
    """One whole weight, float32; nothing else is read."""
    into = torch.empty(w.shape)
    read_into(path, w, into)
    return into


def load_params(path: Path, spec: Any, layout: Layout, dtype: torch.dtype, device: str) -> Any:
    """The weights alone, in ``dtype``, one at a time: to look at a model, not to go on training it."""

    def one(w: Weight) -> Tensor:
        box = own_box(w, layout, device)
        with paused():
            if box is None:
                x = read_weight(path, w)
            else:
                x = torch.empty([b - a for a, b in box], device=device)
                read_into(path, w, lay(x, w, layout, box))
            x = x.to(device, dtype)
        return lay(x, w, layout, box)

    with torch.no_grad():
        return tree_map(one, spec)


def read_into(path: Path, w: Weight, into: Tensor) -> None:
    """The part of a weight that this rank has of ``into``. Asks no other rank."""
    try:
        with _quiet():
            dcp.load({f"params.{w.path}": into}, checkpoint_id=str(path), no_dist=True)
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        first = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path}: {w.path} cannot be read ({first}); use the checkpoint before") from error


def identity_of(config: RunConfig, text: str) -> Identity:
    """What must be the same when a run goes on, by flag; ``text`` is a digest of the tokens."""

    def flags(value: Any, prefix: str) -> Identity:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, child in value.items() for k, v in flags(child, f"{prefix}.{name}").items()}

    same = {"seed": config.seed, "data.sequence": config.data.sequence, "text": text}
    return flags(asdict(config.model), "model") | same


def _same(path: Path, saved: Identity, now: Identity) -> None:
    for name, value in now.items():
        was = saved.get(name)
        if was == value:
            continue
        if name == "text":
            raise ValueError(
                f"{path}: was trained on other text, or with another tokenizer; give the --data.path and "
                "--data.tokenizer it was started with, or another --run-dir"
            )
        stem, _, last = name.replace("_", "-").rpartition(".")
        dot = f"--{stem}." if stem else "--"
        flag = f"{dot}{'' if was else 'no-'}{last}" if isinstance(value, bool) else f"{dot}{last} {was}"
        raise ValueError(
            f"{path}: was made with {name}={was}, this run has {value}; use {flag}, or another --run-dir"
        )


def _trees(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "m": state.opt.m, "v": state.opt.v}


def _locals(state: TrainState) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in flat(state.params)]


def _processes() -> bool:
    """Whether the ranks are processes (simulated ranks are one)."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def _tensors(state: TrainState, spec: Any) -> dict[str, Tensor]:
    """By kind and path; simulated tensors whole, all others as they lie. Twins have one name."""
    paths = [w.path for w in flat(spec)]
    named: dict[str, Tensor] = {}
    for kind, tree in _trees(state).items():
        for path, t in zip(paths, flat(tree), strict=True):
            named.setdefault(f"{kind}.{path}", t)
    if any(is_simulated(t) for t in _locals(state)):
        named = {name: full(t) for name, t in named.items()}
    return named


def _fill_twins(state: TrainState, spec: Any, loaded: dict[str, Tensor]) -> None:
    """Where both copies of a tied weight are here, only the first has been read."""
    for kind, tree in _trees(state).items():
        for w, t in zip(flat(spec), flat(tree), strict=True):
            if loaded[f"{kind}.{w.path}"] is not t:
                local(t).copy_(local(loaded[f"{kind}.{w.path}"]))


def _placed(state: TrainState, spec: Any, whole: dict[str, Tensor]) -> TrainState:
    """Simulated tensors that lie as those of ``state`` do, from whole ones."""

    def place(kind: str, tree: Any) -> Any:
        pairs = zip(flat(spec), flat(tree), strict=True)
        return unflatten(tree, [shard_like(whole[f"{kind}.{w.path}"], t) for w, t in pairs])

    trees = {kind: place(kind, tree) for kind, tree in _trees(state).items()}
    return TrainState(
        state.step, state.samples, trees["params"], AdamState(state.opt.step, trees["m"], trees["v"])
    )


def _wait() -> None:
    if _processes():
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
