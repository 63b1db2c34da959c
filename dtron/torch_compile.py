"""torch.compile with settings that torch has only in its global configs, and three decorators:
``opaque`` for functions that the compiler must not trace early, ``static`` and ``static_cache`` for
functions that the compiler need not trace at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial, wraps
from types import FunctionType
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


# The number of kinds of arguments (stages, shapes of weights, masks) for which one function may be
# compiled. By default torch gives up after 8, to detect functions that recompile forever.
KINDS = 64

# The graph of a stage on several ranks contains process groups. The partitioner of torch 2.13 does
# not count the memory saved for backward unless this setting says that process groups take no
# memory. The partitioner of torch 2.11 does not need this setting.
_NO_SIZE = "unsafe_treat_script_objects_as_zero_size"


def jit(
    fn: Callable,
    budget: float = 1.0,
    key: Callable[[], str | None] | None = None,
    backend: Any = "inductor",
    options: dict[str, Any] | None = None,
    by_graph: Callable[[Callable, list[torch.Tensor]], Callable] | None = None,
) -> Callable:
    """Compile a function whole (``fullgraph``), once for each kind of arguments.

    ``budget``: the share of activations that the partitioner may save for backward; 1.0 is all that
    it would save by itself. The rest is recomputed, cheapest first.
    ``key``: called when the function is compiled. Returns a text that contains all that the graph
    depends on, besides what torch knows: see training/unit_key.py. None: nothing is known, and
    torch does not keep the graph.
    ``backend``, ``options``: see ``torch.compile``.
    ``by_graph``: called as ``by_graph(compile, inputs)`` with inductor's compiler of one graph, and
        the tensors that the function was called with. Returns a compiler to use in its place."""
    if backend != "inductor":
        key = by_graph = None
    if by_graph is not None:
        backend, options = partial(_inductor_by_graph, by_graph=by_graph, options=options), None
    elif key is not None:
        backend, options = partial(_inductor_with_key, key=key, options=options), None
    inner = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend, options=options)
    settings = [torch._dynamo.config.patch(recompile_limit=KINDS)]
    if budget < 1:
        kept = {"activation_memory_budget": budget}
        if hasattr(torch._functorch.config, _NO_SIZE):
            kept[_NO_SIZE] = True
        settings.append(torch._functorch.config.patch(kept))

    def run(*args: Any) -> Any:
        with ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting)
            return inner(*args)

    return run


def _inductor_with_key(
    graph: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    key: Callable[[], str | None],
    options: dict[str, Any] | None,
) -> Callable:
    """Compile a graph with inductor. If it has a key, torch keeps it, whatever its functions."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    text = key()
    compile = partial(cast(Callable, compile_fx), graph, inputs, config_patches=options)
    if text is None:
        return compile()
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    named = {f"{f.__module__}.{f.__name__}" for f in calls if isinstance(f, FunctionType | type)}
    marked = dict.fromkeys(["dtron", *sorted(named)], text)  # torch puts the texts in its own key
    with (
        config.patch(unsafe_marked_cacheable_functions=marked),
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True),
    ):
        return compile()


def _inductor_by_graph(
    graph: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    by_graph: Callable[[Callable, list[torch.Tensor]], Callable],
    options: dict[str, Any] | None,
) -> Callable:
    """Compile a function with a compiler of its forward and backward graphs. torch keeps the code
    of each graph, but not the pair, since it does not know this compiler."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    compile = by_graph(compile_fx_inner, inputs)
    # A donated buffer would be overwritten by a graph that is not its last reader.
    with torch._functorch.config.patch(enable_autograd_cache=False, donated_buffer=False):
        return cast(Callable, compile_fx)(
            graph, inputs, inner_compile=compile, config_patches=options
        )
