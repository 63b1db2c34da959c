"""The compute config: how a model is computed. A ``ModelConfig`` defines the model itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dtron.errors import UserError
from dtron.fp8.recipe import MIN_WEIGHTS, Recipe
from dtron.fp8.recipes import RECIPES
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.activation_checkpoint import POLICIES, ActivationPolicy, policy_for
from dtron.moe.dispatch import Dispatch
from dtron.params import Fp8GatherRule

Fp8 = Literal["none", *RECIPES]
Recompute = Literal[*POLICIES, "budget"]


@dataclass(frozen=True)
class ComputeConfig:
    """Settings that may differ between two runs of one model without changing the result beyond
    rounding. They are flags of the run:

    - which activations are recomputed in backward,
    - which attention kernels are used, and which method over cp,
    - which matmuls are in FP8,
    - how tokens are dispatched to experts."""

    recompute: Recompute = "none"
    recompute_budget: float | None = None
    attention_kernel: AttentionPath = "auto"
    fp8: Fp8 = "none"
    fp8_first_last: bool = False
    fp8_min_weights: int = MIN_WEIGHTS
    fp8_gather: bool = False
    cp_method: Method = "ring"
    moe_dispatch: Dispatch = "auto"

    def __post_init__(self) -> None:
        if self.fp8_min_weights < 0:
            raise UserError(
                f"--fp8-min-weights {self.fp8_min_weights}: a size; use --fp8-min-weights {MIN_WEIGHTS}"
            )
        if self.fp8_gather and self.fp8 == "none":
            raise UserError(
                "--fp8-gather: of weights for products in FP8; use --fp8 tensorwise too"
            )
        if self.fp8_gather and not RECIPES[self.fp8].fp8_gather:
            raise UserError(
                f"--fp8-gather --fp8 {self.fp8}: this recipe does not round weights to FP8 under powers "
                "of two, so they cannot be gathered in 8 bits; drop --fp8-gather"
            )
        policy_for(self.recompute, self.recompute_budget)  # raises UserError if invalid

    @property
    def policy(self) -> ActivationPolicy:
        """What blocks keep for backward."""
        return policy_for(self.recompute, self.recompute_budget)

    def recipe(self, end: bool) -> Recipe | None:
        """For the products of a block; ``end``: the first or the last."""
        if self.fp8 == "none" or (end and not self.fp8_first_last):
            return None
        return replace(RECIPES[self.fp8], min_weights=self.fp8_min_weights)

    def narrow(self, end: bool, tokens: float) -> Fp8GatherRule | None:
        """Which weights of a block are gathered in FP8; ``tokens``: of a rank."""
        recipe = self.recipe(end) if self.fp8_gather else None
        return None if recipe is None else partial(recipe.takes, tokens=tokens)


PLAIN = ComputeConfig()
