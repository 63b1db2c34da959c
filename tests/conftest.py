from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from dtron.runtime.launch import keep_memory
from tests.helpers.collect import collect_seldom

keep_memory()
collect_seldom()

# A simulated example takes seconds, and the first on a mesh takes longer. So there is no
# deadline, and no phase that explains a failure by hundreds of runs more. ``--hypothesis-profile
# thorough`` draws ten times as many examples.
settings.register_profile(
    "default",
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=list(HealthCheck),
    derandomize=bool(os.environ.get("CI")),
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    from tests.helpers.pool import Pool

    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A pool of two ranks. A rank that compiles traces for seconds. So tests that need one axis
    only use two ranks."""
    from tests.helpers.pool import Pool

    pool = Pool(tmp_path_factory.mktemp("pair"), 2)
    yield pool
    pool.close()


@pytest.fixture
def fresh_compiler():
    """The compiler forgets all compiled code. torch stops compiling a function that has been
    compiled for too many shapes."""
    torch.compiler.reset()
