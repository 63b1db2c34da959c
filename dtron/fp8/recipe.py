"""FP8 recipes: how a matmul is scaled, and which matmuls are large enough for FP8. One rule, in
one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scaling = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]

BLOCK = 128  # values that share a scale, blockwise

# Smallest number of weights in one matmul on one rank. A cast reads its operand once; a matmul uses
# it once per row of the other operand. So only a large matmul gains more than its casts cost. In
# docs/performance.md, at 8192 tokens, matmuls from 4096 x 4096 up are 1.1 to 1.6 times as fast in
# FP8; smaller matmuls are mostly slower.
MIN_WEIGHTS = 2**24


@dataclass(frozen=True)
class Recipe:
    """A scaling recipe and the smallest size of weight that it is used for.

    ``tensorwise``: one scale per tensor; gradients in e5m2, everything else in e4m3.
    ``rowwise``: one scale per row of the left operand and per column of the right operand, all
        in e4m3.
    ``rowwise_with_gw_hp``: ``rowwise``, with the weight's gradient in high precision.
    ``blockwise``: one scale per 128 values of a row or column of an activation or gradient, and
        per 128 x 128 block of a weight."""

    name: Scaling
    min_weights: int = MIN_WEIGHTS

    def converts(self, tokens: float, inner: float, outer: float) -> bool:
        """Whether ``[tokens, inner] @ [inner, outer]`` is computed in FP8. Sizes are the sizes
        on one rank. If the mesh does not divide a size, it is a fraction, and so a multiple
        of nothing.

        The kernels need multiples of 16 in the contracted and in the last dim, and blocks must
        be whole. Over the three matmuls of forward and backward each size is one of these two
        dims. The CPU needs no multiples, but the choice should not depend on the device. With 0
        tokens there is no largest value to compute a scale from."""
        fits = all(size % self.multiple == 0 for size in (tokens, inner, outer))
        return tokens > 0 and inner * outer >= self.min_weights and fits

    def takes(self, w: Any, shape: Sequence[float], tokens: float) -> bool:
        """Whether a block's matmuls with the declared weight ``w`` are computed in FP8.

        ``shape``: the shape of one rank's shard of the weight.
        ``tokens``: the tokens of one rank. For experts it is ignored: their matmuls may have any
            number of rows."""
        if w.axes[0] == "experts":
            shape, tokens = shape[1:], self.multiple
        sizes = math.prod(shape[: w.summed]), math.prod(shape[w.summed :])
        return w.summed > 0 and self.converts(tokens, *sizes)

    @property
    def multiple(self) -> int:
        """The number that sizes must be multiples of."""
        return BLOCK if self.name == "blockwise" else 16
