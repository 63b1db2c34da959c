"""Comparison of two optimizer steps: exact in float64, and within rounding in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtron.tools.count_collectives import CollectiveCounter
from dtron.tree import flat, leaves

TOLERANCE = 1e-9
NORM = "the gradient norm"

Errors = dict[str, float]  # by the path of the weight


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as whole tensors.

    ``initial``: the weights before the step; None on a mesh."""

    loss: float
    norm: float
    grads: Any
    params: Any
    state: dict[str, Any]
    collectives: CollectiveCounter | None
    initial: Any = None

    @property
    def finite(self) -> bool:
        """Whether the loss, the gradient norm and every gradient are finite."""
        grads = all(bool(g.isfinite().all()) for g in flat(self.grads))
        return math.isfinite(self.loss) and math.isfinite(self.norm) and grads

    @property
    def first_nonfinite(self) -> str:
        """Say which value is not finite: the first gradient, or else the loss or the norm."""
        paths = [path for path, g in leaves(self.grads) if not g.isfinite().all()]
        if paths:
            return f"the gradient of {paths[0]} is the first"
        return "the loss" if not math.isfinite(self.loss) else NORM


@dataclass(frozen=True)
class Difference:
    """Relative errors of one weight: largest difference over largest value."""

    path: str
    grad: float
    weight: float
    state: float = 0.0
    """largest error of the optimizer's state trees"""

    def within(self, tolerance: float) -> bool:
        """Whether all errors are within the tolerance; NaN is not."""
        return self.grad <= tolerance and self.weight <= tolerance and self.state <= tolerance

    @property
    def same(self) -> bool:
        """Whether all errors are within TOLERANCE."""
        return self.within(TOLERANCE)


def different_bits(a: StepResult, b: StepResult) -> str | None:
    """Return the first value whose bits differ between two steps; None: all bits are the same."""
    for name, x, y in (("the loss", a.loss, b.loss), (NORM, a.norm, b.norm)):
        if x != y:
            return name
    trees = {"the gradient of ": (a.grads, b.grads), "": (a.params, b.params)}
    trees |= {f"the state {name} of ": (a.state[name], b.state[name]) for name in a.state}
    for what, (one, other) in trees.items():
        for (path, x), y in zip(leaves(one), flat(other), strict=True):
            if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (x, y))):
                return f"{what}{path}"
    return None


def compare(want: StepResult, got: StepResult) -> tuple[float, list[Difference]]:
    """Return ``(relative error of the loss, errors of every weight, and last of the gradient
    norm)``. Some weights have zero gradient except for rounding (a key's bias: softmax ignores
    it). The error of such a weight is relative to a small part of the largest gradient, weight or
    state."""
    grads = _errors(want.grads, got.grads, 1e-6)
    weights = _errors(want.params, got.params, 1e-2)
    states = [_errors(want.state[name], got.state[name], 1e-6) for name in want.state]
    norm = abs(got.norm - want.norm) / abs(want.norm)
    return abs(got.loss - want.loss) / abs(want.loss), _table(grads, weights, states, norm)


def _table(
    grads: Errors, weights: Errors, states: Sequence[Errors], norm: float
) -> list[Difference]:
    """Return a row for each weight, and last a row for the gradient norm. A state may lack
    weights."""
    rows = [
        Difference(path, grads[path], weights[path], _worst(s[path] for s in states if path in s))
        for path in grads
    ]
    return [*rows, Difference(NORM, norm, 0.0)]


