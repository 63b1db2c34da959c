"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon): the update of a matrix is its
momentum with all singular values set to 1.

    m = beta m + (1 - beta) g                            momentum of the gradient
    u = beta m + (1 - beta) g                            Nesterov's look ahead
    o = U V^T                    where u = U S V^T       (newton_schulz.py)
    w = (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) o

A matrix of rows r and columns c with singular values 1 has elements of mean square 1 / max(r, c).
The last factor makes the root mean square of the update 0.2, about that of AdamW's updates. So the
learning rate and the weight decay of AdamW serve for Muon (Liu et al. 2025, arXiv:2502.16982,
section 2.2).

Muon updates the weights of linear layers, which are declared with ``summed``. A weight of experts
is a matrix for each expert. The dims of heads belong to the matrix; with ``per_head`` each head is
a matrix by itself. The embedding, the head, the router, norms and biases are updated by AdamW,
because they are no matrices, or their gradients are sparse.

The state of a matrix is ``m`` alone, half of AdamW's state. It is also AdamW's first moment.

On a mesh each matrix is made whole on one rank, its owner (matrix_exchange.py). Momentum and
weights stay sharded. On a GPU the exchange and the iterations are in bfloat16 if the weights are in
float32. A CPU computes in float32, because its matmuls in bfloat16 are slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from dtron.bounds import from_to, under
from dtron.distributed.redistribute import to_local
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.torch_compile import jit, kernel_device
from dtron.training.adamw import AdamW
from dtron.training.elementwise_optimizer import Shard
from dtron.training.linear_weight import LinearWeight, dealt, is_matrix
from dtron.training.optimizer import Optimizer, OptimizerState
from dtron.training.parameter_groups import part_of_trees
from dtron.training.state_formats import (
    Stored,
    as_matrix,
    load,
    stored_tree,
    stored_weights,
    write,
)
from dtron.training.stochastic_rounding import places, random_bits
from dtron.training.update_scalars import DeviceScalars, UpdateScalars, like_scale, on_device
from dtron.tree import flat, tree_map

RMS = 0.2  # the root mean square of an update


def advance(
    momentum: Stored,
    g: Tensor,
    places: tuple[Tensor, ...],
    scalars: DeviceScalars,
    decay: float,
    nesterov: bool,
) -> Tensor:
    """Update the momentum in place. Return the matrix to orthogonalise."""
    m = load(momentum)
    g = g.to(torch.promote_types(g.dtype, m.dtype)) * scalars.scale
    new = decay * m + (1 - decay) * g
    ahead = decay * new + (1 - decay) * g if nesterov else new
    random = random_bits(places, scalars.step, 0) if momentum.in_few_bits else None
    write(momentum, new, scalars.ok, random)
    in_few_bits = m.dtype == torch.float32 and kernel_device(m.device) != "cpu"
    return ahead.to(torch.bfloat16) if in_few_bits else ahead


def step(
    w: Stored,
    update: Tensor,
    copy: Tensor | None,
    lr: Tensor,
    ok: Tensor,
    decay: float | Tensor,
    size: float,
) -> None:
    """Update a weight in place, and its copy in the compute dtype.

    ``size``: the factor of the orthogonal matrix."""
    old = load(w)
    write(w, old * (1 - lr * decay) - lr * size * update.to(old.dtype), ok)
    if copy is not None:
        copy.copy_(w.data)


