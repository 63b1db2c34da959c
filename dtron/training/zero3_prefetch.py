"""ZeRO-3's communication beside a compiled stage: weights are all-gathered one unit ahead, and
gradients are sent one unit later.

Under ZeRO-3 a unit (a block, say) all-gathers its weights, and backward all-gathers them again and
reduce-scatters their gradients. Here nothing in a graph waits for such a message. In Python, around
the units:

    forward:   gather 1 | gather 2, unit 1 | gather 3, unit 2 | gather 2, unit 3
    backward:  gather 1, unit 3 | send 3, unit 2 | finish 3, send 2, unit 1 | finish 2, send 1

(FSDP prefetches in the same way, by units that the model defines, Zhao et al. 2023,
arXiv:2304.11277, section 3.3.) A message is on its way while a unit computes. An all-gather by copy
engines (distributed/copy_engine.py) takes no SM from the unit.

No gathered weight is kept for backward. A unit saves its weights for backward, but a hook saves a
``Handle`` in place of each gathered weight. In backward the first handle of a unit waits for the
unit's second all-gather. Memory, besides the weights in use: one prefetched unit, and the gradients
of one unit. In the last stage backward follows forward at once. So the last unit keeps its weights,
and the unit before is all-gathered again while the loss is computed.

Left out: gradients that cannot be sent with one collective over one mesh axis into equal shards.
They are reduced where they are computed, by ``reduce_scatter`` of distributed/redistribute.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.collectives import start_all_gathers, wait
from dtron.distributed.fp8_all_gather import packed
from dtron.distributed.redistribute import row_sum
from dtron.distributed.saved_tensors import storage_id
from dtron.mesh import Layout
from dtron.params import Fp8GatherRule
from dtron.training.gathered_weight import GatheredWeight
from dtron.tree import declared, flat, unflatten


class Handle(NamedTuple):
    """A gathered weight, or a view of it, as a unit saves it for backward."""

    weight: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Prefetch:
    """The all-gathers of weights and the messages of gradients of one stage in one step.

    ``sum_rows``, ``pack``: the functions of these names below, compiled."""

    def __init__(self, layout: Layout, sum_rows: Callable, pack: Callable):
        self.layout, self.sum_rows, self.pack = layout, sum_rows, pack
        self._units: dict[tuple[int, ...], UnitWeights] = {}
        self._in_flight: list[Callable[[], None]] = []

    def gathered(
        self, order: Sequence[tuple[Any, Fp8GatherRule | None]], to_loss: bool
    ) -> Iterator[Any]:
        """Yield the trees of ``order`` with all weights gathered, see ``Units.gathered``."""
        units = [self._unit(i, tree, fp8) for i, (tree, fp8) in enumerate(order)]
        for before, after in zip(units, units[1:], strict=False):
            before.next, after.before = after, before
        units[-1].kept = to_loss
        for unit, (tree, _) in zip(units, order, strict=True):
            yield unit.gathered(tree)

    def send(self, finish: Callable[[], None]) -> None:
        """Finish all earlier messages of gradients, and note that one is on its way.

        ``finish``: waits for it and writes the gradients."""
        self.finish()
        self._in_flight.append(finish)

    def finish(self) -> None:
        """Wait for all gradients that are on their way."""
        for finish in self._in_flight:
            finish()
        self._in_flight.clear()
        for unit in self._units.values():
            unit.release_frozen()

    def _unit(self, place: int, tree: Any, fp8: Fp8GatherRule | None) -> UnitWeights:
        leaves = flat(tree)
        key = place, *map(id, leaves)
        if key in self._units:
            return self._units[key]
        weights = []
        for i, (w, d) in enumerate(zip(leaves, declared(tree), strict=True)):
            goal = self.layout.unsharded(*d.axes)
            if not d.buffer and goal != w.spec.placements:
                in_fp8 = fp8 is not None and fp8(d, self.layout.shape(w.spec, *d.axes))
                weights.append(GatheredWeight(self.layout, i, w, goal, in_fp8))
        self._units[key] = UnitWeights(self, weights)
        return self._units[key]


class UnitWeights:
    """The weights that one unit all-gathers.

    ``next``, ``before``: the next unit and the unit before, in the order of forward.
    ``kept``: the weights are kept for backward, which follows at once."""

    def __init__(self, prefetch: Prefetch, weights: list[GatheredWeight]):
        self.prefetch, self.weights = prefetch, weights
        self.next: UnitWeights | None = None
        self.before: UnitWeights | None = None
        self.kept = False
        self._in_backward = False
        self._coming: dict[int, Tensor] | None = None
        self._whole: list[Tensor] | None = None
        self._places: dict[int, int] = {}

    @property
    def alone(self) -> bool:
        """Whether no other unit is before or after it. Such a unit does not delay gradients. The
        embedding of the first stage is such a unit, and its gradients may be added to those of the
        head, or of multi-token prediction."""
        return self.next is None and self.before is None

    def release_frozen(self) -> None:
        """Free the weights after backward, if no weight of the unit has a gradient: autograd does
        not call ``backward`` then. A unit that needs them again all-gathers them again."""
        if not any(w.weight.local.requires_grad for w in self.weights):
            self._whole, self._in_backward = None, False

    def start(self) -> None:
        """Start the all-gather, unless it is on its way or has arrived."""
        if self._coming is not None or self._whole is not None:
            return
        self._coming, mesh = {}, self.prefetch.layout.mesh
        assert mesh is not None
        single = [i for i, w in enumerate(self.weights) if w.one_message]
        parts = {i: self.weights[i].part() for i in single}
        packed = [i for i in single if self.weights[i].packed]
        if packed:
            messages = self.prefetch.pack([parts[i] for i in packed])
            parts |= dict(zip(packed, messages, strict=True))
        kinds = {i: (self.weights[i].axis, parts[i].dtype) for i in single}
        for kind in dict.fromkeys(kinds.values()):
            ours = [i for i in single if kinds[i] == kind]
            rows = start_all_gathers([parts[i] for i in ours], mesh, kind[0])
            self._coming |= dict(zip(ours, rows, strict=True))

    def take(self) -> list[Tensor]:
        """Wait for the all-gather. Return what has arrived, see ``GatheredWeight.arrived``."""
        if self._whole is not None:
            return self._whole
        self.start()
        coming, self._coming = self._coming, None
        assert coming is not None
        return [
            w.arrived(wait(coming[i])) if i in coming else w.gather()
            for i, w in enumerate(self.weights)
        ]

    def gathered(self, tree: Any) -> Any:
        """Return the tree with gathered weights, and start the all-gather of the next unit."""
        self.start()
        if self.next is not None:
            self.next.start()
        if not self.weights:
            return tree
        arrived, leaves = self.take(), flat(tree)
        if self.kept:
            self._whole = arrived
            if self.before is not None:
                self.before.start()
        whole = _Gather.apply(self, arrived, *(w.weight.local for w in self.weights))
        self._places = {storage_id(x): i for i, x in enumerate(arrived)}
        for w, x, carrier in zip(self.weights, arrived, whole, strict=True):
            leaves[w.index] = w.gathered(x, carrier, self)
        return unflatten(tree, leaves)

    def pack(self, x: Tensor) -> Any:
        """Save a tensor for backward."""
        index = self._places.get(storage_id(x))
        if index is None:
            return x
        return Handle(index, x.size(), x.stride(), int(x.storage_offset()))

    def unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, Handle):
            return saved
        if not self._in_backward:
            self._in_backward = True
            if self.next is not None:
                self.next.release_frozen()
            self.start()
            if self.before is not None:
                self.before.start()
            self._whole = self.take()
        assert self._whole is not None
        return self._whole[saved.weight].as_strided(saved.size, saved.stride, saved.offset)

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Send the gradients of whole weights, and return the gradients of shards. Some of these
        are written by ``Prefetch.finish``."""
        if self._coming is not None:  # backward has read no weight of this unit
            self.take()
        self._whole, self._in_backward = None, False
        sent: list[Any] = []
        results: list[Tensor | None] = []
        for w, g in zip(self.weights, grads, strict=True):
            message = None if g is None else w.start_reduce(g)
            if message is not None:
                sent.append((w, *message))
                results.append(message[0])
            else:
                results.append(None if g is None else w.reduced(g))

        def finish() -> None:
            tensors: list[Tensor] = []
            for _, total, own, rows in sent:
                tensors += [total, wait(rows), *([] if own is None else [own])]
            dtypes = [None if own is None else w.reduce for w, _, own, _ in sent]
            self.prefetch.sum_rows(tensors, dtypes)

        self.prefetch.send(finish)
        if self.alone:
            self.prefetch.finish()
        return results


