"""python -m dtron.verify passes, and it names the first weight that shows a mistake."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import dropped, unsummed
from dtron.tools import verify, verify_step
from dtron.tools.compare_steps import StepResult
from dtron.tools.verify_processes import step_of_processes
from dtron.tree import leaves, tree_map
from tests.helpers.experts import last_experts
from tests.helpers.runs import MODEL

TINY = [
    "--model.layers=1",
    "--model.embed=32",
    "--model.heads=2",
    "--model.kv-heads=2",
    "--model.vocab=300",
]
TINY += ["--model.head-dim=16", "--model.mlp=64", "--mesh=dp=2,tp=2", "--zero=3"]


def run(capsys, *argv: str) -> tuple[int, str]:
    code = run_cli(verify.main, [*TINY, *argv])
    return code, " ".join(capsys.readouterr().out.split())


@cache
def step_of(config: RunConfig, shape: MeshShape) -> StepResult:
    """One step for all tests that change its result."""
    return verify_step.one_step(config, shape)


def spoil(monkeypatch, change: Callable[..., StepResult]) -> list[StepResult]:
    """Let ``change`` take the step on the mesh. Return both steps, once they are taken."""
    step, taken = verify.one_step, []

    def one_step(config, shape, **how):
        mine = partial(step, **how)
        taken.append(change(mine, config, shape) if shape.size > 1 else mine(config, shape))
        return taken[-1]

    monkeypatch.setattr(verify, "one_step", one_step)
    return taken


def test_it_passes_and_shows_what_was_communicated(capsys):
    code, out = run(capsys)
    assert code == 0 and "mesh dp=2,tp=2, zero 3: the same result as one device" in out
    for kind, axis in [("all_gather", "dp"), ("all_gather", "tp"), ("reduce_scatter", "dp")]:
        assert re.search(rf"│ {kind} │ {axis} │ [1-9]\d* │ \d+\.\d+ │", out), out
    assert "blocks.0.mlp.w_down" in out and "w_head" in out


def test_documents_are_proved_too(capsys, monkeypatch):
    """Documents and their mask count: a mesh step without the mask differs."""
    assert run(capsys, "--document-mask")[0] == 0
    bare = lambda step, config, shape: step(replace(config, data=DataConfig(seq_len=32)), shape)
    spoil(monkeypatch, bare)
    assert run(capsys, "--document-mask")[0] == 1


def test_a_reduction_forgotten_everywhere_fails_at_the_first_weight_it_touches(capsys, monkeypatch):
    taken = spoil(monkeypatch, lambda step, *args: step(*args, mutate=unsummed))
    code, out = run(capsys)
    wrong = [row.path for row in verify.compare(*taken)[1] if row.grad > 1e-3]
    assert code == 1 and len(wrong) > 3 and f"differs from one device, first in {wrong[0]} (" in out
    assert "the same result" not in out


def test_communication_that_no_line_asks_for_is_named_with_its_line(capsys, monkeypatch):
    """Without the first constrain of the MLP, its matmul would gather by itself. Without the loss's
    constrain, the local region would get an input that it did not declare."""
    spoil(monkeypatch, lambda step, *args: step(*args, mutate=dropped(3)))
    code, out = run(capsys)
    assert code == 1 and re.search(
        r"in mlp\.py:\d+: h_TF = linear\(.*\).*: DTensor would redistribute", out
    )
    monkeypatch.undo()
    spoil(monkeypatch, lambda step, *args: step(*args, mutate=dropped(5)))
    code, out = run(capsys)
    assert (
        code == 1
        and "input 0 of a local region has the placements" in out
        and "('tokens', 'act_embed')" in out
    )


@pytest.mark.parametrize("tree", ["grads", "params"])
@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")])
@pytest.mark.parametrize("path", ["blocks.0.mlp.w_up", "w_head"])
def test_one_wrong_gradient_or_weight_is_named(capsys, monkeypatch, tree, factor, path):
    def change(step, *args: Any) -> StepResult:
        result = step(*args) if "watch" in step.keywords else step_of(*args)
        result = replace(result, **{tree: tree_map(torch.clone, getattr(result, tree))})
        dict(leaves(getattr(result, tree)))[path].mul_(factor)
        return result

    spoil(monkeypatch, change)
    code, out = run(capsys)
    if tree == "grads" and factor != factor:
        assert code == 1 and f"is not finite; the gradient of {path} is the first" in out
    else:
        assert code == 1 and f"differs from one device, first in {path} (" in out


def test_a_step_has_the_same_bits_twice(capsys, monkeypatch):
    code, out = run(capsys, "--bitwise")
    assert code == 0 and out.endswith("to 1e-09; the same bits twice")
    taken = []

    def change(step, *args: Any) -> StepResult:
        """Change the lowest bit of a weight, the second time."""
        taken.append(step_of(*args))
        params = tree_map(torch.clone, taken[0].params)
        dict(leaves(params))["w_head"].view(torch.int64)[3, 4] ^= len(taken) - 1
        return replace(taken[0], params=params)

    spoil(monkeypatch, change)
    code, out = run(capsys, "--bitwise")
    assert code == 1 and out.endswith("other bits the second time, first in w_head")


MOE = ["--model.moe.experts=4", "--model.moe.top-k=2", "--model.moe.mlp=16", "--model.moe.bias"]
MOE += ["--mesh=dp=2,ep=2", "--zero=1"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--mesh=dp=2,tp=2,pp=2", "--model.layers=4"],
        ["--mesh=cp=2,tp=2", "--recompute=full"],
        [*MOE, "--moe-dispatch=allgather"],
    ],
)
def test_bfloat16_passes_within_its_rounding(capsys, argv):
    code, out = run(capsys, *argv, "--dtype=bfloat16")
    assert code == 0 and "within the rounding of bfloat16" in out


def test_a_reduction_forgotten_in_bfloat16_is_no_rounding(capsys, monkeypatch):
    spoil(monkeypatch, lambda step, *args: step(*args, mutate=unsummed))
    code, out = run(capsys, "--dtype=bfloat16")
    assert code == 1 and "differs from one device, first in" in out


def test_unwritten_memory_that_is_read_is_found_in_bfloat16(capsys, monkeypatch):
    """Biases of experts that read the rows behind the last expert's end. float64 does not show
    it."""
    monkeypatch.setattr("dtron.moe.experts.product", last_experts)
    argv = [*MOE, "--moe-dispatch=allgather"]
    assert run(capsys, *argv)[0] == 0
    code, out = run(capsys, *argv, "--dtype=bfloat16")
    assert code == 1 and "is not finite; first at blocks.0.moe." in out


def test_a_value_that_is_not_finite_is_named_with_its_layer_and_line(capsys, monkeypatch):
    draw, large = verify_step.draw, ("blocks.1.mlp.w_up", "blocks.1.mlp.w_gate")
    monkeypatch.setattr(
        verify_step, "draw", lambda w, *rest: draw(w, *rest) * (1e30 if w.path in large else 1)
    )
    code, out = run(capsys, "--dtype=bfloat16", "--model.layers=3")
    assert code == 1 and "the step of one device is not finite" in out
    assert re.search(r"first at blocks\.1\.mlp\.w_\w+, in mlp\.py:\d+: ", out), out


@pytest.mark.parametrize("path", ["blocks.0.mlp.w_up", "w_head"])
def test_a_weight_that_is_not_finite_is_named(capsys, monkeypatch, path):
    draw = verify_step.draw
    monkeypatch.setattr(
        verify_step,
        "draw",
        lambda w, *rest: draw(w, *rest) * (float("inf") if w.path == path else 1),
    )
    code, out = run(capsys)
    assert code == 1 and f"the weight {path} itself is not finite" in out


def test_a_mesh_or_a_model_that_cannot_be_is_refused(capsys):
    for argv in (["--mesh=dp=2,tp=4"], ["--mesh=xp=2"], ["--batch=3"], ["--stpes=3"]):
        assert run_cli(verify.main, [*TINY, *argv]) == 2
        out, err = capsys.readouterr()
        assert re.fullmatch(r"error: [^\n]+\n", err) and not out


def test_a_folder_of_a_second_model_is_refused(capsys):
    """The second model of a proof has random weights."""
    assert run_cli(verify.main, ["--loss.name=dpo", "--loss.reference=folder"]) == 2
    assert "--loss.reference folder" in capsys.readouterr().err


def test_the_compiled_step_of_processes_is_that_of_one_device():
    """The comparison can fail: with another learning rate the weights differ."""
    small = replace(verify.VerifyConfig(), mesh="dp=2", zero=3, model=MODEL).run()
    small = replace(small, model=replace(small.model, layers=1))
    want = verify.one_step(verify.on_one_device(small), MeshShape())
    got = step_of_processes(small, MeshShape(dp=2), want, torch.float64, backend="aot_eager")
    loss, rows = verify.compare(want, got)
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)
    other = replace(small, optim=replace(small.optim, lr=2e-3))
    rows = verify.compare(verify.one_step(verify.on_one_device(other), MeshShape()), got)[1]
    assert not all(row.same for row in rows)