@dataclass(frozen=True)
class Kernels:
    """The arithmetic of shards, eager or compiled.

    ``adamw``: see ``ElementwiseOptimizer.kernel``."""

    advance: Callable[..., Tensor] = advance
    step: Callable[..., None] = step
    adamw: Callable[..., None] | None = None


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the weights of linear layers, AdamW for all others.

    ``beta1``, ``beta2``, ``eps``: the options of AdamW.
    ``weight_decay``: the weight decay of matrices; norms and biases have none.
    ``momentum``: the decay of the momentum.
    ``nesterov``: whether an update looks one step ahead.
    ``iterations``: the number of Newton-Schulz iterations.
    ``per_head``: whether each attention head is a matrix by itself."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    per_head: bool = False
    kernels: Kernels = field(default=Kernels(), compare=False, repr=False)

    squares = ("v",)

    def __post_init__(self) -> None:
        under(self, "optim", {"momentum": 1})
        from_to(self, "optim", {"iterations": (1, 100)})
        _ = self.adamw  # checks its options

    @property
    def adamw(self) -> AdamW:
        """The optimizer of all other weights."""
        kernel = self.kernels.adamw
        return AdamW(self.beta1, self.beta2, self.eps, self.weight_decay, kernel=kernel)

    def compiled(self, backend: str = "inductor") -> Self:
        adamw = self.adamw.compiled(backend).kernel
        kernels = Kernels(jit(advance, backend=backend), jit(step, backend=backend), adamw)
        return replace(self, kernels=kernels)

    def width_rate(self, w: WeightSpec) -> float:
        if not is_matrix(w):
            return self.adamw.width_rate(w)
        if self.per_head:
            raise UserError(
                "optim.options per_head=true with model.mup_base_width: the updates of heads add "
                "up in w_o, and no factor is known; drop one of the two"
            )
        shape = w.shape[int(w.axes[0] == "experts") :]
        rows, columns = math.prod(shape[: w.summed]), math.prod(shape[w.summed :])
        return w.growth.spectral_rate(rows, columns)

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        second = lambda w, x: None if is_matrix(w) else torch.zeros_like(x)
        return {"m": tree_map(torch.zeros_like, params), "v": tree_map(second, spec, params)}

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return (1 if is_matrix(w) else 2) * math.prod(shape) * element

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        declared = flat(spec)
        groups = {
            kind: [i for i, w in enumerate(declared) if is_matrix(w) == kind]
            for kind in (True, False)
        }
        w, x, g, s = part_of_trees(groups[True], spec, params, grads, state)
        columns = (
            w,
            stored_weights(w, x, s.trees),
            g,
            stored_tree(w, s.trees, "m"),
            s.compute_copies or [None] * len(w),
        )
        matrices = [LinearWeight(*row, self.per_head) for row in zip(*columns, strict=True)]
        self._update_matrices(matrices, scalars, layout)
        others = part_of_trees(groups[False], spec, params, grads, state)
        self.adamw.update(*others, scalars, layout)
        return params, state

    def _update_matrices(
        self, weights: Sequence[LinearWeight], scalars: UpdateScalars, layout: Layout
    ) -> None:
        numbers, known = on_device(scalars), dict[Any, Tensor]()
        decay: float | Tensor = self.weight_decay
        if scalars.decay is not None:
            decay = decay * like_scale(numbers.scale, scalars.decay)
        for one in dealt(weights, layout):
            shards = [x for w in one.weights for x in self._advance(w, numbers, layout, known)]
            whole = one.exchange.to_owners(shards, one.slots)
            del shards
            whole = one.weights[0].orthogonalized(whole, self.iterations)
            updates = iter(one.exchange.to_shards(whole, one.slots))
            for w in one.weights:
                self._step(w, updates, numbers, decay)

    def _advance(
        self, w: LinearWeight, numbers: DeviceScalars, layout: Layout, known: dict[Any, Tensor]
    ) -> list[Tensor]:
        """Update the momentum of a weight. Return this rank's shards of its matrices.

        ``known``: see ``places``."""
        g, m = to_local(w.grad), w.momentum.local()
        at = places(w.spec, layout, g.device, known) if m.in_few_bits else ()
        shard = Shard(w.weight.local(), g, (m,), None, at).for_kernel()
        options = numbers, self.momentum, self.nesterov
        ahead = self.kernels.advance(*shard.state, shard.grad, shard.places, *options)
        ahead = ahead.view(m.data.shape)
        return [*ahead.unbind()] if w.of_experts else [ahead]

    def _step(
        self,
        w: LinearWeight,
        updates: Iterator[Tensor],
        numbers: DeviceScalars,
        decay: float | Tensor,
    ) -> None:
        """Update a weight.

        ``updates``: yields this rank's shard of each orthogonal matrix."""
        x, copy = w.weight.local(), None if w.copy is None else to_local(w.copy)
        update = torch.stack([next(updates) for _ in x.data]) if w.of_experts else next(updates)
        tensors = (x.as_matrix(), as_matrix(update.contiguous()), as_matrix(copy))
        size = RMS * math.sqrt(max(w.rows, w.columns))
        self.kernels.step(*tensors, numbers.lr, numbers.ok, decay, size)
