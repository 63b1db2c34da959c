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

A plain number of one layer, such as its attention window, is stored in the tree too, as
``value("window")``. It is not a leaf.

A tree is a frozen dataclass, a tuple, a tensor or None. There is no registry and no ``nn.Module``:
nothing here has state. A layer can be called on any tree of the right shape, also on a tree of
gradients or of optimizer state.
"""

from __future__ import annotations

import hashlib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.bucketing import unshard_bucketed
from dtron.distributed.simulated_ranks import paused
from dtron.mesh import Layout
from dtron.mup import Growth, growth
from dtron.tree import Declared, Leaf, declared, fill, flat, unflatten

Dims = Mapping[str, Any]
Init = Callable[["WeightSpec", Dims, torch.Generator], Tensor]


@dataclass(frozen=True)
class WeightSpec(Leaf):
    """The declaration of one weight.

    ``path``: its path in the tree.
    ``axes``, ``shape``: its logical axes, and the sizes of the axes.
    ``init``: its initialiser.
    ``twin``: another pipeline stage has the same weight, and that stage counts it.
    ``buffer``: no weight of the model's function, only stored with the weights: it is never cast,
        and other code may set it between steps.
    ``frozen``: training does not change the weight: it has no gradient, no optimizer state and no
        master copy.
    ``summed``: the number of leading dims (after the expert dim) over which a matmul sums, if this
        matmul may run in FP8; 0: no such matmul.
    ``growth``: its sizes as multiples of the sizes at muP's base width (mup.py).
    ``decays``: whether weight decay applies: to matrices, but not to norms, biases and the like.
    ``dtype``: the dtype in which the weight is kept (None: the dtype of the run's weights).
    ``derived``: its initial value follows from other weights, and is not drawn.
    """

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Init
    twin: bool = False
    buffer: bool = False
    frozen: bool = False
    summed: int = 0
    growth: Growth = Growth()
    decays: bool = True
    dtype: torch.dtype | None = None
    derived: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def normal(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw from a normal distribution of standard deviation ``dims["init_std"]``; the default is
    0.02 (GPT-2). muP has a factor for each weight."""
    x = torch.empty(w.shape, device=generator.device)
    std = dims.get("init_std", 0.02) * w.growth.init_std
    return x.normal_(0.0, std, generator=generator)


def residual_out(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw from ``normal`` and divide by sqrt(2 layers), so that the variance of the residual
    stream does not grow with depth (GPT-2, section 2.3)."""
    return normal(w, dims, generator) / math.sqrt(2 * dims.get("layers", 1))


def ones(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    return torch.ones(w.shape, device=generator.device)


def zeros(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    return torch.zeros(w.shape, device=generator.device)


def weight(
    *axes: str,
    summed: int = 0,
    fan_in: int = 0,
    init: Init = normal,
    when: str | None = None,
    buffer: bool = False,
    decays: bool | None = None,
) -> Any:
    """Declare a weight with these logical axes.

    ``summed``: the number of its dims over which ``linear`` sums, if the weight is for ``linear``.
    ``fan_in``: the same number for a matmul that is not ``linear``'s, or never in FP8. muP asks for
        either number.
    ``when``: the weight is absent (None) if ``dims[when]`` is false.
    ``buffer``: the optimizer does not update the tensor, and it is never cast. Other code may set
        it between steps.
    ``decays``: whether weight decay applies (None: unless its initial value is a constant, as of
        norms and biases).
    """
    return field(
        metadata={
            "decays": init not in (ones, zeros) if decays is None else decays,
            "axes": axes,
            "init": init,
            "when": when,
            "buffer": buffer,
            "summed": summed,
            "fan_in": fan_in or summed,
        }
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
    ``each``: the i-th sub-layer is declared with the changes ``dims[each][i]`` to dims.
    ``when``: the sub-layer is absent (None) if ``dims[when]`` is false.
    ``choose``: ``dims[choose]`` is the sub-layer's class and its own changes to dims. Paths have
        the class's ``segment`` in place of the field's name.
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
        field_path, meta = f"{path}.{f.name}" if path else f.name, f.metadata
        if "value" in meta:
            tree[f.name] = _look_up(dims, meta["value"], field_path)
        elif meta["when"] and not _look_up(dims, meta["when"], field_path):
            tree[f.name] = None
        elif "axes" in meta:
            axes = tuple(rename.get(a, a) for a in meta["axes"])
            shape = tuple(_look_up(dims, a.removeprefix("act_"), field_path) for a in axes)
            kind = {name: meta[name] for name in ("buffer", "summed", "decays")}
            kind["growth"] = growth(axes, meta["fan_in"], dims.get("width", 1.0))
            tree[f.name] = WeightSpec(field_path, axes, shape, meta["init"], **kind)
        elif meta["choose"]:
            sub, changes = _look_up(dims, meta["choose"], field_path)
            field_path = f"{path}.{sub.segment}" if path else sub.segment
            tree[f.name] = declare(sub, {**dims, **changes}, field_path, meta["rename"])
        else:
            sub = _layer_class(hints[f.name])
            count = meta["count"]
            if count is None:
                tree[f.name] = declare(sub, dims, field_path, meta["rename"])
            else:
                n, changes = _look_up(dims, count, field_path), dims.get(meta["each"])
                tree[f.name] = tuple(
                    declare(
                        sub,
                        {**dims, **changes[i]} if changes else dims,
                        f"{field_path}.{i}",
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


def draw(w: WeightSpec, dims: Dims, seed: int, device: str = "cpu") -> Tensor:
    """Draw one unsharded weight in float32. The weight is a function of (seed, path), so it is the
    same on every mesh."""
    digest = hashlib.sha256(f"{seed}/{w.path}".encode()).digest()
    with paused():  # simulated ranks would draw one value each
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return w.init(w, dims, generator)


def stored_dtype(w: WeightSpec, layout: Layout, master: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight is kept: a frozen one needs no master weight.

    ``master``: the dtype of master weights."""
    return w.dtype or (layout.compute if w.frozen else None) or master


def init(
    spec: Any,
    dims: Dims,
    seed: int,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """Draw the weights of a declared tree one at a time and keep only this rank's shard of each.

    ``dtype``: of master weights."""

    def placed(w: WeightSpec) -> Tensor | None:
        if w.derived:
            return None
        x = draw(w, dims, seed, device)
        return layout.shard(x.to(stored_dtype(w, layout, dtype)), *w.axes)

    with torch.no_grad():
        return fill(spec, placed)


# Whether the matmul with this weight runs in FP8. The second argument is the shape of a rank's
# shard of the weight in the matmul.
Fp8GatherRule = Callable[["Declared", Sequence[float]], bool]


def unshard(tree: Any, layout: Layout, once: bool = False, fp8: Fp8GatherRule | None = None) -> Any:
    """Call ``Layout.unshard`` on every weight of a tree, so that the weights are ready for compute.
    The position of this call in the program is the ZeRO stage.

    ``once``: not under autograd, and small weights may share a collective
        (distributed/bucketing.py).
    ``fp8``: the rule that selects weights to all-gather in 8 bits.
    """
    return unflatten(tree, unshard_all(flat(tree), declared(tree), layout, once, fp8))


def unshard_all(
    weights: Sequence[Tensor],
    declarations: Sequence[Declared],
    layout: Layout,
    once: bool = False,
    fp8: Fp8GatherRule | None = None,
) -> list[Tensor]:
    """Do the same as ``unshard`` for the leaves of a tree, given the leaves' declarations."""
    from_buckets: dict[int, Tensor] = {}
    if once:
        pairs = enumerate(zip(weights, declarations, strict=True))
        sharded = [i for i, (w, d) in pairs if not d.buffer and layout.needs_unshard(w, *d.axes)]
        goals = [layout.unsharded(*declarations[i].axes) for i in sharded]
        dtensors: list[Any] = [weights[i] for i in sharded]  # weights on one device need no unshard
        gathered = unshard_bucketed(dtensors, goals, layout.compute)
        from_buckets = {sharded[j]: w for j, w in gathered.items()}
    ready = []
    for i, (w, d) in enumerate(zip(weights, declarations, strict=True)):
        if i in from_buckets:
            w = from_buckets[i]
        elif not d.buffer:
            in_fp8 = fp8 is not None and fp8(d, layout.shape(w, *d.axes))
            w = layout.unshard(w, *d.axes, fp8=in_fp8)
        ready.append(w)
    return ready