class _Gather(torch.autograd.Function):
    """Whole weights, as functions of this rank's shards; in backward, the gradients of the
    shards."""

    @staticmethod
    def forward(
        ctx: Any, unit: UnitWeights, arrived: list[Tensor], *shards: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        whole = [w.carrier(x) for w, x in zip(unit.weights, arrived, strict=True)]
        pairs = zip(whole, unit.weights, strict=True)
        ctx.mark_non_differentiable(*(x for x, w in pairs if not w.weight.local.requires_grad))
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.unit.backward(grads)


def pack(parts: Sequence[Tensor]) -> tuple[list[Tensor], None]:
    """Pack shards for all-gathers in 8 bits."""
    return [packed(part) for part in parts], None


def sum_rows(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]
) -> tuple[list[Tensor], None]:
    """Write the sums of the rows of gradients that have arrived.

    ``tensors``: for each gradient, the result, the rows of all other ranks, and this rank's own
        row; or the result and the sum itself.
    ``dtypes``: for each gradient, the dtype of the sum; None: the sum has arrived."""
    left = iter(tensors)
    for dtype in dtypes:
        total, rows = next(left), next(left)
        arrived = rows.view_as(total) if dtype is None else row_sum(next(left), rows, dtype)
        total.copy_(arrived)
    return [], None
