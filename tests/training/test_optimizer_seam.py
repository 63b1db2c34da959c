"""An optimizer is one file: here ``SGD``, as CONTRIBUTING.md shows it, and a second one that is not
elementwise. They are registered by a line, and then everything knows them: training on any mesh,
checkpoints, ``dtron show``, ``dtron verify`` and the flags."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

import train as program
from dtron import checkpoint
from dtron.bounds import under
from dtron.checkpoint.__main__ import main as inspect_checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, like, to_local
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec, init
from dtron.rules import rules_for
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools import show, verify
from dtron.tools.compare_steps import StepResult
from dtron.training.optim_config import OPTIMIZERS, build_optimizer
from dtron.training.optimizer import (
    ElementwiseOptimizer,
    Optimizer,
    UpdateScalars,
    apply_update,
    init_state,
    overwrite,
    with_compute_copies,
)
from dtron.tree import flat, tree_map
from tests.checkpoint.test_checkpoint import built as built_state
from tests.checkpoint.test_checkpoint import differences, move_on_pool
from tests.helpers.examples import examples
from tests.helpers.paths import ROOT
from tests.helpers.runs import MODEL, on_pool, simulate, train
from tests.helpers.texts import one_line
from tests.helpers.values import F64, ONE, assert_steps_of_torch, normal
from tests.moe.test_moe_training import SPARSE
from tests.test_house import graph
from tests.tools.test_show import _first_rank


@dataclass(frozen=True)
class SGD(ElementwiseOptimizer):
    """SGD with momentum, as in torch.optim.SGD."""

    weight_decay: float
    momentum: float = 0.9

    state_names = ("momentum",)

    def __post_init__(self) -> None:
        under(self, "optim", {"momentum": 1})

    def for_weight(self, w: WeightSpec) -> SGD:
        return self if w.decays else replace(self, weight_decay=0.0)

    def rule(
        self, w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (m,) = state
        m = self.momentum * m + g + self.weight_decay * w
        return w - lr * m, (m,)


@dataclass(frozen=True)
class NormalizedSGD(Optimizer):
    """Matrices move along their momentum, divided by its norm. All other weights move along their
    gradient and have no state. The norm is of the whole matrix, so the update communicates."""

    momentum: float = 0.9

    def _is_matrix(self, w: WeightSpec) -> bool:
        return len(w.axes) > 1 and not w.frozen

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        state = lambda w, x: torch.zeros_like(x) if self._is_matrix(w) else None
        return {"momentum": tree_map(state, spec, params)}

    def state_bytes(self, w: WeightSpec, shape, element: int) -> int:
        return element * torch.Size(shape).numel() if self._is_matrix(w) else 0

    def update(self, spec, params, grads, state, scalars: UpdateScalars, layout: Layout):
        copies = flat(state.compute_copies) or [None] * len(flat(params))
        momenta = iter(flat(state.trees["momentum"]))
        for w, p, g, copy in zip(flat(spec), flat(params), flat(grads), copies, strict=True):
            if w.frozen:
                continue
            old, new = [to_local(p)], [to_local(g).to(p.dtype) * scalars.scale]
            if self._is_matrix(w):
                m = next(momenta)
                old.append(to_local(m))
                new.append(self.momentum * to_local(m) + new[0])
                whole = full(like(m, new[1]))
                new[0] = to_local(layout.shard(whole / whole.norm(), *w.axes))
            new[0] = old[0] - scalars.lr * new[0]
            overwrite(old, new, scalars.ok)
            if copy is not None:
                to_local(copy).copy_(to_local(p))
        return params, state


@dataclass(frozen=True)
class NoMomentum(SGD):
    """A mutant: the momentum is not multiplied."""

    def rule(self, w, g, state, lr):
        (m,) = state
        return super().rule(w, g, (m / self.momentum,), lr)


@dataclass(frozen=True)
class ShardMean(SGD):
    """A mutant: not elementwise, it sees the mean of a rank's shard."""

    def rule(self, w, g, state, lr):
        return super().rule(w, g - g.mean(), state, lr)


