"""Poisoned memory: unwritten memory is full of NaN, so that a read of it shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill newly allocated memory with NaN (integers: the largest value) until a kernel writes it.
    So a read of an unwritten row shows as NaN. Without this, new memory often holds zeros and hides
    such a read."""
    settings: Any = torch.utils.deterministic  # its attribute is made at run time
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
