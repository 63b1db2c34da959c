"""Which checkpoints are refused, and how the reason is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtron import checkpoint
from dtron.checkpoint.__main__ import main as inspect
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.rope import RopeConfig
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.config import DataConfig, identity_of
from dtron.training.optimizer import init_state
from dtron.tree import tree_map
from tests.helpers.runs import MODEL, digest
from tests.helpers.texts import one_line
from tests.helpers.values import ADAMW
from tests.training.test_steps import TEN

SPEC, SAME = declare_model(MODEL), identity_of(TEN, "text")


def fresh(layout: Layout, seed: int = 3) -> checkpoint.TrainState:
    params = init(declare_model(MODEL), MODEL.dims(), seed, layout)
    return checkpoint.TrainState(0, 0, params, init_state(ADAMW, SPEC, params))


def used(layout: Layout) -> checkpoint.TrainState:
    """A state in which every tensor differs from a fresh one's."""
    state = fresh(layout)
    move = lambda tree, by: tree_map(lambda t: t + by, tree)
    trees = {name: move(tree, by) for (name, tree), by in zip(state.opt.trees.items(), (0.5, 0.25))}
    opt = replace(state.opt, step=7, trees=trees)
    return checkpoint.TrainState(7, 56, move(state.params, 1.0), opt)


def digests(state: checkpoint.TrainState) -> list[str]:
    return [digest(tree) for tree in (state.params, *state.opt.trees.values())]


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2,tp=2"])
def test_a_checkpoint_of_simulated_ranks_loads_on_one_device(tmp_path, mesh):
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        checkpoint.save(tmp_path, used(Layout(device_mesh)), SPEC, SAME)
    state = checkpoint.load(checkpoint.newest(tmp_path), fresh(Layout()), SPEC, SAME)
    assert digests(state) == digests(used(Layout())) != digests(fresh(Layout()))


def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, used(Layout()), SPEC, SAME)


def refused(path: Path, **changes) -> str:
    with pytest.raises(ValueError) as error:
        config = replace(TEN, **changes)
        checkpoint.load(path, fresh(Layout()), SPEC, identity_of(config, "text"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path)
    data = max(path.iterdir(), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    assert "not whole" in refused(path) and data.name in refused(path)
    data.unlink()
    assert "0 of" in refused(path)


def test_a_corrupt_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path)
    file = path / "rank-00000.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    assert "delete it" in refused(path)
    (path / "meta.json").write_text("{")
    assert "no readable checkpoint" in refused(path)


def test_a_checkpoint_of_another_model_or_seed_is_refused(tmp_path):
    path = saved(tmp_path)
    assert "--model.mlp 40" in refused(path, model=replace(MODEL, mlp=48))
    assert "--model.qk-norm" in refused(path, model=replace(MODEL, qk_norm=False))
    assert "--model.rope.theta 10000.0" in refused(path, model=replace(MODEL, rope=RopeConfig(5e5)))
    assert "--data.seq-len 16" in refused(path, data=DataConfig(seq_len=8))
    assert "--seed 3" in refused(path, seed=4)
    with pytest.raises(ValueError, match="other text"):
        checkpoint.load(path, fresh(Layout()), SPEC, SAME | {"text": "other"})


def test_a_checkpoint_in_the_making_is_not_found(tmp_path):
    path = saved(tmp_path)
    later = path.with_name("step-00000009.part")
    later.mkdir()
    (path.with_name("step-00000008")).mkdir()  # without meta.json: not whole
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_meta(path).step == 7


def test_an_unwritable_folder_is_one_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot write the checkpoint"):
        checkpoint.save(blocked, used(Layout()), SPEC, SAME)


def test_what_inspect_does_not_understand(tmp_path):
    for argv in (["inspect"], ["look", str(tmp_path)], ["inspect", str(tmp_path), "--all"]):
        one_line(lambda argv=argv: inspect(argv), "see --help")
    one_line(lambda: inspect(["inspect", str(tmp_path)]), "no checkpoint there", "run directory")
