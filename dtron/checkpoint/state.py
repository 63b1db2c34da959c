"""Save and resume on any mesh: a checkpoint is a tree of whole tensors, independent of sharding.

Each rank writes its shards with their place in the whole tensor (shards.py), and reads back the
ranges that it needs. So a run may load with another mesh and another ZeRO stage than the run that
saved. This needs nothing else, because weights have the same paths and shapes on every mesh.

A checkpoint holds the trained weights (with the routers' balance biases), the trees of the
optimizer's state, the step number and the place in the data. Frozen weights are those that the run
began with, and are not in it. It holds no state of the learning rate, which is a
function of the step. It holds no state of a random generator: after the initial weights no random
number is drawn.

meta.py and files.py describe the files on disk. async_saver.py writes them while training goes on.
``python -m dtron.checkpoint inspect DIR`` shows a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.checkpoint import files
from dtron.checkpoint.async_saver import AsyncSaver
from dtron.checkpoint.files import read_meta
from dtron.checkpoint.identity import Identity, check_identity
from dtron.checkpoint.meta import Meta
from dtron.checkpoint.shard_range import Range, place_shard, shard_range
from dtron.checkpoint.shards import Shard, ShardReader
from dtron.checkpoint.storage import AnyPath
from dtron.checkpoint.stored_values import read_state, read_values
from dtron.distributed.redistribute import full, rank, shard_like, to_local
from dtron.distributed.simulated_ranks import is_simulated, paused
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.optimizer import OptimizerState
from dtron.training.state_formats import is_part
from dtron.training.weight_average import NAME as EMA
from dtron.tree import fill, flat, unflatten, with_specs


@dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to go on.

    ``samples``: number of sequences of the data that have been used."""

    step: int
    samples: int
    params: Any
    opt: OptimizerState


def save(place: AnyPath, state: TrainState, spec: Any, identity: Identity) -> AnyPath:
    """Write the state now. Every rank calls this. ``spec``: the declared tree, which names the
    weights. ``place``: see files.py. Raises UserError if the place cannot be written."""
    saver = AsyncSaver(place, dist.group.WORLD if _processes() else None)
    start_save(saver, state, spec, identity)
    saver.close()
    return files.target(place, state.step)


def start_save(saver: AsyncSaver, state: TrainState, spec: Any, identity: Identity) -> float:
    """Start to write the state and return the seconds that this call took. The state may change as
    soon as this call returns."""
    meta = {"samples": state.samples, "updates": state.opt.step, "identity": dict(identity)}
    return saver.save(state.step, tensors(state, spec), meta)


def load(path: AnyPath, state: TrainState, spec: Any, identity: Identity) -> TrainState:
    """Fill ``state`` from a checkpoint. The tensors of ``state`` have this run's placements and are
    overwritten.

    Raises UserError if the checkpoint is of another model, seed or text, or is not complete to the
    last byte. If a checksum differs, the error names the newest earlier checkpoint that is
    complete. The optimizer may be another one if the checkpoint has all of its state: Muon goes on
    with the moments of AdamW. (A moment that begins at zero in the middle of a run would make the
    next updates too large.) An average of the weights that the checkpoint lacks begins as its
    weights. The formats of state and master weights may be others too (stored_values.py)."""
    meta = read_meta(path)
    whole = _named(state, spec)
    saved_as = {name: name for name in whole}
    if not has_average(meta):
        saved_as = {name: _without_average(name) for name in whole}
    fits = {saved_as[n] for n in whole if not is_part(n.partition(".")[0])} <= meta.tensors.keys()
    check_identity(path, meta.identity, identity, other_optimizer=fits)
    verify_checksums(path, meta)
    with paused(), torch.no_grad(), ShardReader(path, meta) as reader:
        read_state(reader, whole, saved_as)
    if any(is_simulated(t) for t in _locals(state)):
        state = _placed(state, spec, whole)
    else:
        _fill_twins(state, spec, whole)
    opt = OptimizerState(meta.updates, state.opt.trees)
    return TrainState(meta.step, meta.samples, state.params, opt)


def has_average(meta: Meta) -> bool:
    """Whether a checkpoint has an average of the weights."""
    return any(name.startswith(f"{EMA}.") for name in meta.tensors)


def check_average(path: AnyPath, meta: Meta) -> None:
    """Raise UserError if a checkpoint has no average of the weights."""
    if not has_average(meta):
        raise UserError(
            f"{path}: has no average of the weights; train with --optim.ema 0.999, or leave --ema "
            "out"
        )


def _without_average(name: str) -> str:
    tree, _, path = name.partition(".")
    return f"params.{path}" if tree == EMA else name


