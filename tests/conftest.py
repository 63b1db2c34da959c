from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from dtron.launch import keep_memory

keep_memory()

# Simulated examples take seconds, and the first on a mesh longer: hypothesis' own deadlines mean nothing
# here.
settings.register_profile(
    "dtron", deadline=None, suppress_health_check=list(HealthCheck), derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("dtron")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    from pool import Pool

    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()
