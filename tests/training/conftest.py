"""Fixtures of the training tests."""

from __future__ import annotations

import pytest

from tests.training.toy_optimizers import registered


@pytest.fixture
def toy_optimizers():
    """The optimizers of toy_optimizers.py have names."""
    with registered():
        yield
