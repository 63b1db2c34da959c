"""The protocol of an optimizer, its state, and the update that every optimizer shares.

An optimizer is a frozen dataclass whose fields are its options. In the protocol ``Optimizer``,
``init`` makes its state, ``update`` takes one step, and ``state_bytes`` counts memory. Its state is
a dict of trees by name, such as ``{"m": ..., "v": ...}``. Checkpoints, ``dtron.show`` and
``dtron.verify`` iterate over these names. ``optim_config.OPTIMIZERS`` has the optimizers by name.

An optimizer that updates each element of a weight by itself (``ElementwiseOptimizer``) only writes
``rule``, pure arithmetic on one weight. The rule runs on local shards, eagerly or as one kernel.

The model computes in fewer bits (bfloat16); the optimizer updates master weights (float32). Its
state keeps a copy of every weight in the compute dtype, written in the same pass as the master. A
cast would read all masters again: 4 of the 32 bytes that a step of AdamW moves per weight.

Every update keeps three promises, for CUDA graphs (cuda_graph.py) and against bad steps:

* The update overwrites params and state in place. It may overwrite gradients.
* The host waits for no number: ``UpdateScalars`` may be tensors.
* If ``ok`` is false, nothing changes (``overwrite``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from dtron.distributed.redistribute import cast, to_local
from dtron.distributed.symmetric_memory import publish_weights, to_symmetric_memory
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.torch_compile import jit
from dtron.tree import flat, tree_map, unflatten


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer.

    ``step``: the number of updates.
    ``trees``: the trees of the optimizer, by name. A tree is shaped like the params; it may lack
        weights (None), and a leaf may have another shape than its weight.
    ``compute_copies``: the params in the compute dtype, or None if the params have this dtype
        already. A checkpoint does not contain the copies."""

    step: int
    trees: dict[str, Any]
    compute_copies: Any = None


@dataclass(frozen=True)
class UpdateScalars:
    """The numbers of one update. Each may be a tensor on the device.

    ``lr``: the learning rate.
    ``scale``: the factor of the gradients, for clipping and to divide by the number of tokens.
    ``ok``: if false, no weight and no state changes, but the update is counted. None: true.
    ``step``: the number of this update, from 1. None: one more than the state's."""

    lr: float | Tensor
    scale: float | Tensor = 1.0
    ok: Tensor | None = None
    step: int | Tensor | None = None


class Optimizer(Protocol):
    """The functions of an optimizer. Subclass it for an update that is not elementwise. It may
    communicate, and may treat weights by their logical axes (``WeightSpec.axes``)."""

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        """Make the trees of the state, by name.

        ``spec``: the declared tree, with a ``WeightSpec`` for each weight."""

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        """Take one step and return params and state, overwritten in place. The compute copies of
        the state are written too. Frozen weights stay.

        ``scalars``: here ``scale`` and ``ok`` are tensors, and ``step`` is not None.
        ``layout``: the mesh, for updates that communicate."""

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        """Return the bytes of state that a rank holds for its shard of a weight.

        ``shape``: the shape of the shard.
        ``element``: the bytes of an element of the master weight."""

    def width_rate(self, w: WeightSpec) -> float:
        """Return the factor of a weight's learning rate in muP (mup.py). Raises UserError where no
        factor is known."""
        raise UserError(f"model.mup_base_width: muP has no learning rates for {self}; use 0")

    def compiled(self, backend: str = "inductor") -> Optimizer:
        """Return the same optimizer with its arithmetic compiled. The default stays eager."""
        return self


class DeviceScalars(NamedTuple):
    """The numbers of an elementwise update, as tensors on the device of the weights.

    ``terms``: the result of ``ElementwiseOptimizer.step_terms``."""

    lr: Tensor
    scale: Tensor
    ok: Tensor
    terms: tuple[Tensor, ...]


