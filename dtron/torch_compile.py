"""The compiler as model code sees it: the units that are compiled by themselves
(training/compiled_units.py), and whether a tracer runs the code. ``jit`` is ``torch.compile`` for
single functions of tensors, outside of units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch._guards import TracingContext
from torch._guards import tracing as torch_tracing

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

# ``jit`` compiles one function for at most this number of kinds of arguments (shapes of weights,
# options of parameter groups, masks). By default torch gives up after 8, to detect functions that
# recompile forever.
KINDS = 256


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
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


@contextmanager
def tracer(mode: Any) -> Iterator[None]:
    """Code that runs inside is traced (``tracing``).

    ``mode``: the mode of the fake tensors that it runs on."""
    with torch_tracing(TracingContext(mode)):
        yield
