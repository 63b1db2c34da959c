"""A checkpoint of any mesh loads on any other mesh, equal to the bit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron import checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.mesh import Layout, stage_mesh
from dtron.moe.config import MoEConfig
from dtron.params import WeightSpec
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, ModelConfig, PipelineConfig, RunConfig
from dtron.schedules.p2p import PipelineGroups
from dtron.training.optimizer import OptimizerState
from dtron.training.pipeline import pipeline
from dtron.tree import flat, tree_map
from tests.helpers.examples import examples
from tests.helpers.real_mesh import real_mesh
from tests.helpers.values import ADAMW

# Blocks with an MLP and with experts, a vocabulary with padding, a bias that balances, and a tied
# embedding, of which two stages have a copy.
SPARSE = ModelConfig(
    vocab=13,
    embed=6,
    layers=4,
    heads=4,
    kv_heads=4,
    head_dim=2,
    mlp=8,
    vocab_multiple=4,
    tied=True,
    qk_norm=True,
    context=16,
    moe=MoEConfig(4, 2, 4, dense_layers=1, bias_rate=1e-3, shared=4),
)
Where = tuple[str, int, str]  # mesh, ZeRO stage, schedule

SCHEDULES = {
    1: ["1f1b"],
    2: ["1f1b", "interleaved", "zb-v"],
    4: ["1f1b"],
}  # four layers allow these


def shapes(ranks: int, *axes: str) -> list[MeshShape]:
    """All shapes with this number of ranks over these axes, and with all shapes of experts."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    found = []
    for ns in product(sizes, repeat=len(axes)):
        dense = MeshShape(**dict(zip(axes, ns, strict=True)))
        inner = dense.dp * dense.cp * dense.tp
        if dense.size == ranks:
            experts = [(ep, etp) for ep in sizes for etp in sizes if inner % (ep * etp) == 0]
            found += [replace(dense, ep=ep, etp=etp) for ep, etp in experts]
    return found


def places(shapes: list[MeshShape]) -> st.SearchStrategy[Where]:
    return st.sampled_from(shapes).flatmap(
        lambda s: st.tuples(
            st.just(str(s)), st.sampled_from([0, 1, 2, 3]), st.sampled_from(SCHEDULES[s.pp])
        )
    )


REAL = places(shapes(4, "pp", "dp_replicate", "dp", "cp", "tp"))
SIMULATED = places(
    [MeshShape(), *shapes(2, "pp", "dp", "tp"), *shapes(3, "dp"), *shapes(4, "pp", "dp", "tp")]
)


def value(w: WeightSpec, kind: str) -> Tensor:
    """A value that differs at every index of every weight and moment."""
    with paused():  # otherwise every simulated rank draws its own values
        return torch.randn(
            w.shape, generator=torch.Generator().manual_seed(crc32(f"{kind}.{w.path}".encode()))
        )


