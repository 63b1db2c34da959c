"""A short search for the placements of DTensor operations.

DTensor plans each new operation once for each shape and mesh. It lists every combination of the
operation's strategies over the dims of the mesh, and it estimates what each combination costs. With
S strategies and N dims there are S ** N. On three dims this search took nine tenths of the first
simulated step.

dtron writes every redistribution by hand, so the inputs of an operation nearly always have the
placements of a combination already. DTensor then takes this combination, because nothing moves. The
short search lists only the strategies that some dim of the inputs matches. If no combination
matches the inputs, the full search runs.

Left out: real ranks. They plan each operation once in a run of hours, and a compiled stage plans
while it is traced. So torch is changed only while ranks are simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

from torch.distributed.tensor._op_schema import OpStrategy
from torch.distributed.tensor._ops import _math_ops, _matrix_ops, _tensor_ops, utils

_NAME = "expand_to_full_mesh_op_strategy"


@contextmanager
def short_search() -> Iterator[None]:
    """DTensor takes the short search inside the context. Its choices are those of the full
    search."""
    with ExitStack() as stack:
        for module in (utils, _math_ops, _matrix_ops, _tensor_ops):
            full = getattr(module, _NAME)
            stack.enter_context(mock.patch.object(module, _NAME, partial(_search, full)))
        yield


def _search(full: Callable, mesh: Any, schema: Any, strategies: Any, **named: Any) -> OpStrategy:
    placements = _input_placements(schema)
    few = placements and _that_match(strategies, placements, named.get("input_index", 1))
    if few:
        # An update in place that no combination of the few allows raises a RuntimeError.
        with suppress(RuntimeError), mock.patch.object(utils, "redistribute_cost", _moves):
            found = full(mesh, schema, few, **named).strategies
            match = [s for s in found if [x.placements for x in s.input_specs] == placements]
            if match:
                return OpStrategy(match)
    return full(mesh, schema, strategies, **named)


def _moves(current: Any, target: Any) -> float:
    """Return the cost of a redistribution, where only 0 and more than 0 are told apart."""
    return float(current.placements != target.placements)


def _input_placements(schema: Any) -> list[Any] | None:
    """Return the placements of each input. None if DTensor chooses by another rule: for lists of
    tensors and for tensors that are passed by name."""
    inputs = schema.args_strategy
    if schema.kwargs_strategy or not all(
        isinstance(x, OpStrategy) and len(x.strategies) == 1 for x in inputs
    ):
        return None
    if any("List[Tensor]" in str(x.type) for x in schema.op._schema.arguments):
        return None
    return [x.strategies[0].output_spec.placements for x in inputs]


def _that_match(strategies: Sequence[Any], placements: list[Any], first: int) -> list[Any]:
    """Return the strategies whose inputs are those of some mesh dim, in their order. Empty if a
    dim has none.

    ``first``: the index of the first input in a strategy; outputs come before it."""
    dims = [list(dim) for dim in zip(*placements)]
    inputs = [[x for x in s[first:] if x is not None] for s in strategies]
    if any(dim not in inputs for dim in dims):
        return []
    return [s for s, x in zip(strategies, inputs) if x in dims]
