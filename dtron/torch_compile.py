"""The compiler as model code sees it: the units that are compiled by themselves
(training/compiled_units.py), and whether a tracer runs the code. ``jit`` is ``torch.compile`` for
single functions of tensors, outside of units."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch._guards import TracingContext, detect_fake_mode
from torch._guards import tracing as torch_tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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


class CodeGenerator(Protocol):
    """Takes the place of inductor's code generator, behind the same tracer, decompositions and
    partitioner. A plan has one that counts instead of generating code (planner/)."""

    def graph(
        self, graph: Any, inputs: Sequence[Any], weights: Sequence[int] = (), **options: Any
    ) -> Callable:
        """Return the function that runs a graph of operators. It takes a list of tensors, which it
        empties.

        ``weights``: the indices of the inputs of the whole function that are weights.
        ``options``: the keyword arguments that inductor's ``compile_fx_inner`` gets."""

    def function(self, fn: Callable) -> Callable:
        """Return a function that runs as one kernel; see ``jit``."""


def own_generator(backend: Any) -> CodeGenerator | None:
    """Return the backend of ``build_step`` if it is a CodeGenerator."""
    return None if isinstance(backend, str) or not hasattr(backend, "graph") else backend


# ``jit`` compiles one function for at most this number of kinds of arguments (shapes of weights,
# options of parameter groups, masks). By default torch gives up after 8, to detect functions that
# recompile forever.
KINDS = 256


def jit(fn: Callable, backend: Any = "inductor") -> Callable:
    """Compile a function by ``torch.compile``, whole (``fullgraph``), once for each kind of
    arguments."""
    if (generator := own_generator(backend)) is not None:
        return generator.function(fn)
    inner = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)

    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=KINDS):
            return inner(*args)

    return run


def flex_in_trace() -> AbstractContextManager[None]:
    """Return a context for calls of flex_attention, which compiles a part of itself while a unit is
    traced. Without the context, the second shape of its arguments becomes symbolic, on which
    inductor fails, and after 8 shapes torch gives up. torch also warns that it is not compiled."""
    traced = tracing() and not torch.compiler.is_dynamo_compiling()
    return _static_shapes() if traced else nullcontext()


@contextmanager
def _static_shapes() -> Iterator[None]:
    settings = torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=KINDS)
    with settings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def kernel_device(device: torch.device) -> str:
    """Return the type of device whose kernels the code that calls this function is to use. A plan
    (planner/) runs a GPU's step on a machine without a GPU: its fake tensors are on the CPU."""
    mode = planned()
    return device.type if mode is None else mode.kernels


def fake_mode(tensors: Sequence[Any] = (), **options: Any) -> Any:
    """Return a mode that makes tensors without memory: the mode of these tensors if they are fake,
    or the one in which this code runs."""
    found = None if options else detect_fake_mode(tensors)
    return found or FakeTensorMode(shape_env=ShapeEnv(), **options)


def is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def planned() -> Any:
    """Return the mode of the fake tensors of a plan; None outside of a plan."""
    if torch.compiler.is_dynamo_compiling():  # ``jit``, which a plan does not use
        return None
    mode = detect_fake_mode()
    return mode if hasattr(mode, "kernels") else None


def tracing() -> bool:
    """Whether a compiler traces the code that calls this function."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


@contextmanager
def tracer(mode: Any) -> Iterator[None]:
    """Code that runs inside is traced (``tracing``).

    ``mode``: the mode of the fake tensors that it runs on."""
    with getattr(mode, "pause", nullcontext)(), torch_tracing(TracingContext(mode)):
        yield
