"""Trees of params: a tree is a frozen dataclass, a tuple, a leaf or None.

The functions here walk trees of any leaves: weights, gradients, optimizer state, or the declarations
of weights (params.py). All walk in declaration order. torch.compile traces them, so the names of a
class's fields are read once and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from torch import Tensor

from dtron.torch_compile import static


class Leaf:
    """The base of dataclasses that are leaves of a tree, not nodes."""


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf, in declaration order. A path looks like
    ``blocks.3.mlp.w_up``."""
    if _is_node(tree):
        cls: Any = type(tree)
        chosen = _chosen(cls)
        for name, child in _children(tree):
            if name in chosen:
                name = type(child).segment
            yield from leaves(child, f"{path}.{name}" if path else name)
    elif tree is not None:
        yield path, tree


def flat(tree: Any) -> list[Any]:
    """Return the leaves, in the order of ``leaves``."""
    found: list[Any] = []
    _flat(tree, found)
    return found


def _flat(tree: Any, found: list[Any]) -> None:
    if _is_node(tree):
        for _, child in _children(tree):
            _flat(child, found)
    elif tree is not None:
        found.append(tree)


def _is_node(tree: Any) -> bool:
    # Tensors come first: is_dataclass of a tensor cannot be traced by torch.compile 2.11.
    if tree is None or isinstance(tree, (Tensor, Leaf)):
        return False
    return isinstance(tree, (tuple, list)) or is_dataclass(tree)


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, (tuple, list)):
        return [(str(i), child) for i, child in enumerate(tree)]
    return [(name, getattr(tree, name)) for name in _names(type(tree))[0]]


@cache
def _chosen(cls: type) -> frozenset[str]:
    """Return the names of the fields of a params class whose class is chosen by dims."""
    if not is_dataclass(cls):
        return frozenset()
    return frozenset(f.name for f in fields(cls) if f.metadata.get("choose"))


@static
def _names(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the fields of a params class: those with leaves, and the plain values."""
    return _cached_names(cls)


@cache
def _cached_names(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    plain = tuple(f.name for f in fields(cls) if "value" in f.metadata)
    return tuple(f.name for f in fields(cls) if f.name not in plain), plain


def with_specs(spec: Any, tree: Any) -> list[tuple[Any, Any]]:
    """Return every leaf of a tree with its declaration. The tree may lack leaves of ``spec``
    (None)."""
    found: list[tuple[Any, Any]] = []
    _with_specs(spec, tree, found)
    return found


def _with_specs(spec: Any, tree: Any, found: list[tuple[Any, Any]]) -> None:
    if tree is None:
        return
    if not _is_node(spec):
        found.append((spec, tree))
        return
    for (_, w), (_, child) in zip(_children(spec), _children(tree), strict=True):
        _with_specs(w, child, found)


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
    names, plain = _names(type(like))
    children = {name: _build(getattr(like, name), rest) for name in names}
    return type(like)(**children, **{name: getattr(like, name) for name in plain})


def tree_map(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``fn`` leaf by leaf to trees of one shape."""
    return unflatten(
        tree, [fn(*xs) for xs in zip(flat(tree), *(flat(o) for o in others), strict=True)]
    )


@dataclass(frozen=True)
class Declared:
    """The declaration of a leaf, read from its class; see ``params.WeightSpec``."""

    axes: tuple[str, ...]
    frozen: bool
    summed: int


def declared(tree: Any) -> list[Declared]:
    """Return the declaration of every leaf of a tree of params dataclasses, in the order of
    ``flat``. It is read from the classes alone. So weights, gradients and local shards all have
    logical axes."""
    found: list[Declared] = []
    _declared(tree, (), found)
    return found


def _declared(tree: Any, rename: tuple[tuple[str, str], ...], found: list[Declared]) -> None:
    if tree is None:
        return
    if isinstance(tree, (tuple, list)):
        for child in tree:
            _declared(child, rename, found)
        return
    for name, leaf, changes in _declarations(type(tree), rename):
        child = getattr(tree, name)
        if leaf is None:
            _declared(child, changes, found)
        elif child is not None:
            found.append(Declared(*leaf))


@static
def _declarations(
    cls: type, rename: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, tuple | None, tuple[tuple[str, str], ...]], ...]:
    """Return, for every field of a params class, its name, the arguments of ``Declared``, and the
    renamed axes of its class. A sub-layer has no arguments of ``Declared`` (None)."""
    return _cached_declarations(cls, rename)


@cache
def _cached_declarations(
    cls: Any, rename: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, tuple | None, tuple[tuple[str, str], ...]], ...]:
    found: list[tuple[str, tuple | None, tuple[tuple[str, str], ...]]] = []
    for f in fields(cls):
        if "axes" in f.metadata:
            axes = tuple(dict(rename).get(a, a) for a in f.metadata["axes"])
            found.append((f.name, (axes, f.metadata["frozen"], f.metadata["summed"]), ()))
        elif "value" not in f.metadata:
            found.append((f.name, None, tuple(f.metadata["rename"].items())))
    return tuple(found)
