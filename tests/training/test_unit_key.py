"""The keys under which torch keeps the graphs of units: never the same for two graphs, and the same
in every process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import dtron.training.unit_key as module
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.training.compiled_stage import compiled
from dtron.training.pipeline import one_stage, program
from dtron.training.traced_function import Kind, TracedFunction
from dtron.training.unit_key import disk_key
from dtron.tree import flat
from tests.helpers.compiled import BLOCK, ONE, ROWS, lone_rank
from tests.helpers.paths import ROOT

VARIANTS = [
    ("dp=1", {}, {}),
    ("dp=1", {"norm_eps": 1e-3}, {}),
    ("dp=1", {"window": 5}, {}),
    ("dp=1", {"activation": "gelu"}, {}),
    ("dp=1", {"z_loss": 0.1}, {}),
    ("dp=1", {}, {"recompute": "full"}),
    ("dp=1", {}, {"recompute": "selective"}),
    ("dp=1", {}, {"attention_kernel": "reference"}),
    ("dp=1", {}, {"fp8": "tensorwise", "fp8_first_last": True, "fp8_min_weights": 0}),
    ("dp=1", {"moe": MoEConfig(experts=4, top_k=2, mlp=16)}, {}),
    ("dp=1", {"moe": MoEConfig(experts=4, top_k=1, mlp=16)}, {}),
    ("dp=2", {}, {}),
    ("tp=2", {}, {}),
    ("tp=4", {}, {}),
    ("cp=2", {}, {}),
]


def keys(mesh: str, change: dict, how: dict) -> list[str | None]:
    """The keys of the units that a step calls. Nothing is compiled."""
    layout = ONE if mesh == "dp=1" else Layout(lone_rank(mesh), rules_for(1))
    model, config, found = replace(BLOCK, **change), ComputeConfig(**how), []

    def eager(self, tensors, *plain, **_):
        found.append(disk_key(*self._context, *plain))
        _, extra = self._fn(tensors, *plain)
        return Kind(lambda *xs: self._fn(list(xs), *plain)[0], extra)

    patch = pytest.MonkeyPatch()
    patch.setattr(TracedFunction, "kind", eager)
    try:
        functions = compiled(program(model, layout, config, splits=False), layout, config)
        pipe = one_stage(model, 1, layout)
        params = init(pipe.spec, model.dims(), 0, layout)
        weights, none = params[0], [False] * len(flat(params[0]))
        if mesh != "dp=1":
            weights, _ = functions.stage_weights.leaves(params[0], False, none)
        batch = make_batch(ROWS, layout)
        with torch.no_grad():
            functions.stage(weights, functions.enter(weights, batch), batch)
    finally:
        patch.undo()
    return found


def every_key() -> list[list[str | None]]:
    return [keys(*variant) for variant in VARIANTS]


def test_two_graphs_never_have_one_key():
    found = every_key()
    assert all(key is not None for each in found for key in each)
    blocks = [each[-2] for each in found]
    # z-loss is a setting of the whole model, so it changes the key of blocks too.
    assert len(set(blocks)) == len(VARIANTS)
    assert len({each[-1] for each in found}) >= len(VARIANTS) - 2


def test_a_key_that_leaves_something_out_is_noticed(monkeypatch):
    text = module._text

    def vague(x, unknown):
        return "1" if isinstance(x, float) else text(x, unknown)

    monkeypatch.setattr(module, "_text", vague)
    with pytest.raises(AssertionError):
        test_two_graphs_never_have_one_key()


def test_keys_are_the_same_in_every_process():
    """No address and no order of a set is in a key."""
    code = "import tests.training.test_unit_key as t; print(t.keys(*t.VARIANTS[9]))"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{keys(*VARIANTS[9])}\n" != "[]\n"


def test_an_unknown_value_has_no_key():
    assert disk_key(1, "a", torch.float32) is not None
    assert disk_key(object()) is None
    assert disk_key(lambda x: x) is None  # its code is not in the key
    assert disk_key(partial(disk_key, torch.ones(1))) is None


def test_the_code_is_in_the_key(monkeypatch):
    before = disk_key(1)
    monkeypatch.setattr(module, "_code", lambda: "other code")
    assert disk_key(1) != before
