"""torch.compile, with the settings that torch has nowhere but in its global configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Kinds of arguments (stages, shapes of weights, masks) that a function may be compiled for. After 8 torch
# gives up, to notice functions that never settle.
KINDS = 64


def jit(fn: Callable, budget: float = 1.0, **options: Any) -> Callable:
    """The function, compiled whole, once for each kind of arguments. ``budget``: the share of what the
    partitioner would keep from forward for backward that it may keep; the rest is computed again, cheapest
    first. ``options`` are those of ``torch.compile``."""
    inner = torch.compile(fn, fullgraph=True, dynamic=False, **options)

    def run(*args):
        with (
            torch._dynamo.config.patch(recompile_limit=KINDS),
            torch._functorch.config.patch(activation_memory_budget=budget),
        ):
            return inner(*args)

    return run
