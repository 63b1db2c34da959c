"""The coordinate check: it fails with the standard parametrization, passes with muP, and fails if a
factor of muP is left out."""

from __future__ import annotations

import math
from contextlib import ExitStack
from unittest import mock

import pytest

from dtron.mup import Growth
from dtron.runtime.exit import run_cli
from dtron.tools.coordinate_check import main, slope

TINY = ["--widths=32,64,128", "--batch=4", "--seq-len=16", "--steps=4", "--optim.lr=1e-2"]
TINY += ["--model.embed=32", "--model.layers=2", "--model.heads=4", "--model.kv-heads=2"]
TINY += ["--model.head-dim=8", "--model.mlp=64", "--model.vocab=64", "--model.vocab-multiple=1"]
MUP = "--model.mup-base-width=32"

FEATURES = {
    "plain": [],
    "tied": ["--model.tied", "--model.qk-norm"],
    "experts": ["--model.moe.experts=4", "--model.moe.mlp=32", "--model.moe.shared=32"],
    "latent": ["--model.mla.kv-rank=16", "--model.mla.q-rank=16", "--model.mla.nope-dim=8"],
    "heads": ["--model.mup-base-head-dim=8"],
    "muon": ["--optim.name=muon"],
    "lion": ["--optim.name=lion", "--optim.lr=3e-3"],
    "sgd": ["--optim.name=sgd", "--optim.lr=0.1", "--optim.max-grad-norm=0"],
}


@pytest.mark.parametrize("name", FEATURES)
def test_with_mup_nothing_grows(name, capsys):
    assert run_cli(main, [*TINY, MUP, *FEATURES[name]]) == 0
    out = capsys.readouterr().out
    assert "nothing grows with the width" in out and "muP, base width 32" in out


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "heads"])
def test_the_standard_parametrization_fails(name, capsys):
    assert run_cli(main, [*TINY, *FEATURES[name]]) == 1
    out = capsys.readouterr().out
    assert "grows with the width: the largest slope is" in out and "(standard)" in out


def one(growth: Growth) -> float:
    return 1.0


@pytest.mark.parametrize(
    "mutant",
    [
        {"dtron.mup.Growth.sign_rate": property(one)},
        {"dtron.mup.Growth.init_std": property(one)},
        {"dtron.model.transformer.head_input": lambda x, m: x},
    ],
    ids=lambda mutant: next(iter(mutant)).rpartition(".")[2],
)
def test_a_factor_that_is_left_out_is_seen(mutant):
    with ExitStack() as patches:
        for name, value in mutant.items():
            patches.enter_context(mock.patch(name, value))
        assert run_cli(main, [*TINY, MUP]) == 1


def test_slope():
    assert slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert slope([8, 16, 64], [5.0, 5.0, 5.0]) == pytest.approx(0)
    assert slope([2, 8], [8.0, 2.0]) == pytest.approx(-1)
    assert slope([2, 8], [1.0, math.nan]) == math.inf


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--widths=64"], ["--widths 64", "two widths"]),
        (["--widths=64,64"], ["two widths"]),
        (["--widths=64,x"], ["'64,x'", "change it"]),
        (["--widths=0,64"], ["'0,64'"]),
        (["--widths="], ["''"]),
        (["--steps=0"], ["steps=0", "from 1"]),
        (["--batch=-1"], ["batch=-1"]),
        (["--seq-len=0"], ["seq_len=0"]),
        (["--slope=-1"], ["slope=-1"]),
        (["--slope=nan"], ["slope"]),
        (["--widths=32,33"], ["width 33", "model.heads=4", "would be 4.125"]),
        (["--width=32,64"], ["did you mean --widths?"]),
        ([MUP, "--optim.name=muon", "--optim.options=per_head=true"], ["per_head=true"]),
    ],
)
def test_a_wrong_value_is_one_line(flags, parts, capsys):
    assert run_cli(main, [*TINY, *flags]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    assert all(part in err for part in parts), err