def built(
    where: Where, rank: int | None, mesh: DeviceMesh | None, blank: bool, names=ADAMW.state_names
):
    """Build the declared weights of this rank's stages and a train state.

    ``rank``: None means all stages.
    ``blank``: the state has zeros in place of ``value``.
    ``names``: names of the optimizer's trees."""
    text, zero, schedule = where
    shape, layout = MeshShape.parse(text), Layout(mesh, rules_for(zero))
    config = RunConfig(
        model=SPARSE, mesh=text, pipeline=PipelineConfig(schedule), data=DataConfig(seq_len=16)
    )
    pipe = pipeline(config, shape, 8, config.data.seq_len, layout)
    if rank is not None and shape.pp > 1:
        pipe = replace(pipe, groups=PipelineGroups(rank // (shape.size // shape.pp), (), None, {}))
    trees = {
        kind: tree_map(
            lambda w, kind=kind: layout.shard(
                torch.zeros(w.shape) if blank else value(w, kind), *w.axes
            ),
            pipe.spec,
        )
        for kind in ("params", *names)
    }
    step = 0 if blank else 7
    params = trees.pop("params")
    return pipe.spec, checkpoint.TrainState(step, 8 * step, params, OptimizerState(step, trees))


def differences(
    where: Where, rank: int | None, mesh: DeviceMesh | None, folder: str, names=ADAMW.state_names
) -> list[str]:
    """Load a checkpoint, and name every tensor that is not equal to the bit."""
    spec, state = built(where, rank, mesh, True, names)
    state = checkpoint.load(checkpoint.newest(Path(folder)), state, spec, {})
    _, want = built(where, rank, mesh, False, names)
    trees = {name: (state.opt.trees[name], want.opt.trees[name]) for name in names}
    trees["params"] = state.params, want.params
    wrong = [
        f"{kind}.{w.path}"
        for kind, (a, b) in trees.items()
        for w, x, y in zip(flat(spec), flat(a), flat(b), strict=True)
        if not torch.equal(to_local(x), to_local(y))
    ]
    numbers = state.step, state.samples, state.opt.step
    return wrong + ([] if numbers == (7, 56, 7) else [f"step, samples, updates {numbers}"])


def move_on_pool(
    saved: Where, loaded: Where, folder: str, mutant: str = "", names=ADAMW.state_names
) -> list[str]:
    """A job for the pool: save on one mesh and load on another. ``save`` returns when the file is
    whole on all ranks."""
    build = lambda where: stage_mesh(real_mesh(where[0]))
    with mutated(mutant):
        spec, state = built(saved, dist.get_rank(), build(saved), False, names)
        path = checkpoint.save(Path(folder), state, spec, {})
    meta = checkpoint.read_meta(path)
    written = {
        name: sum(math.prod(part.shape) for part in tensor.parts)
        for name, tensor in meta.tensors.items()
    }
    assert mutant or written == {name: math.prod(t.shape) for name, t in meta.tensors.items()}
    with mutated(mutant if mutant == "twin" else ""):
        return differences(loaded, dist.get_rank(), build(loaded), folder, names)


def moves(pool, folder: Path, saved: Where, loaded: Where, mutant: str = "") -> None:
    assert pool.run(move_on_pool, saved, loaded, str(folder), mutant) == [[]] * 4, (saved, loaded)


def there_and_back(pool, folder: Path, saved: Where, loaded: Where, then: Where) -> None:
    """Four real ranks save, and four ranks of another mesh load. Then simulated ranks load, in any
    number."""
    moves(pool, folder, saved, loaded)
    with simulated(MeshShape.parse(then[0])) as mesh:
        assert differences(then, None, mesh, str(folder)) == []


@pytest.mark.xdist_group("pool")
@settings(max_examples=examples(2))
@given(saved=REAL, loaded=REAL, then=SIMULATED)
@example(("pp=2,tp=2", 1, "zb-v"), ("dp=4,ep=2", 3, "1f1b"), ("dp=1", 0, "1f1b"))
@example(("dp=2,tp=2,ep=4", 3, "1f1b"), ("pp=2,dp=2", 0, "zb-v"), ("dp=3", 2, "1f1b"))
def test_saved_on_any_mesh_and_loaded_on_any_other(pool, tmp_path_factory, saved, loaded, then):
    """Any two meshes over pp, dp_replicate, dp, cp, tp, ep and etp, any ZeRO stages and
    schedules."""
    there_and_back(pool, tmp_path_factory.mktemp("moved"), saved, loaded, then)


@pytest.mark.slow
@pytest.mark.xdist_group("pool")
@settings(max_examples=40)
@given(saved=REAL, loaded=REAL, then=SIMULATED)
def test_saved_on_many_meshes_and_loaded_on_many_others(
    pool, tmp_path_factory, saved, loaded, then
):
    there_and_back(pool, tmp_path_factory.mktemp("moved"), saved, loaded, then)


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Save or load with a mistake.

    ``moment``: the second moment is saved as the first.
    ``offset``: every shard is saved in the place of the opposite rank.
    ``twin``: only one of the two copies of a tied weight is filled."""
    true = checkpoint.tensors

    def tensors(state: checkpoint.TrainState, spec) -> dict[str, Tensor]:
        named = true(state, spec)
        if name == "moment":
            return {path: named[re.sub(r"^m\.", "v.", path)] for path in named}
        mesh = next(x for x in named.values() if isinstance(x, DTensor)).device_mesh
        flipped = DeviceMesh("cpu", mesh.mesh.flip(-1), mesh_dim_names=mesh.mesh_dim_names)
        return {
            path: DTensor.from_local(
                to_local(x), flipped, x.placements, shape=x.shape, stride=x.stride()
            )
            for path, x in named.items()
        }

    with pytest.MonkeyPatch.context() as patch:
        if name == "twin":
            patch.setattr(checkpoint.state, "_fill_twins", lambda *_: None)
        elif name:
            patch.setattr(checkpoint.state, "tensors", tensors)
        yield


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("mutant", ["moment", "offset", "twin"])
def test_a_tensor_in_another_place_is_seen(pool, tmp_path, mutant):
    saved, loaded = ("dp_replicate=2,tp=2", 3, "1f1b"), ("pp=2,tp=2", 1, "zb-v")
    moves(pool, tmp_path / "right", saved, loaded)
    with pytest.raises(AssertionError, match="w_tokens"):
        moves(pool, tmp_path / "wrong", saved, loaded, mutant)
