"""torch.compile with settings that torch has only in its global configs, and three decorators:
``opaque`` for functions that the compiler must not trace early, ``static`` and ``static_cache`` for
functions that the compiler need not trace at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any, Protocol, TypeVar, cast

import torch

Result = tuple[torch.Tensor, ...]


class Units(Protocol):
    """Calls the units of a stage: functions that are compiled by themselves, such as its blocks
    (training/compiled_units.py)."""

    def __call__(self, fn: Callable[..., Result], *args: Any) -> Result:
        """Return ``fn(*args)``."""

    def gathered(self, order: Sequence[tuple[Any, Any]], to_loss: bool = False) -> Iterator[Any]:
        """Yield the weights of units, in the order of the units' calls. The weights may have been
        all-gathered, if a unit would all-gather them.

        ``order``: for each unit, its tree of weights, and the rule that selects weights to
            all-gather in 8 bits (None: no weight).
        ``to_loss``: the last unit computes the loss, so backward follows at once."""


class Direct:
    """Calls units without a compiler."""

    def __call__(self, fn: Callable[..., Result], *args: Any) -> Result:
        return fn(*args)

    def gathered(self, order: Sequence[tuple[Any, Any]], to_loss: bool = False) -> Iterator[Any]:
        return iter([tree for tree, _ in order])


DIRECT = Direct()

_F = TypeVar("_F", bound=type[torch.autograd.Function])
_G = TypeVar("_G", bound=Callable)


def opaque(function: _F) -> _F:
    """Make an ``autograd.Function`` opaque to the compiler until it traces real gradients (in
    AOTAutograd). Without this decorator, the compiler traces forward and backward early, each into
    a graph of its own. This causes three errors. The last two are silent.

    * Backward sees an assumed gradient. A backward that depends on the gradient's placements then
      loses pending sums (Partial).
    * In torch 2.11 the tensors in such a graph are saved for backward, even if their block is to be
      recomputed.
    * In torch 2.11 a function that ends in a cast to the same dtype has zero gradients
      (pytorch#180642).

    Arguments must be tensors, numbers, strings, dtypes, None, or tuples of these types. So the loss
    is not opaque: it takes a layout. The loss need not be opaque: its gradient is not Partial, it
    ends in no cast, and it is not recomputed."""
    return torch.compiler.allow_in_graph(function)


def static(function: _G) -> _G:
    """Let the compiler call a function while it traces, and use the result as a constant. Arguments
    must be constants too: numbers, strings, placements, classes, or tuples and dicts of these
    types. The result may have no placements and no other objects: torch 2.11 cannot guard them.

    The bookkeeping of a model (which placements has a weight with these axes?) is pure Python on
    such arguments. Without this decorator the compiler interprets each bytecode of the bookkeeping,
    which takes longer than everything that depends on tensors."""
    return torch.compiler.assume_constant_result(function)


def static_cache(function: _G) -> _G:
    """Cache a ``static`` function. Arguments must be hashable. The cache is inside the function
    that the compiler calls, because the compiler traces through ``functools.cache``."""
    cached = cache(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args)

    return static(cast(_G, call))


# The number of kinds of arguments (shapes of weights, masks) for which ``jit`` compiles one function.
# By default torch gives up after 8, to detect functions that recompile forever.
KINDS = 64


def jit(fn: Callable, backend: Any = "inductor") -> Callable:
    """Compile a function by ``torch.compile``, whole (``fullgraph``), once for each kind of
    arguments."""
    inner = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)

    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=KINDS):
            return inner(*args)

    return run


def tracing() -> bool:
    """Whether a compiler traces the code that calls this function."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None
