"""Trees of params: a tree is a frozen dataclass, a tuple, a leaf or None.

The functions here walk trees of any leaves: weights, gradients, optimizer state, or the
declarations of weights (params.py). All functions walk in declaration order. torch.compile traces
these functions, so the names of a class's fields are read once and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

Kind = TypeVar("Kind")


class Leaf:
    """The base of dataclasses that are leaves of a tree, not nodes."""


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf, in declaration order. A path looks like
    ``blocks.3.mlp.w_up``."""
    if _is_node(tree):
        cls: Any = type(tree)
        chosen = _chosen(cls)
        for name, child in _children(tree):
            if name in chosen and child is not None:
                name = type(child).segment
            inner = f"{path}.{name}" if path else name
            yield from leaves(child, path if name == "base" and issubclass(cls, Adapted) else inner)
    elif tree is not None:
        yield path, tree


def flat(tree: Any) -> list[Any]:
    """Return the leaves, in the order of ``leaves``."""
    collected: list[Any] = []
    _collect(tree, collected)
    return collected


def nodes(tree: Any, kind: type[Kind]) -> list[Kind]:
    """Return the nodes of a class, in the order of ``leaves``."""
    if isinstance(tree, kind):
        return [tree]
    children = _children(tree) if _is_node(tree) else []
    return [node for _, child in children for node in nodes(child, kind)]


def units(tree: Any) -> list[Any]:
    """Return the leaves, and each ``Adapted`` weight as one."""
    if isinstance(tree, Adapted) or not _is_node(tree):
        return [] if tree is None else [tree]
    return [unit for _, child in _children(tree) for unit in units(child)]


def _collect(tree: Any, collected: list[Any]) -> None:
    if _is_node(tree):
        for _, child in _children(tree):
            _collect(child, collected)
    elif tree is not None:
        collected.append(tree)


def _is_node(tree: Any) -> bool:
    # Tensors come first: is_dataclass of a tensor cannot be traced by torch.compile 2.11.
    if tree is None or isinstance(tree, (Tensor, Leaf)):
        return False
    return isinstance(tree, (tuple, list)) or is_dataclass(tree)


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, (tuple, list)):
        return [(str(i), child) for i, child in enumerate(tree)]
    return [(name, getattr(tree, name)) for name in _names(tree.__class__)[0]]


@cache
def _chosen(cls: type) -> frozenset[str]:
    """Return the names of the fields of a params class whose class is chosen by dims."""
    if not is_dataclass(cls):
        return frozenset()
    return frozenset(f.name for f in fields(cls) if f.metadata.get("choose"))