@dataclass(frozen=True)
class ShardNorm(NormalizedSGD):
    """A mutant: the norm is that of a rank's shard."""

    def update(self, spec, params, grads, state, scalars, layout):
        with mock.patch(f"{__name__}.full", to_local), mock.patch.object(Layout, "shard", _first):
            return super().update(spec, params, grads, state, scalars, layout)


def _first(layout: Layout, x: Tensor, *axes: str) -> Tensor:
    return x


ALL = {
    "sgd": SGD,
    "normalized-sgd": NormalizedSGD,
    "no-momentum": NoMomentum,
    "shard-mean": ShardMean,
    "shard-norm": ShardNorm,
}
BOTH = ("sgd", "normalized-sgd")


@contextmanager
def registered() -> Iterator[None]:
    with mock.patch.dict(OPTIMIZERS, ALL):
        yield


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


# ---- what it computes


def steps_of_torch(optimizer: SGD) -> None:
    """Five steps of one block are those of torch.optim.SGD."""
    model = replace(MODEL, qkv_bias=True, bias=True)
    assert_steps_of_torch(optimizer, model, torch.optim.SGD, momentum=0.8)


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_that_of_torch(compile):
    kind = lambda o: o.compiled("aot_eager") if compile else o
    steps_of_torch(kind(SGD(weight_decay=0.3, momentum=0.8)))
    assert_caught(lambda: steps_of_torch(kind(NoMomentum(weight_decay=0.3, momentum=0.8))))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("compile", [False, True])
def test_copies_follow_and_a_step_that_is_not_finite_moves_nothing(name, compile):
    spec, optimizer = declare_model(MODEL), build_optimizer(OptimConfig(name=name))
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    params = init(spec, MODEL.dims(), 0, ONE)
    state = init_state(optimizer, spec, params)
    state = with_compute_copies(state, params, spec, torch.bfloat16)
    tensors = flat((params, *state.trees.values(), state.compute_copies))  # overwritten in place
    for number in range(3):
        before = [x.clone() for x in tensors]
        draw = lambda w, number=number: normal(*w.shape, seed=number).bfloat16().detach()
        grads, ok = tree_map(draw, params), torch.tensor(number != 1)
        if number == 1:
            grads = tree_map(lambda g: g * torch.nan, grads)
        scalars = UpdateScalars(0.5, 0.7, ok)
        params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
        assert state.step == number + 1
        assert all(a.equal(b) == (number == 1) for a, b in zip(before, tensors, strict=True))
        copies = flat(state.compute_copies)
        assert all(c.equal(w.bfloat16()) for c, w in zip(copies, flat(params), strict=True))


@pytest.mark.parametrize("name", ["adamw", *BOTH])
def test_numbers_may_be_tensors(name):
    """As in a recorded step, whose kernels read the rate and the step's number from the device."""
    spec, optimizer = declare_model(MODEL), build_optimizer(OptimConfig(name=name))
    found = []
    for number in (float, lambda x: torch.tensor(x, dtype=F64)):
        params = init(spec, MODEL.dims(), 0, ONE)
        state = init_state(optimizer, spec, params)
        for step in (1, 2):
            grads = tree_map(lambda w: normal(*w.shape).float().detach(), params)
            scalars = UpdateScalars(number(0.1), number(0.7), step=number(step))
            kernel = optimizer.compiled("eager")
            params, state = apply_update(kernel, spec, params, grads, state, scalars, ONE)
        found.append(flat((params, *state.trees.values())))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


# ---- on any mesh


def config(name: str, **changes: Any) -> RunConfig:
    optim = OptimConfig(name=name, options="momentum=0.8")
    base = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=8, steps=3, seed=3)
    return replace(base, optim=optim, **changes)


def one_step_agrees(name: str, mesh: str, zero: int, mutant: str | None = None) -> None:
    """``dtron verify`` compares gradients, weights and the optimizer's state."""
    c = config(name, mesh=mesh, zero=zero, batch=12)
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    if mutant:
        c = replace(c, optim=replace(c.optim, name=mutant))
    loss, rows = verify.compare(want, verify.one_step(c, MeshShape.parse(mesh)))
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)
    assert list(want.state) == ["momentum"]


