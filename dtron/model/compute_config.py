"""The compute config: the way in which a model is computed. A ``ModelConfig`` defines the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from dtron.errors import UserError
from dtron.fp8.recipe import MIN_WEIGHTS, Recipe
from dtron.fp8.recipes import RECIPES
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.activation_checkpoint import ActivationPolicy, policy_for
from dtron.moe.dispatch import Dispatch
from dtron.params import Fp8GatherRule

if TYPE_CHECKING:  # a type checker does not know the names of a table
    Fp8: TypeAlias = str
else:
    Fp8 = Literal["none", *RECIPES]


@dataclass(frozen=True)
class ComputeConfig:
    """Settings that may differ between two runs of one model without changing the result beyond
    rounding: recompute in backward, the attention kernels, the method over cp, FP8 matmuls, the
    dispatcher of tokens to experts, and whether training measures the largest attention logit of
    each head. The flags of a run set them."""

    recompute: str = "none"
    recompute_budget: float | None = None
    attention_kernel: AttentionPath = "auto"
    fp8: Fp8 = "none"
    fp8_first_last: bool = False
    fp8_min_weights: int = MIN_WEIGHTS
    fp8_gather: bool = False
    cp_method: Method = "ring"
    moe_dispatch: Dispatch = "auto"
    attention_logits: bool = False

    def __post_init__(self) -> None:
        if self.fp8_min_weights < 0:
            raise UserError(
                f"--fp8-min-weights {self.fp8_min_weights}: a size; use "
                f"--fp8-min-weights {MIN_WEIGHTS}"
            )
        if self.fp8_gather and self.fp8 == "none":
            raise UserError(
                "--fp8-gather: of weights for products in FP8; use --fp8 tensorwise too"
            )
        if self.fp8_gather and not RECIPES[self.fp8].fp8_gather:
            raise UserError(
                f"--fp8-gather --fp8 {self.fp8}: this recipe does not round weights to FP8 under "
                "powers of two, so they cannot be gathered in 8 bits; drop --fp8-gather"
            )
        policy_for(self.recompute, self.recompute_budget)  # raises UserError if invalid

    @property
    def policy(self) -> ActivationPolicy:
        """The activation policy of the blocks."""
        return policy_for(self.recompute, self.recompute_budget)

    def recipe(self, end: bool) -> Recipe | None:
        """Return the recipe for the matmuls of a block, or None.

        ``end``: whether the block is the first or the last of the model."""
        if self.fp8 == "none" or (end and not self.fp8_first_last):
            return None
        return replace(RECIPES[self.fp8], min_weights=self.fp8_min_weights)

    def fp8_gather_rule(self, end: bool, tokens: float) -> Fp8GatherRule | None:
        """Return the rule that selects the weights of a block to all-gather in 8 bits, or None.

        ``end``: whether the block is the first or the last of the model.
        ``tokens``: the number of a rank's tokens."""
        recipe = self.recipe(end) if self.fp8_gather else None
        return None if recipe is None else partial(recipe.takes, tokens=tokens)


PLAIN = ComputeConfig()
