from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, settings

from dtron.runtime.launch import keep_memory

keep_memory()

# Simulated examples take seconds, and the first on a mesh longer: hypothesis' own deadlines mean
# nothing here. ``--hypothesis-profile thorough`` draws ten times as many.
settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=bool(os.environ.get("CI")),
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile("default")


def examples(n: int) -> int:
    """How many examples to draw: ``n`` of the hundred that hypothesis draws by default, in any
    profile."""
    return max(1, n * settings().max_examples // 100)


# One of each set of axes; 3 divides hardly anything.
KINDS = [
    "dp_replicate=2", "dp=3", "tp=4", "dp_replicate=2,dp=3", "dp_replicate=2,tp=3", "dp=2,tp=2",
    "dp_replicate=2,dp=2,tp=2",
]  # fmt: skip


def seen(**lists: Sequence[Any]) -> Callable[[Callable], Callable]:
    """Examples beside those that ``@given`` draws, for what chance might leave out: as many as the
    longest list, of which the others' values take turns."""

    def add(test: Callable) -> Callable:
        for i in range(max(map(len, lists.values()))):
            test = example(**{name: xs[i % len(xs)] for name, xs in lists.items()})(test)
        return test

    return add


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    from pool import Pool

    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A pool of two ranks. Each rank that compiles traces for seconds, so where one axis is enough
    for what a test asks, two ranks are."""
    from pool import Pool

    pool = Pool(tmp_path_factory.mktemp("pair"), 2)
    yield pool
    pool.close()
