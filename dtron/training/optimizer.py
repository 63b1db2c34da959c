"""The protocol of an optimizer, its state, and the update that every optimizer shares.

An optimizer is a frozen dataclass whose fields are its options. It has three functions (the
protocol ``Optimizer``): ``init`` makes its state, ``update`` takes one step, and ``state_bytes``
counts memory. Its state is a dict of trees by name, such as ``{"m": ..., "v": ...}``. Checkpoints,
``dtron.show`` and ``dtron.verify`` iterate over these names. An optimizer is chosen by its name in
``optim_config.OPTIMIZERS``.

An optimizer that updates each element of a weight by itself is an ``ElementwiseOptimizer``
(elementwise_optimizer.py).

The model computes in fewer bits (bfloat16); the optimizer updates master weights (float32). The
optimizer state keeps a copy of every weight in the compute dtype. The update writes the copy in the
same pass as the master. Otherwise each step would read all masters again just to cast them: 4 of
the 32 bytes that a step of AdamW moves per weight.

Every update keeps three promises, so that a step can be recorded as a CUDA graph (cuda_graph.py)
and a bad step does no harm:

* The update overwrites params and state in place. It may overwrite gradients.
* The host waits for no number: ``UpdateScalars`` may be tensors.
* If ``ok`` is false, nothing changes (``overwrite``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dtron.distributed.redistribute import cast, to_local
from dtron.distributed.symmetric_memory import publish_weights, to_symmetric_memory
from dtron.errors import UserError
from dtron.frozen import trained
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.state_formats import MASTERS_LOW, split_tensor
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, unflatten

Kind = TypeVar("Kind")


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


class Optimizer(Protocol):
    """The functions of an optimizer. Subclass it for an update that is not elementwise: such an
    update may communicate, and may treat weights by their logical axes (``WeightSpec.axes``)."""

    squares: ClassVar[tuple[str, ...]] = ()
    """the trees of the state that are means of squares; see state_formats.py"""

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        """Make the trees of the state, by name.

        ``spec``: the declared tree, with a ``WeightSpec`` for each weight. Like params, it has no
            frozen weights."""

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
        the state are written too. Buffers stay. The trees have no frozen weights.

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
        """Return the same optimizer with its arithmetic compiled. An optimizer without this
        function stays eager."""
        return self


@dataclass(frozen=True)
class WrappedOptimizer(Optimizer):
    """The base of optimizers that add something to another one. A subclass overrides the functions
    that it changes.

    ``base``: the optimizer that updates the weights."""

    base: Optimizer

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        return self.base.init(spec, params)

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        return self.base.update(spec, params, grads, state, scalars, layout)

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return self.base.state_bytes(w, shape, element)

    def compiled(self, backend: str = "inductor") -> Self:
        return replace(self, base=self.base.compiled(backend))


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that all others around it wrap."""
    while isinstance(optimizer, WrappedOptimizer):
        optimizer = optimizer.base
    return optimizer


def find(optimizer: Any, kind: type[Kind]) -> Kind | None:
    """Return the optimizer of a class among an optimizer and those that it is made of."""
    while optimizer is not None and not isinstance(optimizer, kind):
        optimizer = getattr(optimizer, "base", None)
    return optimizer


def init_each(
    spec: Any, params: Any, init: Callable[[WeightSpec, Tensor], dict[str, Any]]
) -> dict[str, Any]:
    """Make the trees of a state one weight after another. So a state that is stored in another
    form never exists whole in its first form, which might not fit into memory.

    ``init``: makes the trees of one weight, as tuples of one leaf."""
    weights, leaves = flat(params), dict[str, list[Any]]()
    for i, (w, x) in enumerate(zip(flat(spec), weights, strict=True)):
        for name, (leaf,) in init(w, x).items():
            leaves.setdefault(name, [None] * len(weights))[i] = leaf
    return {name: unflatten(params, column) for name, column in leaves.items()}


def init_state(optimizer: Optimizer, spec: Any, params: Any) -> OptimizerState:
    """Return the state before the first update. Raises ValueError for a name that is not saved."""
    trees = optimizer.init(trained(spec, spec), trained(spec, params))
    for name in trees:
        if name == "params" or "." in name:  # a checkpoint calls a tensor NAME.PATH
            raise ValueError(f"a tree of {type(optimizer).__name__} is called {name!r}; rename it")
    return OptimizerState(0, trees)


def stored_params(params: Any, spec: Any, state: OptimizerState) -> Any:
    """Return the params as the optimizer stores them. Split master weights become bfloat16 weights:
    their other bits are in the state."""
    if MASTERS_LOW not in state.trees:
        return params
    pairs = zip(flat(spec), flat(params), strict=True)
    weights = to_symmetric_memory(
        [p if w.buffer or w.frozen else split_tensor(p).data for w, p in pairs]
    )
    return unflatten(params, weights)


def with_compute_copies(
    state: OptimizerState, params: Any, spec: Any, dtype: torch.dtype | None
) -> OptimizerState:
    """Return the state with copies of the params in ``dtype`` (None: no copies). Buffers are not
    cast, and frozen weights have this dtype already. Split master weights need no copies. Copies
    that copy engines all-gather are in symmetric memory (``symmetric_memory``)."""
    if dtype is None or MASTERS_LOW in state.trees:
        return replace(state, compute_copies=None)
    pairs = zip(flat(spec), flat(params), strict=True)
    copies = to_symmetric_memory([p if w.buffer or w.frozen else cast(p, dtype) for w, p in pairs])
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
    """Take one step of an optimizer and return ``(params, state)``, which are overwritten in place.
    Then announce to all ranks that the weights have been written."""
    weights = flat(params)
    first, ok = to_local(weights[0]), scalars.ok
    wide = torch.promote_types(first.dtype, torch.float32)
    scalars = replace(
        scalars,
        scale=torch.as_tensor(scalars.scale, dtype=wide, device=first.device),
        ok=torch.ones((), dtype=torch.bool, device=first.device) if ok is None else ok,
        step=state.step + 1 if scalars.step is None else scalars.step,
    )
    copies = state.compute_copies
    part = replace(state, compute_copies=None if copies is None else trained(spec, copies))
    changed = trained(spec, params)
    if flat(changed):  # a stage may have frozen weights alone
        optimizer.update(trained(spec, spec), changed, grads, part, scalars, layout)
    publish_weights(weights)
    return params, replace(state, step=state.step + 1)
