"""The base of optimizers that update each element of a weight by itself.

Such an optimizer only writes ``rule``, pure arithmetic on one weight. The rule does not depend on
sharding: it runs on each rank's local shards, eagerly, or compiled into one kernel per weight. It
does not depend on the format in which weights and state are stored either (state_formats.py): the
kernel reads and writes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.torch_compile import jit
from dtron.training.optimizer import Optimizer, OptimizerState
from dtron.training.state_formats import (
    Stored,
    as_matrix,
    in_blocks,
    load,
    stored_tree,
    stored_weights,
    write,
)
from dtron.training.stochastic_rounding import places, places_in_blocks, random_bits
from dtron.training.update_scalars import DeviceScalars, UpdateScalars, like_scale, on_device
from dtron.tree import flat, tree_map


class Shard(NamedTuple):
    """This rank's shard of a weight, and what belongs to it.

    ``copy``: the weight in the compute dtype, or None.
    ``places``: the indices of its elements, if a state is rounded at random; see ``places``."""

    weight: Stored
    grad: Tensor
    state: tuple[Stored, ...]
    copy: Tensor | None
    places: tuple[Tensor, ...] = ()

    def as_matrix(self) -> Shard:
        """View all tensors with at most two dims, so that fewer shapes are compiled."""
        weight, *state = (x.as_matrix() for x in (self.weight, *self.state))
        # The gradient of an uneven shard is a slice of a padded buffer.
        grad = as_matrix(self.grad.contiguous())
        return Shard(weight, grad, tuple(state), as_matrix(self.copy))

    def for_kernel(self) -> Shard:
        """View all tensors as a kernel takes them. In float8 a block has a dim of its own: so the
        largest element of each block is found in the kernel that computes the elements."""
        if not self.places:
            return self.as_matrix()
        dims = {dim for x in self.state if (dim := x.unblocked_dim) is not None}
        if not dims:
            return self
        (dim,) = dims
        weight, *state = (x.in_blocks(dim) for x in (self.weight, *self.state))
        grad, copy = in_blocks(self.grad, dim), in_blocks(self.copy, dim)
        return Shard(weight, grad, tuple(state), copy, places_in_blocks(self.places, dim))


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
        """Return the arguments of the rule that depend on the step's number (from 1). They are
        computed once a step, and not in the kernel of each weight."""
        return ()

    def for_weight(self, w: WeightSpec) -> Self:
        """Return the optimizer with the options of one weight, chosen by its declaration. Norms and
        biases do not decay. Weights with equal options are updated together."""
        without: dict[str, Any] = {"weight_decay": 0.0} if hasattr(self, "weight_decay") else {}
        return self if w.decays else replace(self, **without)

    def at(self, scalars: UpdateScalars) -> Self:
        """Return the optimizer with the options of this update. With a schedule, ``weight_decay``
        is a tensor of the device, which a rule uses as it uses the number."""
        usual = getattr(self, "weight_decay", 0.0)
        if scalars.decay is None or not usual:
            return self
        assert isinstance(scalars.scale, Tensor)
        # Not ``replace``: the checks of the options would wait for the device.
        now = copy.copy(self)
        object.__setattr__(now, "weight_decay", usual * like_scale(scalars.scale, scalars.decay))
        return now

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        return {name: tree_map(torch.zeros_like, params) for name in self.state_names}

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return len(self.state_names) * math.prod(shape) * element

    def compiled(self, backend: str = "inductor") -> Self:
        """Compile the kernel, once per shape. A transformer has a dozen shapes. (On an H200,
        bench-1.3b: with all weights in one graph the first step took 160 s instead of 70 s, and the
        later steps were no faster. With one graph for any shape every step took 5 ms more.)"""
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
            if not w.buffer:
                groups.setdefault(self.for_weight(w), []).append(i)
        weights = stored_weights(spec, params, state.trees)
        trees = [stored_tree(spec, state.trees, name) for name in self.state_names]
        copies = flat(state.compute_copies) or [None] * len(weights)
        grads, declared, known = flat(grads), flat(spec), dict[Any, Tensor]()

        def shard(i: int) -> Shard:
            own = tuple(tree[i].local() for tree in trees)
            copy = None if copies[i] is None else to_local(copies[i])
            random = any(x.in_few_bits for x in own)
            at = places(declared[i], layout, own[0].data.device, known) if random else ()
            return Shard(weights[i].local(), to_local(grads[i]), own, copy, at)

        for optimizer, members in groups.items():
            optimizer.at(scalars)._update_group([shard(i) for i in members], scalars)
        return params, state

    def _update_group(self, shards: list[Shard], scalars: UpdateScalars) -> None:
        """Update weights with equal options in place."""
        plain = all(x.plain for s in shards for x in (s.weight, *s.state))
        if self.kernel is None and self.fused is not None and plain:
            state = [
                list(x) for x in zip(*([y.data for y in s.state] for s in shards), strict=True)
            ]
            self.fused([s.weight.data for s in shards], [s.grad for s in shards], state, scalars)
            if pairs := [(s.copy, s.weight.data) for s in shards if s.copy is not None]:
                torch._foreach_copy_([c for c, _ in pairs], [x for _, x in pairs])
            return
        kernel = self.kernel or update_weight
        numbers = on_device(scalars)
        numbers = numbers._replace(terms=self.step_terms(numbers.step))
        for s in shards:
            kernel(self, *s.for_kernel(), numbers)


def update_weight(
    optimizer: ElementwiseOptimizer,
    w: Stored,
    g: Tensor,
    state: tuple[Stored, ...],
    copy: Tensor | None,
    places: tuple[Tensor, ...],
    scalars: DeviceScalars,
) -> None:
    """Update one weight in place. When compiled, this is one kernel. The kernel takes gradients in
    any dtype, so no gradient is cast before. See ``Shard``."""
    old = load(w)
    g = g.to(old.dtype) * scalars.scale
    new, new_state = optimizer.rule(old, g, tuple(map(load, state)), scalars.lr, *scalars.terms)
    write(w, new, scalars.ok)
    for i, (x, y) in enumerate(zip(state, new_state, strict=True)):
        random = random_bits(places, scalars.step, i) if x.in_few_bits else None
        write(x, y, scalars.ok, random)
    if copy is not None:
        copy.copy_(w.data)
