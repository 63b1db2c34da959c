"""How products are scaled for FP8, and which products are worth it: one rule, in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scaling = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]

BLOCK = 128  # values that share a scale, blockwise

# Weights in one product on one rank. A cast reads its operand once, a product works on it as often
# as the other has rows: only a large product earns its casts. Of those in docs/performance.md, at
# 8192 tokens, the ones from 4096 x 4096 up are 1.1 to 1.6 times as fast in FP8, the smaller ones
# mostly slower.
SMALLEST = 2**24


@dataclass(frozen=True)
class Recipe:
    """``tensorwise``: one scale for a tensor; gradients in e5m2, all else in e4m3. ``rowwise``: one scale for
    each row of the left and column of the right operand, all in e4m3. ``rowwise_with_gw_hp``: the same with
    the weight's gradient left in high precision. ``blockwise``: a scale for each 128 of a row or column of an
    activation or gradient, and for each 128 x 128 of a weight."""

    name: Scaling
    smallest: int = SMALLEST

    def converts(self, tokens: float, inner: float, outer: float) -> bool:
        """Whether ``[tokens, inner] @ [inner, outer]`` is made in FP8. Sizes are those of one rank;
        one that the mesh does not divide is a fraction, and so no multiple of anything.

        The kernels want multiples of 16 in the contracted and in the last dim, and blocks are
        whole; over the three products of forward and backward each size is one of the two. The CPU
        does not, but what is converted should not depend on the device. No tokens have no largest
        value to scale by."""
        fits = all(size % self.multiple == 0 for size in (tokens, inner, outer))
        return tokens > 0 and inner * outer >= self.smallest and fits

    def takes(self, w: Any, shape: Sequence[float], tokens: float) -> bool:
        """Whether products with a declared weight, of which a rank has a part of this shape, are
        made in FP8 in a block. Of tokens a rank has that many, but experts have any number."""
        if w.axes[0] == "experts":
            shape, tokens = shape[1:], self.multiple
        sizes = math.prod(shape[: w.summed]), math.prod(shape[w.summed :])
        return w.summed > 0 and self.converts(tokens, *sizes)

    @property
    def multiple(self) -> int:
        """Of what sizes must be multiples."""
        return BLOCK if self.name == "blockwise" else 16