@cache
def _names(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the fields of a params class: the fields with leaves, and the plain
    values."""
    plain = tuple(f.name for f in fields(cls) if "value" in f.metadata)
    return tuple(f.name for f in fields(cls) if f.name not in plain), plain


def with_specs(spec: Any, tree: Any) -> list[tuple[Any, Any]]:
    """Return every leaf of a tree with its declaration. The tree may lack leaves of ``spec``
    (None)."""
    pairs: list[tuple[Any, Any]] = []
    _collect_pairs(spec, tree, pairs)
    return pairs


def _collect_pairs(spec: Any, tree: Any, pairs: list[tuple[Any, Any]]) -> None:
    if tree is None:
        return
    if not _is_node(spec):
        pairs.append((spec, tree))
        return
    for (_, w), (_, child) in zip(_children(spec), _children(tree), strict=True):
        _collect_pairs(w, child, pairs)


def unflatten(like: Any, values: list[Any]) -> Any:
    """Build a tree of the shape of ``like`` from these leaves, in the order of ``leaves``."""
    return _build(like, iter(values))


def _build(like: Any, rest: Iterator[Any]) -> Any:
    # Not a closure in unflatten: a closure that calls itself is a reference cycle. It would keep
    # every tensor of the tree alive until the garbage collector runs.
    if like is None:
        return None
    if not _is_node(like):
        return next(rest)
    if isinstance(like, (tuple, list)):
        return tuple([_build(child, rest) for child in like])
    names, plain = _names(like.__class__)
    children = {name: _build(getattr(like, name), rest) for name in names}
    return type(like)(**children, **{name: getattr(like, name) for name in plain})


def map_units(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``fn`` to each leaf, and to each ``Adapted`` weight as one."""
    if tree is None:
        return None
    whole = isinstance(tree, Adapted) or not _is_node(tree)
    return fn(tree) if whole else _map_children(fn, tree)


def _map_children(fn: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple([map_units(fn, child) for child in tree])
    names, plain = _names(tree.__class__)
    children = {name: map_units(fn, getattr(tree, name)) for name in names}
    return type(tree)(**children, **{name: getattr(tree, name) for name in plain})


def fill(spec: Any, load: Callable[[Any], Any]) -> Any:
    """Make a tree of weights from a declared tree: ``load`` returns the weight of a declaration.
    An ``Adapted`` node decides by itself how it is made of loaded weights."""
    return map_units(lambda w: w.filled(load) if isinstance(w, Adapted) else load(w), spec)


def tree_map(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``fn`` leaf by leaf to trees of one shape."""
    return unflatten(
        tree, [fn(*xs) for xs in zip(flat(tree), *(flat(o) for o in others), strict=True)]
    )


@dataclass(frozen=True)
class Declared:
    """The declaration of a leaf, read from its class. See ``params.WeightSpec``."""

    axes: tuple[Any, ...]
    buffer: bool
    summed: int


class Adapted:
    """The base of nodes that stand where a params class declares one weight: the weight itself, as
    ``base``, which keeps its path, and more leaves beside it (layers/lora.py). The axes of the
    leaves follow from the axes of the weight."""

    def split_axes(self, axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the axes of each field with a leaf, given the axes declared for the weight. A
        field may be such a node itself."""
        raise NotImplementedError

    def declared(self, whole: Declared) -> list[Declared]:
        """Return the declaration of each leaf, given that of the weight."""
        found: list[Declared] = []
        for i, ((_, child), axes) in enumerate(
            zip(_children(self), self.split_axes(whole.axes), strict=True)
        ):
            own = Declared(axes, whole.buffer, 0 if i else whole.summed)
            if isinstance(child, Adapted):
                found += child.declared(own)
            elif child is not None:
                found.append(own)
        return found

    def filled(self, load: Callable[[Any], Any]) -> Any:
        """Return a node of weights, given a node of declarations; see ``fill``."""
        return _map_children(lambda w: fill(w, load), self)


def leaf_axes(node: Adapted, axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return the axes of each leaf of a node, given the axes of the weight."""
    return [d.axes for d in node.declared(Declared(axes, False, 0))]


def declared(tree: Any) -> list[Declared]:
    """Return the declaration of every leaf of a tree of params dataclasses, in the order of
    ``flat``. Only the classes are read. So weights, gradients and local shards all have logical
    axes."""
    declarations: list[Declared] = []
    _collect_declared(tree, (), declarations)
    return declarations


def _collect_declared(
    tree: Any, rename: tuple[tuple[str, str], ...], declarations: list[Declared]
) -> None:
    if tree is None:
        return
    if isinstance(tree, (tuple, list)):
        for child in tree:
            _collect_declared(child, rename, declarations)
        return
    for name, leaf, changes in _declarations(tree.__class__, rename):
        child = getattr(tree, name)
        if leaf is None:
            _collect_declared(child, changes, declarations)
        elif isinstance(child, Adapted):
            declarations += child.declared(Declared(*leaf))
        elif child is not None:
            declarations.append(Declared(*leaf))


@cache
def _declarations(
    cls: type, rename: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, tuple | None, tuple[tuple[str, str], ...]], ...]:
    """Return, for every field of a params class, its name, the arguments of ``Declared``, and the
    renamed axes of its class. A sub-layer has no arguments of ``Declared`` (None)."""
    rows: list[tuple[str, tuple | None, tuple[tuple[str, str], ...]]] = []
    for f in fields(cls):
        if "axes" in f.metadata:
            axes = tuple(dict(rename).get(a, a) for a in f.metadata["axes"])
            rows.append((f.name, (axes, f.metadata["buffer"], f.metadata["summed"]), ()))
        elif "value" not in f.metadata:
            rows.append((f.name, None, tuple(f.metadata["rename"].items())))
    return tuple(rows)
