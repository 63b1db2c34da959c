"""The launch of a recorded step, without a GPU."""

from __future__ import annotations

import threading

import pytest

from dtron.training.cuda_graph import finishes


def test_a_launch_that_returns_not_in_time_is_noticed():
    released = threading.Event()
    assert not finishes(released.wait, 0.01)
    released.set()
    assert finishes(released.wait, 60.0)


def test_an_error_of_a_launch_is_raised():
    def fails() -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        finishes(fails, 60.0)