def _divides_heads(mesh: str) -> bool:
    return MODEL.kv_heads % MeshShape.parse(mesh).tp == 0


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=examples(3))
@given(mesh=meshes(max_ranks=4).filter(_divides_heads), zero=zero_stages())
@example("dp=3", 0)
@example("dp=2,tp=2", 3)
def test_one_step_on_any_mesh(name, mesh, zero):
    one_step_agrees(name, mesh, zero)


@pytest.mark.parametrize(("name", "mutant"), zip(BOTH, ("shard-mean", "shard-norm"), strict=True))
def test_an_update_that_depends_on_sharding_is_seen(name, mutant):
    one_step_agrees(name, "dp=3", 3)
    assert_caught(lambda: one_step_agrees(name, "dp=3", 3, mutant))


def agree(got: tuple[list[float], list[float]], want: tuple[list[float], list[float]]) -> None:
    """Losses and gradient norms. The third depends on weights and state after two updates."""
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


STEPS = [
    ("dp=2,tp=2", {"zero": 1}),
    ("dp_replicate=2,dp=2", {"zero": 2, "micro_batch": 1}),
    ("dp=4", {"zero": 3}),
    ("cp=2,tp=2", {"zero": 3}),
    ("dp=4,ep=4", {"zero": 3, "model": SPARSE}),
    ("dp=2,tp=2,ep=2,etp=2", {"zero": 1, "model": SPARSE}),
    ("pp=2,dp=2", {"pipeline": PipelineConfig(schedule="1f1b")}),
    (
        "pp=2,tp=2",
        {"pipeline": PipelineConfig(schedule="zb-h1"), "model": replace(MODEL, tied=True)},
    ),
]


def expected(c: RunConfig) -> tuple[list[float], list[float]]:
    """On one device. With experts their auxiliary loss is of the global batch, so microbatches do
    not matter."""
    return _expected(replace(c, mesh="", zero=1, pipeline=PipelineConfig(), micro_batch=None))


@cache
def _expected(c: RunConfig) -> tuple[list[float], list[float]]:
    history = train(Layout(), MeshShape(), c, F64)
    assert history.losses[-1] != history.losses[0]
    return history.losses, history.norms


# An elementwise optimizer sends nothing, so three meshes are enough for it.
OF_BOTH = [
    *(("normalized-sgd", *step) for step in STEPS),
    *(("sgd", *STEPS[i]) for i in (0, 4, 7)),
]


@pytest.mark.parametrize(("name", "mesh", "changes"), OF_BOTH)
def test_three_steps_on_simulated_ranks(name, mesh, changes):
    c = config(name, mesh=mesh, **changes)
    got = simulate(mesh, c, F64)
    agree((got.losses, got.norms), expected(c))


def steps_on_pool(mesh: str, c: RunConfig) -> tuple[list[float], list[float]]:
    """A job for the pool."""
    with registered():
        return on_pool(mesh, c, F64)[:2]


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,tp=2", 3), ("pp=2,dp=2", 1)])
def test_three_steps_on_real_ranks(pool, name, mesh, zero):
    c = config(name, mesh=mesh, zero=zero)
    for got in pool.run(steps_on_pool, mesh, c):
        agree(got, expected(c))


# ---- saved and resumed


NAMES = SGD.state_names
MOVES = [
    (("dp=2,tp=2", 3, "1f1b"), ("pp=2,tp=2", 1, "zb-v")),
    (("pp=2,dp=2", 1, "1f1b"), ("dp=2,tp=2,ep=4", 3, "1f1b")),
]


@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_state_moves_to_another_mesh_to_the_bit(tmp_path, saved, loaded):
    with simulated(MeshShape.parse(saved[0])) as mesh:
        spec, state = built_state(saved, None, mesh, False, NAMES)
        checkpoint.save(tmp_path, state, spec, {})
    with simulated(MeshShape.parse(loaded[0])) as mesh:
        assert differences(loaded, None, mesh, str(tmp_path), NAMES) == []


