"""torch.compile, with the settings that torch has nowhere but in its global configs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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
    settings = [torch._dynamo.config.patch(recompile_limit=KINDS)]
    if budget < 1:
        settings.append(torch._functorch.config.patch(activation_memory_budget=budget))

    def run(*args):
        with ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting)
            return inner(*args)

    return run