@dataclass(frozen=True)
class ElementwiseOptimizer(Optimizer):
    """The base of elementwise optimizers. A subclass has ``state_names`` and ``rule``, and perhaps
    ``fused``, ``step_terms``, ``for_weight`` and ``width_rate``.

    ``kernel``: the compiled ``update_weight``. None: ``fused`` if the class has it, else eager."""

    kernel: Callable[..., None] | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )

    state_names: ClassVar[tuple[str, ...]] = ()
    """the names of the state's trees, each like the params"""

    fused: ClassVar[Callable[..., None] | None] = None
    """a method ``fused(w, g, state, scalars)`` that updates lists of weights in place, with one
    kernel of torch; ``state`` has a list for each of ``state_names``"""

    def rule(
        self, w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Tensor, *terms: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the new weight and its new state, and overwrite nothing.

        ``g``: the gradient, scaled, in the dtype of the weight.
        ``state``: the weight's state, in the order of ``state_names``.
        ``terms``: the result of ``step_terms``."""
        raise NotImplementedError

    def step_terms(self, step: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of the rule that depend on the step's number (from 1), computed once
        a step."""
        return ()

    def for_weight(self, w: WeightSpec) -> Self:
        """Return the optimizer with the options of one weight, chosen by its declaration. Norms and
        biases do not decay. Weights with equal options are updated together."""
        without: Any = {"weight_decay": 0.0} if hasattr(self, "weight_decay") else {}
        return self if w.decays else replace(self, **without)

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        return {name: tree_map(torch.zeros_like, params) for name in self.state_names}

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return len(self.state_names) * math.prod(shape) * element

    def compiled(self, backend: str = "inductor") -> Self:
        """Compile the kernel, once per shape. A transformer has a dozen shapes. (On an H200,
        bench-1.3b: with all weights in one graph the first step took 160 s instead of 70 s. With
        one graph for any shape every step took 5 ms more.)"""
        return replace(self, kernel=jit(update_weight, backend=backend))

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        groups: dict[ElementwiseOptimizer, list[int]] = {}
        for i, w in enumerate(flat(spec)):
            if not w.frozen:
                groups.setdefault(self.for_weight(w), []).append(i)
        weights, grads = flat(params), flat(grads)
        trees = [flat(state.trees[name]) for name in self.state_names]
        copies = flat(state.compute_copies) or [None] * len(weights)
        for optimizer, members in groups.items():
            w, g, c, *s = (_locals(xs, members) for xs in (weights, grads, copies, *trees))
            optimizer._update_group(w, g, s, c, scalars)
        return params, state

    def _update_group(
        self,
        w: list[Tensor],
        g: list[Tensor],
        state: list[list[Tensor]],
        copies: list[Tensor | None],
        scalars: UpdateScalars,
    ) -> None:
        """Update lists of local tensors in place."""
        if self.kernel is None and self.fused is not None:
            self.fused(w, g, state, scalars)
            if pairs := [(c, x) for c, x in zip(copies, w, strict=True) if c is not None]:
                torch._foreach_copy_([c for c, _ in pairs], [x for _, x in pairs])
            return
        kernel = self.kernel or update_weight
        scale, ok = scalars.scale, scalars.ok
        assert isinstance(scale, Tensor) and ok is not None and scalars.step is not None
        lr, step = like_scale(scale, scalars.lr), like_scale(scale, scalars.step)
        numbers = DeviceScalars(lr, scale, ok, self.step_terms(step))
        states = zip(*([*map(as_matrix, s)] for s in state), strict=True) if state else repeat(())
        for x, dx, state_of_x, copy in zip(w, g, states, copies):
            dx = as_matrix(dx.contiguous())  # of an uneven shard it is a slice of a padded buffer
            kernel(self, as_matrix(x), dx, state_of_x, as_matrix(copy), numbers)


def update_weight(
    optimizer: ElementwiseOptimizer,
    w: Tensor,
    g: Tensor,
    state: tuple[Tensor, ...],
    copy: Tensor | None,
    scalars: DeviceScalars,
) -> None:
    """Update one weight in place: one kernel when compiled, which takes gradients in any dtype.

    ``copy``: the weight in the compute dtype, or None."""
    g = g.to(w.dtype) * scalars.scale
    new_w, new_state = optimizer.rule(w, g, state, scalars.lr, *scalars.terms)
    overwrite((w, *state), (new_w, *new_state), scalars.ok)
    if copy is not None:
        copy.copy_(w)


def overwrite(old: Sequence[Tensor], new: Sequence[Tensor], ok: Tensor) -> None:
    """Overwrite tensors with their new values, unless ``ok`` is false. (NaN times 0 is NaN.)"""
    for x, y in zip(old, new, strict=True):
        x.copy_(torch.where(ok, y, x))


def like_scale(scale: Tensor, x: float | Tensor) -> Tensor:
    """Return a number of the update as a tensor like ``scale``."""
    return x.to(scale) if isinstance(x, Tensor) else torch.full_like(scale, float(x))


def _locals(xs: Sequence[Any], members: Sequence[int]) -> list[Any]:
    return [None if xs[i] is None else to_local(xs[i]) for i in members]


def as_matrix(x: Any) -> Any:
    """View a tensor with at most two dims, so that fewer shapes are compiled."""
    return x if x is None or x.ndim < 3 else x.flatten(1)


def init_state(optimizer: Optimizer, spec: Any, params: Any) -> OptimizerState:
    """Return the state before the first update. Raises ValueError for a name that is not saved."""
    trees = optimizer.init(spec, params)
    for name in trees:
        if name == "params" or "." in name:  # a checkpoint calls a tensor NAME.PATH
            raise ValueError(f"a tree of {type(optimizer).__name__} is called {name!r}; rename it")
    return OptimizerState(0, trees)


def with_compute_copies(
    state: OptimizerState, params: Any, spec: Any, dtype: torch.dtype | None
) -> OptimizerState:
    """Return the state with copies of the params in ``dtype`` (None: no copies). Frozen weights are
    not cast. Copies that copy engines all-gather are in symmetric memory."""
    if dtype is None:
        return replace(state, compute_copies=None)
    pairs = zip(flat(spec), flat(params), strict=True)
    copies = to_symmetric_memory([p if w.frozen else cast(p, dtype) for w, p in pairs])
    return replace(state, compute_copies=unflatten(params, copies))


def apply_update(
    optimizer: Optimizer,
    spec: Any,
    params: Any,
    grads: Any,
    state: OptimizerState,
    scalars: UpdateScalars,
    layout: Layout,
) -> tuple[Any, OptimizerState]:
    """Take one step in place and return ``(params, state)``. Then announce to all ranks that the
    weights have been written."""
    weights, ok = flat(params), scalars.ok
    first = to_local(weights[0])
    scalars = replace(
        scalars,
        scale=torch.as_tensor(scalars.scale, dtype=first.dtype, device=first.device),
        ok=torch.ones((), dtype=torch.bool, device=first.device) if ok is None else ok,
        step=state.step + 1 if scalars.step is None else scalars.step,
    )
    params, state = optimizer.update(spec, params, grads, state, scalars, layout)
    publish_weights(weights)
    return params, replace(state, step=state.step + 1)