@pytest.mark.xdist_group("pool")
def test_state_moves_between_real_ranks(pool, tmp_path):
    assert pool.run(move_on_pool, *MOVES[0], str(tmp_path), "", NAMES) == [[]] * 4


FLAGS = [
    "--model.layers=1", "--model.embed=16", "--model.heads=2", "--model.kv-heads=2",
    "--model.head-dim=8", "--model.mlp=16", "--model.vocab=280", "--data.seq-len=16", "--batch=4",
    "--steps=4", "--sample-tokens=0", "--eval-every=0", "--dtype=float64", "--device=cpu", "--simulate",
    "--optim.schedule=constant", "--optim.warmup=0", "--optim.lr=0.05", "--save-every=2",
]  # fmt: skip


def losses(run_dir: Path, *flags: str) -> list[float]:
    """Of train.py, from its log."""
    text = run_dir.parent / "text.txt"
    text.write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(400)))
    assert (
        run_cli(program.main, [*FLAGS, f"--data.path={text}", f"--run-dir={run_dir}", *flags]) == 0
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def resumed(folder: Path, name: str) -> None:
    """Step 4 is the first that depends on the state in the checkpoint of step 2."""
    flags = [f"--optim.name={name}", "--optim.options=momentum=0.8"]
    want = losses(folder / "run", "--mesh=dp=2,tp=2", "--zero=3", *flags)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    got = losses(folder / "run", "--mesh=dp=2", "--zero=1", "--resume", *flags)
    assert got == pytest.approx(want, rel=1e-9) and len(got) == 4


@pytest.mark.parametrize("name", BOTH)
def test_a_run_resumes_on_another_mesh(tmp_path, name, monkeypatch):
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    resumed(tmp_path / "right", name)
    true = checkpoint.state.tensors
    monkeypatch.setattr(checkpoint.state, "tensors", lambda *args: _forget(true(*args)))
    assert_caught(lambda: resumed(tmp_path / "wrong", name))


def _forget(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state is saved as zeros."""
    return {k: x if k.startswith("params.") else torch.zeros_like(x) for k, x in named.items()}


def test_another_optimizer_is_refused_in_one_line(tmp_path, capsys):
    flags = ["--mesh=dp=2", "--steps=2"]
    losses(tmp_path / "run", *flags)
    shared = [*FLAGS, f"--data.path={tmp_path / 'text.txt'}", f"--run-dir={tmp_path / 'run'}"]
    argv = [*shared, "--mesh=dp=2", "--steps=3", "--resume", "--optim.name=sgd"]
    capsys.readouterr()
    assert run_cli(program.main, argv) == 2
    error = capsys.readouterr().err
    assert "was made with optim.name=adamw, this run has sgd; use --optim.name adamw" in error
    meta = checkpoint.newest(tmp_path / "run") / "meta.json"
    content = json.loads(meta.read_text())
    del content["identity"]["optim.name"]  # as an older version wrote it
    meta.write_text(json.dumps(content))
    assert run_cli(program.main, argv) == 2
    assert capsys.readouterr().err == error


def test_inspect_lists_the_state(tmp_path, capsys):
    spec, state = built_state(("dp=1", 0, "1f1b"), None, None, False, NAMES)
    checkpoint.save(tmp_path, state, spec, {})
    assert inspect_checkpoint(["inspect", str(checkpoint.newest(tmp_path))]) == 0
    assert "parameters; optimizer state: momentum" in capsys.readouterr().out


# ---- its memory, its proof, its flags


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("zero", [0, 3])
def test_the_bytes_are_those_of_real_shards(name, zero):
    shape, optim = MeshShape.parse("dp=3,tp=2"), OptimConfig(name=name)
    with simulated(shape) as mesh:
        spec = declare_model(MODEL)
        params = init(spec, MODEL.dims(), 0, Layout(mesh, rules_for(zero)))
        trees = init_state(build_optimizer(optim), spec, params).trees.values()
        held = sum(4 * _first_rank(x).numel() for tree in trees for x in flat(tree))
    total = lambda optim: show.total(show.rows(MODEL, shape, zero, compute=4, optim=optim))
    assert total(optim)[2] == held > 0
    assert total(optim)[2] <= total(None)[2] / 2 and total(optim)[:2] == total(None)[:2]


def test_the_commands_take_its_name(capsys):
    model = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.kv-heads=2"]
    model += ["--model.head-dim=16", "--model.mlp=64", "--model.vocab=300", "--mesh=dp=2,tp=2"]
    sizes = []
    for name in ("adamw", "sgd"):
        assert show.main([*model, f"--optim.name={name}"]) == 0
        out = capsys.readouterr().out
        sizes.append(re.search(r"bf16: (.*) and activations", out)[1])  # the memory estimate
    assert sizes[0] != sizes[1]
    flags = [*model, "--optim.options=momentum=0.7"]
    assert run_cli(verify.main, [*flags, "--optim.name=sgd"]) == 0
    assert "the same result as one device" in capsys.readouterr().out


def test_verify_names_the_weight_whose_state_differs(capsys, monkeypatch):
    """As if the mesh had another optimizer than the device."""
    step = verify.one_step

    def one_step(c: RunConfig, shape: MeshShape, **how: Any) -> StepResult:
        mutant = replace(c.optim, name="shard-mean" if shape.size > 1 else "sgd")
        return step(replace(c, optim=mutant), shape, **how)

    monkeypatch.setattr(verify, "one_step", one_step)
    model = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.kv-heads=2"]
    assert run_cli(verify.main, [*model, "--model.head-dim=16", "--mesh=dp=2"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(r"differs from one device, first in embedding.w_tokens \((.*)\)", out)[1]
    grad, weight, state = (float(part.split()[1]) for part in found.split(", "))
    assert grad < 1e-9 < state and weight > 1e-9


@pytest.mark.parametrize(
    ("optim", "parts"),
    [
        ({"name": "adam"}, ["optim.name=adam", "use adamw or sgd"]),
        ({"options": "momentum=0.9"}, ["optim.options=momentum=0.9", "adamw", "has none"]),
        ({"name": "sgd", "options": "beta=1"}, ["no option 'beta'", "it has momentum"]),
        ({"name": "sgd", "options": "weight_decay=1"}, ["no option 'weight_decay'"]),
        ({"name": "sgd", "options": "momentum=x"}, ["momentum must be a float, not 'x'"]),
        ({"name": "sgd", "options": "momentum"}, ["momentum must be a float, not ''"]),
        ({"name": "sgd", "options": "momentum=1"}, ["optim.momentum=1.0", "under 1"]),
    ],
)
def test_what_does_not_exist_is_one_line(optim, parts):
    one_line(lambda: OptimConfig(**optim), *parts)
    flags = [f"--optim.{name}={value}" for name, value in optim.items()]
    one_line(lambda: parse(flags), *parts)


def test_options_are_flags_of_the_config_or_its_own():
    parsed = parse(["--optim.name=sgd", "--optim.options=momentum=0.5", "--optim.weight-decay=0.2"])
    assert build_optimizer(parsed.optim) == SGD(weight_decay=0.2, momentum=0.5)
    assert build_optimizer(OptimConfig(name="sgd")) == SGD(weight_decay=0.1, momentum=0.9)


def test_a_tree_that_a_checkpoint_cannot_name_is_refused():
    for name in ("params", "m.v"):

        class Wrong(SGD):
            state_names = (name,)

        with pytest.raises(ValueError, match=f"'{name}'; rename it"):
            init_state(
                Wrong(0.0), declare_model(MODEL), init(declare_model(MODEL), MODEL.dims(), 0, ONE)
            )


def test_one_file_knows_each_optimizer():
    """The dict of names imports it, and nothing else does."""
    importers = {name for name, others in graph().items() if "training.adamw" in others}
    assert importers == {"training.optim_config"}


def test_the_page_shows_this_optimizer():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    code = inspect.getsource(SGD)
    assert f"```python\n{code}```" in page
