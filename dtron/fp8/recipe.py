"""FP8 recipes: their interface, and the smallest matmul that is computed in FP8.

A recipe is one object. The three matmuls of a layer (forward, backward to the input and backward
to the weight) are written once for all recipes, in autograd.py. A recipe defines how each of their
operands is cast, and which kernel multiplies the cast operands. recipes.py lists the recipes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

# Smallest number of weights in one matmul on one rank. A cast reads its operand once; a matmul uses
# it once per row of the other operand. So only a large matmul gains more than its casts cost. In
# docs/performance.md, at 8192 tokens, matmuls from 4096 x 4096 up are 1.1 to 1.6 times as fast in
# FP8; smaller matmuls are mostly slower.
MIN_WEIGHTS = 2**24

# An operand's role, by torchao's names. Two operands for each matmul: forward, backward to the
# input, backward to the weight.
Role = Literal[
    "input",
    "weight",
    "grad_output",
    "weight_for_grad_input",
    "input_for_grad_weight",
    "grad_output_for_grad_weight",
]


@dataclass(frozen=True)
class Recipe(ABC):
    """A scaling recipe, and the smallest size of weight that it is used for.

    ``name``: the recipe's key in ``RECIPES``, which is the value of ``--fp8``. Compiled code finds
        the recipe by this name.
    ``min_weights``: the smallest number of weights in a matmul that is converted.

    A subclass defines ``cast``, ``mm`` and ``grouped_mm``. It overrides these attributes where its
    kernels differ:

    ``multiple``: the number that a matmul's sizes must be multiples of.
    ``capability``: the least compute capability of a GPU that has the kernels. A CPU emulates them.
    ``compile_options``: options for ``torch.compile`` with the inductor backend. By default,
        inductor must round to bfloat16 where eager does. A scale is computed from the rounded
        values, and larger unrounded values would exceed the FP8 range.
    ``fp8_gather``: whether weights may be all-gathered in 8 bits. They may if the recipe casts
        weights to e4m3 under scales that are powers of two (distributed/fp8_all_gather.py)."""

    name: str
    min_weights: int = MIN_WEIGHTS

    multiple: ClassVar[int] = 16
    capability: ClassVar[tuple[int, int]] = (8, 9)
    compile_options: ClassVar[Mapping[str, Any]] = {"emulate_precision_casts": True}
    fp8_gather: ClassVar[bool] = False

    def load(self) -> None:  # noqa: B027  (a recipe may need nothing)
        """Import the package that the recipe needs. It is called before a recipe is used. Raises
        UserError if the package is missing."""

    @abstractmethod
    def cast(self, x: Tensor, dim: int, role: Role) -> Any:
        """Cast one operand of a matmul and return it in the form that ``mm`` takes.

        ``x``: ``[M, K]`` with ``dim=1``, or ``[K, N]`` with ``dim=0``.
        ``dim``: the contracted dim. The kernels of a recipe decide how far a scale may vary along
            it: not at all, or from block to block.
        ``role``: which operand of which matmul ``x`` is."""

    @abstractmethod
    def mm(self, a: Any, b: Any, dtype: Any) -> Tensor:
        """Multiply two cast operands, ``[M, K]`` by ``[K, N]``.

        ``dtype``: the dtype of the result."""

    @abstractmethod
    def grouped_mm(self, x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply ``x [R, K]``, sorted by expert, by ``w [E, K, N]`` -> ``[R, N]``.

        The operands are not cast yet: a kernel for experts may need other scales than ``mm``. The
        gradient of the experts' weights is another matmul, which stays in high precision.

        ``ends_E``: int32. The rows of expert e end before ``ends_E[e]``. Output rows after the last
            end are undefined."""

    def converts(self, tokens: float, inner: float, outer: float) -> bool:
        """Return whether ``[tokens, inner] @ [inner, outer]`` is computed in FP8. Sizes are the
        sizes on one rank. A size that the mesh does not divide is a fraction, and so a multiple of
        no number.

        The kernels need multiples of 16 in the contracted and in the last dim, and blocks must be
        whole. Over the three matmuls of forward and backward each size is one of these two dims.
        The CPU needs no multiples, but the choice should not depend on the device. With 0 tokens
        there is no largest value to compute a scale from."""
        fits = all(size % self.multiple == 0 for size in (tokens, inner, outer))
        return tokens > 0 and inner * outer >= self.min_weights and fits

    def takes(self, w: Any, shape: Sequence[float], tokens: float) -> bool:
        """Return whether a block's matmuls with the declared weight ``w`` are computed in FP8.

        ``shape``: the shape of one rank's shard of the weight.
        ``tokens``: the tokens of one rank. For experts it is ignored: their matmuls may have any
            number of rows."""
        if w.axes[0] == "experts":
            shape, tokens = shape[1:], self.multiple
        sizes = math.prod(shape[: w.summed]), math.prod(shape[w.summed :])
        return w.summed > 0 and self.converts(tokens, *sizes)
