"""Parameter groups: for some weights, the optimizer has other options.

    --optim.groups 'vocab: lr=0.5x; blocks.0.*: lr=0.1x, weight_decay=0; experts: beta2=0.99'

Each row names weights and changes their options. Weights are named by a logical axis, such as
``vocab`` (rules.py), or by a pattern of their paths, in which ``*`` stands for any text. If several
rows name a weight, they apply in order.

``lr`` is a factor of the learning rate of the step. Every other option is a field of the
optimizer's class, such as ``weight_decay`` or ``beta1`` of AdamW.

``ParameterGroups`` is an optimizer itself. It updates the weights of each group with an optimizer
of the group's options. So an optimizer knows of no groups. The state has the same trees as without
groups, and a run may go on with other groups.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.rules import RULES
from dtron.training.optimizer import Optimizer, OptimizerState, WrappedOptimizer, find
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, with_specs


class Row(NamedTuple):
    """A row of the table.

    ``name``: a logical axis, or a pattern of paths.
    ``rate``: the factor of the learning rate.
    ``options``: other values of the optimizer's options."""

    name: str
    rate: float
    options: tuple[tuple[str, Any], ...]

    def names(self, w: WeightSpec) -> bool:
        """Whether the row names a weight."""
        if self.name in RULES:
            return self.name in w.axes
        return fnmatchcase(w.path, self.name)


class Group(NamedTuple):
    """The optimizer of a group of weights, and the factor of their learning rate."""

    optimizer: Optimizer
    rate: float


@dataclass(frozen=True)
class ParameterGroups(WrappedOptimizer):
    """An optimizer with other options for some weights.

    ``mup``: whether the width of a weight sets its learning rate (``Optimizer.width_rate``)."""

    rows: tuple[Row, ...]
    mup: bool = False

    def group(self, w: WeightSpec) -> Group:
        """Return the group of a weight. Weights of one group have equal values."""
        rate, options = 1.0, dict[str, Any]()
        for row in self.rows:
            if row.names(w):
                rate *= row.rate
                options |= dict(row.options)
        of_group: Any = replace(typing.cast(Any, self.base), **options)
        if self.mup:
            factor = self.base.width_rate(w)
            rate *= factor
            if hasattr(of_group, "weight_decay"):
                # An update decays a weight by the learning rate times the decay. muP changes
                # neither the decay nor the number of steps after which the initial values are gone.
                of_group = replace(of_group, weight_decay=of_group.weight_decay / factor)
        return Group(of_group, rate)

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        groups: dict[Group, list[int]] = {}
        for i, w in enumerate(flat(spec)):
            groups.setdefault(self.group(w), []).append(i)
        for (optimizer, rate), members in groups.items():
            trees = part_of_trees(members, spec, params, grads, state)
            optimizer.update(*trees, replace(scalars, lr=scalars.lr * rate), layout)
        return params, state


def part_of_trees(
    members: Sequence[int], spec: Any, params: Any, grads: Any, state: OptimizerState
) -> tuple[Any, Any, Any, OptimizerState]:
    """Return the trees of some weights, as tuples.

    ``members``: the indices of the weights in ``spec``."""
    declared = flat(spec)

    def part(tree: Any) -> Any:
        if tree is None:
            return None
        found = {id(w): x for w, x in with_specs(spec, tree)}
        return tuple(found.get(id(declared[i])) for i in members)

    trees = {name: part(tree) for name, tree in state.trees.items()}
    copies = part(state.compute_copies)
    of_part = OptimizerState(state.step, trees, copies)
    return tuple(declared[i] for i in members), part(params), part(grads), of_part


def parse_groups(text: str, optimizer: Optimizer, parse: Callable[..., Any]) -> tuple[Row, ...]:
    """Parse the value of ``--optim.groups``. Raises UserError for a row that cannot be understood.

    ``parse(name, text, allowed, where)``: returns the value of an option of the optimizer's
        class."""
    allowed = [f.name for f in fields(typing.cast(Any, optimizer)) if f.compare]
    rows = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        where = f"optim.groups={part!r}"
        name, colon, changes = (word.strip() for word in part.partition(":"))
        if not colon or not name or not changes:
            raise UserError(
                f"{where}: a row is WEIGHTS: OPTION=VALUE, as vocab: lr=0.5x; change it"
            )
        rate, options = 1.0, {}
        for change in changes.split(","):
            option, _, value = (word.strip() for word in change.partition("="))
            if option == "lr":
                rate = _factor(value, where)
            else:
                options[option] = parse(option, value, allowed, where)
        rows.append(Row(name, rate, tuple(options.items())))
        replace(typing.cast(Any, optimizer), **options)  # checks the values
    return tuple(rows)


def _factor(text: str, where: str) -> float:
    try:
        factor = float(text.removesuffix("x")) if text.endswith("x") else -1.0
    except ValueError:
        factor = -1.0
    if not 0 <= factor < float("inf"):
        raise UserError(
            f"{where}: lr must be a factor of the learning rate, as 0.5x, not {text!r}; change it"
        )
    return factor


def check_groups(optimizer: Optimizer, spec: Any) -> None:
    """Raise UserError for a row that names no weight of the declared tree, and for an optimizer
    without learning rates for muP."""
    groups = find(optimizer, ParameterGroups)
    if groups is None:
        return
    for w in flat(spec):
        groups.group(w)
    for row in groups.rows:
        if not any(row.names(w) for w in flat(spec)):
            known = {axis for w in flat(spec) for axis in w.axes}
            known |= {f"*.{w.path.rpartition('.')[2]}" for w in flat(spec)}
            near = difflib.get_close_matches(row.name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"optim.groups: {row.name!r} is no logical axis of the model's weights and no "
                f"pattern of their paths; did you mean {near}?"
            )


def describe_groups(optimizer: Optimizer, spec: Any) -> list[str]:
    """Return a line for each group: the options that differ, the number of weights and of
    parameters, and the first path. Without groups there is no line."""
    table = find(optimizer, ParameterGroups)
    if table is None:
        return []
    groups: dict[Group, list[WeightSpec]] = {}
    for w in flat(spec):
        if not w.buffer:
            groups.setdefault(table.group(w), []).append(w)
    usual, lines = typing.cast(Any, table.base), []
    for (other, rate), weights in groups.items():
        changed = [f.name for f in fields(usual) if f.compare]
        options = [
            f"{n}={getattr(other, n)}" for n in changed if getattr(other, n) != getattr(usual, n)
        ]
        text = (
            ", ".join([f"lr={rate:g}x", *options] if rate != 1 else options)
            or "the options as given"
        )
        size = sum(w.numel for w in weights)
        lines.append(
            f"{text}: {len(weights)} weights, {size:,} parameters, first {weights[0].path}"
        )
    return lines
