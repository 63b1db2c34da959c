"""``--deterministic``: the same run twice has the same bits, on the same number and kind of devices
with the same versions.

On a CPU, a run has the same bits anyway. On a GPU some kernels add in the order in which their
threads arrive. torch has other kernels in their place, or raises an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dtron.errors import UserError

# Variables of the environment, with the values that give the same bits; the first is the usual one.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # cuBLAS on several streams
    "TORCHINDUCTOR_DETERMINISTIC": ("1",),  # kernels are not chosen by their time
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree"),  # switches add in the order of arrival
}


def set_variables(environment: Any = os.environ) -> None:
    """Set the variables that the libraries read when they are loaded. Raises UserError if one has a
    value with which the bits may differ."""
    for name, values in VARIABLES.items():
        if environment.setdefault(name, values[0]) not in values:
            raise UserError(
                f"--deterministic: {name}={environment[name]!r} may give other bits each time; "
                f"unset it, or use {' or '.join(values)}"
            )


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch use deterministic kernels only, inside the body. Raises UserError for an operation
    that has none. ``on``: whether to do so."""
    if not on:
        yield
        return
    set_variables()
    settings: Any = torch.utils.deterministic  # its attribute is made at run time
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # every kernel here writes what it allocates
    try:
        yield
    except RuntimeError as error:
        if (found := re.search(r"(\S+) does not have a deterministic", str(error))) is None:
            raise
        raise UserError(
            f"--deterministic: the kernel {found[1]} has no deterministic form; drop "
            "--deterministic, or the option that needs this kernel"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
