"""torch.compile, with the settings that torch has nowhere but in its global configs, and what it is
to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=type[torch.autograd.Function])


def opaque(function: _F) -> _F:
    """Decorates a function with a backward of its own: the compiler leaves it alone until it traces
    real gradients. By itself it would trace both halves early, into graphs of their own. Then a
    backward sees a gradient that it imagines: one that decides by where gradients lie forgets
    pending sums. And in torch 2.11 what is in such a graph is kept for backward although its block
    is to be computed again, and of a function that ends in a cast which changes nothing all
    gradients are zero (pytorch#180642); both silently. Arguments must be tensors, numbers, strings,
    dtypes, None, or tuples of these: so the loss, which takes a layout, goes without; its gradient
    is no pending sum, it ends in no cast and is not computed again."""
    return torch.compiler.allow_in_graph(function)


# Kinds of arguments (stages, shapes of weights, masks) that a function may be compiled for. After 8
# torch gives up, to notice functions that never settle.
KINDS = 64

# The graph of a stage on several ranks has process groups in it. The partitioner of torch 2.13 will
# not count what is kept for backward until it is told that these take no memory; that of 2.11 does
# not ask.
_NO_SIZE = "unsafe_treat_script_objects_as_zero_size"


def jit(fn: Callable, budget: float = 1.0, **options: Any) -> Callable:
    """The function, compiled whole, once for each kind of arguments. ``budget``: the share of what
    the partitioner would keep from forward for backward that it may keep; the rest is computed
    again, cheapest first. ``options`` are those of ``torch.compile``."""
    inner = torch.compile(fn, fullgraph=True, dynamic=False, **options)
    settings = [torch._dynamo.config.patch(recompile_limit=KINDS)]
    if budget < 1:
        kept = {"activation_memory_budget": budget}
        if hasattr(torch._functorch.config, _NO_SIZE):
            kept[_NO_SIZE] = True
        settings.append(torch._functorch.config.patch(kept))

    def run(*args):
        with ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting)
            return inner(*args)

    return run