def compare_rounded(
    want: StepResult, one: StepResult, got: StepResult
) -> tuple[float, list[Difference]]:
    """Compare a step in few bits with one device's step in the same bits, by the distances of both
    from the step in float64. Return the loss's error and a row for each weight, as ``compare``
    does.

    An error is 1 where the mesh is ``ROUNDINGS`` times as far from float64 as one device is; so
    more than 1 is no rounding. Distances are Euclidean norms over a weight. ``FLOOR`` of the
    weight's norm, or of the largest weight's where a weight has rounding only, counts as rounding
    too; twice that in a state. A state may be a square of gradients, so twice the relative rounding
    of the weight's gradient counts there. So does a quarter of the step's change of a weight, and a
    change of sign of each number whose gradient is no larger than its rounding: Adam's first step
    moves each number by the learning rate, and rounding decides the sign of a
    small gradient."""
    grads = _rounded(want.grads, one.grads, got.grads)
    of_grads = _relative_rounding(want.grads, one.grads)
    states = []
    for name, tree in want.state.items():
        squares = {
            path: 2 * of_grads.get(path, 0.0) * x.double().norm().item() for path, x in leaves(tree)
        }
        states.append(_rounded(tree, one.state[name], got.state[name], squares, share=2))
    before = {} if want.initial is None else dict(leaves(want.initial))
    small = _share_of_small(want.grads, one.grads)
    signs = {
        path: (x - before[path]).norm().item() * max(0.25, 2 * small.get(path, 0.0) ** 0.5)
        for path, x in leaves(want.params)
        if before
    }
    weights = _rounded(want.params, one.params, got.params, signs)

    def excess(name: str) -> float:
        three = [torch.tensor([getattr(r, name)]).double() for r in (want, one, got)]
        return _excess(three[0], three[1], three[2])

    loss, norm = excess("loss"), excess("norm")
    return loss, _table(grads, weights, states, norm)


ROUNDINGS, FLOOR = 4.0, 2**-6


def _share_of_small(want: Any, one: Any) -> dict[str, float]:
    """Return for each gradient the share of its numbers whose sign is up to rounding."""
    ones, shares = dict(leaves(one)), {}
    for path, g in leaves(want):
        error = ROUNDINGS * (ones[path].double() - g).abs().max() + FLOOR * g.abs().max()
        shares[path] = (g.abs() <= error).double().mean().item()
    return shares


def _relative_rounding(want: Any, one: Any) -> dict[str, float]:
    """Return how far rounding may move each gradient, as a share of its norm."""
    ones = dict(leaves(one))
    return {
        path: ROUNDINGS * ((ones[path].double() - g).norm() / g.double().norm()).nan_to_num().item()
        for path, g in leaves(want)
    }


def _rounded(
    want: Any, one: Any, got: Any, more: Mapping[str, float] | None = None, share: float = 1.0
) -> Errors:
    """``share``: multiplies ``FLOOR``."""
    ones, found, more = dict(leaves(one)), dict(leaves(got)), more or {}
    floor = 1e-3 * max((x.double().norm().item() for x in flat(want)), default=0.0)
    return {
        path: _excess(x, ones[path], found[path], floor, more.get(path, 0.0), share)
        for path, x in leaves(want)
    }


def _excess(
    want: Tensor,
    one: Tensor,
    got: Tensor,
    floor: float = 0.0,
    more: float = 0.0,
    share: float = 1.0,
) -> float:
    rounding = share * FLOOR * want.double().norm().clamp(floor)
    allowed = ROUNDINGS * (one.double() - want).norm() + rounding + more
    if not allowed:
        return float((got != want).any())
    return ((got.double() - want).norm() / allowed).item()


def _errors(want: Any, got: Any, share: float) -> Errors:
    """Return the error of every leaf by path.

    ``share``: the part of the largest value that errors are relative to, at least."""
    found = dict(leaves(got))
    floor = share * max((x.abs().max().item() for x in flat(want)), default=0.0)
    return {path: relative_error(found[path], x, floor) for path, x in leaves(want)}


def _worst(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if one is NaN."""
    return max(errors, key=lambda error: (error != error, error), default=0.0)


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Return the largest difference over the largest value, or over ``floor`` if it is larger."""
    if got.shape != want.shape:
        return float("inf")
    gap, scale = (got - want).abs().max().item(), max(want.abs().max().item(), floor)
    return gap / scale if scale else gap
