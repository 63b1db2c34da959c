"""A folder with a text, and runs that several tests compare with."""

from pathlib import Path

import pytest

from tests.helpers.texts import corpus
from tests.helpers.train_cli import MANY, enter, losses, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("program")).parent


@pytest.fixture
def run_dir(folder, tmp_path, monkeypatch) -> Path:
    enter(folder, monkeypatch)
    return tmp_path / "run"


@pytest.fixture(scope="session")
def one_device(folder) -> list[float]:
    """The losses of four steps on one device. Every other run of these steps must have them."""
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        want = losses(run(folder / "run"))
    assert want[-1] < want[0] - 0.05
    return want


@pytest.fixture(scope="session")
def many(folder) -> list[dict]:
    """A run on simulated ranks. Some tests look at it, and some run after it."""
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        return run(folder / "many", *MANY)
