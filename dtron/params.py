"""Parameter trees: trees of tensors, declared by each layer's dataclass.

    @dataclass(frozen=True)
    class MLP:
        w_up: Tensor = weight("embed", "mlp")
        w_down: Tensor = weight("mlp", "embed", init=residual_out)

``declare(MLP, dims)`` turns the class into a tree of the same shape whose leaves are ``WeightSpec``
records: path, logical axes, sizes, initialiser. Everything else is derived from this one tree:
drawing the weights, placing them, deciding on weight decay, printing them, checking a checkpoint.
``dims`` maps the names used in declarations (axes, ``when`` conditions, ``count``) to numbers. A
model's config makes ``dims``, and a test can make its own.

A plain number that belongs to one layer and not to all, such as its attention window, is stored in
the tree too, as ``value("window")``. It is not a leaf.

A tree is a frozen dataclass, a tuple, a tensor or None. There is no registry and no ``nn.Module``:
nothing here has state. A layer can be called on any tree of the right shape, also on gradients and
trees of optimizer state.
"""

from __future__ import annotations

import hashlib
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.bucketing import gather_some
from dtron.distributed.simulated_ranks import paused
from dtron.mesh import Layout
from dtron.torch_compile import static

Dims = Mapping[str, Any]
Init = Callable[["WeightSpec", Dims, torch.Generator], Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """The declaration of one weight.

    ``path``: its path in the tree.
    ``axes``, ``shape``: its logical axes and their sizes.
    ``init``: its initialiser.
    ``twin``: another pipeline stage has the same weight, and that stage counts it.
    ``frozen``: the optimizer does not update this tensor; it is only stored with the weights.
    ``summed``: the number of leading dims (after the expert dim) over which a matmul sums, if this
        matmul may run in FP8; 0: no such matmul.
    """

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Init
    twin: bool = False
    frozen: bool = False
    summed: int = 0

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, but not to norms and biases (their init is a
        constant)."""
        return self.init not in (ones, zeros)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def normal(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw from a normal distribution of standard deviation ``dims["init_std"]``; the default is
    0.02 (GPT-2)."""
    x = torch.empty(w.shape, device=generator.device)
    return x.normal_(0.0, dims.get("init_std", 0.02), generator=generator)


def residual_out(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw from ``normal`` and divide by sqrt(2 layers), so that the variance of the residual
    stream does not grow with depth (GPT-2, section 2.3)."""
    return normal(w, dims, generator) / math.sqrt(2 * dims.get("layers", 1))


def ones(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    return torch.ones(w.shape, device=generator.device)


def zeros(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    return torch.zeros(w.shape, device=generator.device)


def weight(
    *axes: str, summed: int = 0, init: Init = normal, when: str | None = None, frozen: bool = False
) -> Any:
    """Declare a weight with these logical axes.

    ``summed``: the number of its dims over which ``linear`` sums, if the weight is for ``linear``.
    ``when``: the weight is absent (None) if ``dims[when]`` is false.
    ``frozen``: the optimizer does not update the weight, and it is never cast. Other code may set
        it between steps.
    """
    return field(
        metadata={"axes": axes, "init": init, "when": when, "frozen": frozen, "summed": summed}
    )


def value(name: str) -> Any:
    """Declare that ``dims[name]``, a plain value, is stored with the weights."""
    return field(metadata={"value": name})


def part(
    *,
    count: str | None = None,
    each: str | None = None,
    when: str | None = None,
    choose: str | None = None,
    **rename: str,
) -> Any:
    """Declare a sub-layer of the annotated class.

    ``count``: the sub-layer is a tuple of ``dims[count]`` sub-layers.
    ``each``: the i-th of them is declared with the changes ``dims[each][i]`` to dims.
    ``when``: the sub-layer is absent (None) if ``dims[when]`` is false.
    ``choose``: ``dims[choose]`` is the sub-layer's class and its own changes to dims. Paths have the
        class's ``segment`` in place of the field's name.
    ``rename``: other names for its axes; a norm over heads is ``part(act_embed="head_dim")``.
    """
    kinds = {"count": count, "each": each, "when": when, "choose": choose, "rename": rename}
    return field(metadata=kinds)


def declare(cls: type, dims: Dims, path: str = "", rename: Mapping[str, str] | None = None) -> Any:
    """Make the tree of ``WeightSpec`` records of a params dataclass. Raises ValueError for a name
    that dims lacks."""
    rename = rename or {}
    hints = typing.get_type_hints(cls)
    tree = {}
    for f in fields(cls):
        here, meta = f"{path}.{f.name}" if path else f.name, f.metadata
        if "value" in meta:
            tree[f.name] = _look_up(dims, meta["value"], here)
        elif meta["when"] and not _look_up(dims, meta["when"], here):
            tree[f.name] = None
        elif "axes" in meta:
            axes = tuple(rename.get(a, a) for a in meta["axes"])
            shape = tuple(_look_up(dims, a.removeprefix("act_"), here) for a in axes)
            kind = {name: meta[name] for name in ("frozen", "summed")}
            tree[f.name] = WeightSpec(here, axes, shape, meta["init"], **kind)
        elif meta["choose"]:
            sub, changes = _look_up(dims, meta["choose"], here)
            here = f"{path}.{sub.segment}" if path else sub.segment
            tree[f.name] = declare(sub, {**dims, **changes}, here, meta["rename"])
        else:
            sub = _layer_class(hints[f.name])
            count = meta["count"]
            if count is None:
                tree[f.name] = declare(sub, dims, here, meta["rename"])
            else:
                n, changes = _look_up(dims, count, here), dims.get(meta["each"])
                tree[f.name] = tuple(
                    declare(
                        sub,
                        {**dims, **changes[i]} if changes else dims,
                        f"{here}.{i}",
                        meta["rename"],
                    )
                    for i in range(n)
                )
    return cls(**tree)


def _look_up(dims: Dims, name: str, path: str) -> Any:
    if name not in dims:
        raise ValueError(f"{path}: dims has no {name!r}; it has {', '.join(dims)}")
    return dims[name]


def _layer_class(hint: Any) -> type:
    """Return the params class inside ``Norm``, ``Norm | None`` or ``tuple[Block, ...]``."""
    return next(
        c for c in (hint, *typing.get_args(hint)) if isinstance(c, type) and is_dataclass(c)
    )


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf, in declaration order. A path looks like
    ``blocks.3.mlp.w_up``."""
    if _is_node(tree):
        chosen = _chosen(type(tree))
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
    if tree is None or isinstance(tree, (Tensor, WeightSpec)):
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


@dataclass(frozen=True)
class Declared:
    """The declaration of a leaf, read from its class; see ``WeightSpec``."""

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
def _cached_declarations(cls, rename):
    found = []
    for f in fields(cls):
        if "axes" in f.metadata:
            axes = tuple(dict(rename).get(a, a) for a in f.metadata["axes"])
            found.append((f.name, (axes, f.metadata["frozen"], f.metadata["summed"]), ()))
        elif "value" not in f.metadata:
            found.append((f.name, None, tuple(f.metadata["rename"].items())))
    return tuple(found)


def with_specs(spec: Any, tree: Any) -> list[tuple[WeightSpec, Any]]:
    """Return every leaf of a tree with its declaration. The tree may lack leaves of ``spec``
    (None)."""
    found: list[tuple[WeightSpec, Any]] = []
    _with_specs(spec, tree, found)
    return found


def _with_specs(spec: Any, tree: Any, found: list[tuple[WeightSpec, Any]]) -> None:
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


def draw(w: WeightSpec, dims: Dims, seed: int, device: str = "cpu") -> Tensor:
    """Draw one unsharded weight in float32. It is a function of (seed, path), so it is the same on
    every mesh."""
    digest = hashlib.sha256(f"{seed}/{w.path}".encode()).digest()
    with paused():  # simulated ranks would draw one value each
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return w.init(w, dims, generator)


def init(
    spec: Any,
    dims: Dims,
    seed: int,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """Draw the weights of a declared tree one at a time and keep only this rank's shard of each."""
    with torch.no_grad():
        return tree_map(
            lambda w: layout.shard(draw(w, dims, seed, device).to(dtype), *w.axes), spec
        )


# Whether the matmul with this weight runs in FP8. The second argument is the shape of a rank's
# shard of the weight in the matmul.
Fp8GatherRule = Callable[["Declared", Sequence[float]], bool]


def gather(
    tree: Any, layout: Layout, once: bool = False, narrow: Fp8GatherRule | None = None
) -> Any:
    """Call ``Layout.gather`` on every weight of a tree, so that it is ready for compute. The place
    of this call in the program is the ZeRO stage.

    ``once``: not under autograd, and small weights may share a collective
        (distributed/bucketing.py).
    ``narrow``: the rule that selects weights to all-gather in 8 bits.
    """
    return unflatten(tree, gather_all(flat(tree), declared(tree), layout, once, narrow))


def gather_all(
    weights: Sequence[Tensor],
    of: Sequence[Declared],
    layout: Layout,
    once: bool = False,
    narrow: Fp8GatherRule | None = None,
) -> list[Tensor]:
    """Do the same as ``gather`` for the leaves of a tree, given their declarations ``of``."""
    pairs = list(zip(weights, of, strict=True))
    away = [
        i for i, (w, d) in enumerate(pairs) if not d.frozen and once and layout.gathers(w, *d.axes)
    ]
    goals = [layout.gathered(*of[i].axes) for i in away]
    shared = {
        away[j]: w
        for j, w in gather_some([weights[i] for i in away], goals, layout.compute).items()
    }
    fits = lambda w, d: narrow is not None and narrow(d, layout.shape(w, *d.axes))
    return [
        shared[i]
        if i in shared
        else w
        if d.frozen
        else layout.gather(w, *d.axes, narrow=fits(w, d))
        for i, (w, d) in enumerate(pairs)
    ]