def verify_checksums(path: AnyPath, meta: Meta) -> None:
    """Compare the checksum of every file; raises UserError if a byte has changed. Every rank calls
    this. Each file is read once, by one of the ranks."""
    found = files.damaged(
        path, meta, *((rank(), dist.get_world_size()) if _processes() else (0, 1))
    )
    if _processes():
        each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(each, found)
        found = [name for names in each for name in names]
    if found:
        other = files.before(path)
        remedy = (
            f"delete it to resume from {other.name}, which is whole"
            if other
            else "delete it: no other is whole"
        )
        raise UserError(f"{path / found[0]}: is damaged, its checksum is another; {remedy}")


def read_weight(reader: ShardReader, w: WeightSpec, average: bool = False) -> Tensor:
    """Read one whole weight in float32. Nothing else is read.

    ``average``: the average of the weight."""
    return _weight(reader, w, average, [(0, n) for n in w.shape])


def load_params(
    path: AnyPath,
    spec: Any,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    average: bool = False,
    frozen: Callable[[WeightSpec], Tensor] | None = None,
) -> Any:
    """Load the weights alone, in ``dtype``, one at a time. Every rank calls this. A run that
    resumes training needs ``load``.

    ``average``: the averages of the weights.
    ``frozen``: loads a frozen weight (None: the tree has none)."""
    meta = read_meta(path)
    verify_checksums(path, meta)

    def one(w: WeightSpec) -> Tensor:
        if w.frozen and frozen is not None:
            return frozen(w)
        ranges = shard_range(w, layout, device)
        with paused():
            x = _weight(reader, w, average, ranges or [(0, n) for n in w.shape]).to(device, dtype)
        return place_shard(x, w, layout, ranges)

    with torch.no_grad(), ShardReader(path, meta) as reader:
        return fill(spec, one)


def _weight(reader: ShardReader, w: WeightSpec, average: bool, ranges: list[Range]) -> Tensor:
    """Read the part of a weight inside these ranges, in float32."""
    part = torch.empty([b - a for a, b in ranges], device="meta")
    shard = Shard(tuple(w.shape), tuple(a for a, _ in ranges), part)
    return read_values(reader, EMA if average else "params", w.path, shard).float()


def _trees(state: TrainState) -> dict[str, Any]:
    """Return the trees of a checkpoint by kind: the weights and the optimizer's state."""
    return {"params": state.params, **state.opt.trees}


def _locals(state: TrainState) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in flat(state.params)]


def _processes() -> bool:
    """Whether the ranks are separate processes (all simulated ranks share one process)."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def tensors(state: TrainState, spec: Any) -> dict[str, Tensor]:
    """Return the tensors to save, by kind and path. Simulated tensors are unsharded; all others
    keep their placement. Of the copies of a tied weight, the first stage saves its own."""
    return _named(state, spec, twins=False)


def _named(state: TrainState, spec: Any, twins: bool = True) -> dict[str, Tensor]:
    """Return the tensors by kind and path. The copies of a tied weight have one name. Frozen
    weights are not among them.

    ``twins``: whether a copy counts that another stage has too."""
    named: dict[str, Tensor] = {}
    for kind, tree in _trees(state).items():
        for w, t in with_specs(spec, tree):
            if (twins or not w.twin) and not w.frozen:
                named.setdefault(f"{kind}.{w.path}", t)
    if any(is_simulated(t) for t in _locals(state)):
        named = {name: full(t) for name, t in named.items()}
    return named


def _fill_twins(state: TrainState, spec: Any, loaded: dict[str, Tensor]) -> None:
    """Copy a tied weight where this rank holds both copies: only the first copy has been read."""
    for kind, tree in _trees(state).items():
        for w, t in with_specs(spec, tree):
            if not w.frozen and loaded[f"{kind}.{w.path}"] is not t:
                to_local(t).copy_(to_local(loaded[f"{kind}.{w.path}"]))


def _placed(state: TrainState, spec: Any, whole: dict[str, Tensor]) -> TrainState:
    """Return simulated tensors with the placements of ``state``, filled from the tensors in
    ``whole``."""

    def place(kind: str, tree: Any) -> Any:
        pairs = with_specs(spec, tree)
        return unflatten(
            tree, [t if w.frozen else shard_like(whole[f"{kind}.{w.path}"], t) for w, t in pairs]
        )

    trees = {kind: place(kind, tree) for kind, tree in _trees(state).items()}
    params = trees.pop("params")
    return TrainState(state.step, state.samples, params, OptimizerState(state.opt.step, trees))
