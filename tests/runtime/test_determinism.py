"""``--deterministic``: the same run twice has the same bits."""

from __future__ import annotations

import os

import pytest
import torch

from dtron.errors import UserError
from dtron.runtime.determinism import VARIABLES, deterministic, set_variables
from tests.helpers.checkpoints import weights
from tests.helpers.train_cli import SIX, losses, refused, run

pytestmark = pytest.mark.xdist_group("program")


@pytest.fixture
def environment(monkeypatch):
    """No variable is set before the test, and none stays after it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_same_run_twice_has_the_same_bits(run_dir, environment):
    more = ["--simulate", "--mesh=dp=2,tp=2"]
    first, second = run_dir, run_dir.with_name("second")
    found = [losses(run(d, *SIX, "--steps=2", "--deterministic", *more)) for d in (first, second)]
    assert found[0] == found[1] and weights(first) == weights(second)
    assert not torch.are_deterministic_algorithms_enabled()  # it ends with the run
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_another_variable_of_the_environment_is_refused(run_dir, environment, monkeypatch, capsys):
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    err = refused(capsys, f"--run-dir={run_dir}", "--deterministic")
    assert "NCCL_ALGO='NVLS'" in err and "^NVLS" in err and not run_dir.exists()
    own = {"NCCL_ALGO": "Ring"}
    set_variables(own)
    assert own == {name: values[0] for name, values in VARIABLES.items()} | {"NCCL_ALGO": "Ring"}


def test_a_kernel_without_a_deterministic_form_is_one_line(environment):
    message = "max_unpool_cuda does not have a deterministic implementation, but you set ..."
    said = "kernel max_unpool_cuda has no .*drop --deterministic"
    with pytest.raises(UserError, match=said), deterministic(True):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="other"), deterministic(True):
        raise RuntimeError("other")
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
