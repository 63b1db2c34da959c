"""The FP8 recipes, by the names that ``--fp8`` takes.

``tensorwise``: one scale per tensor; gradients in e5m2, everything else in e4m3.
``rowwise``: one scale per row of the left operand and per column of the right operand, all in
    e4m3.
``rowwise_with_gw_hp``: ``rowwise``, with the weight's gradient in high precision.
``blockwise``: one scale per 128 values of a row or column of an activation or gradient, and per
    128 x 128 block of a weight."""

from __future__ import annotations

from dtron.fp8.blockwise import Blockwise
from dtron.fp8.recipe import Recipe
from dtron.fp8.torchao_recipe import TorchaoRecipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        TorchaoRecipe("tensorwise"),
        TorchaoRecipe("rowwise"),
        TorchaoRecipe("rowwise_with_gw_hp"),
        Blockwise("blockwise"),
    )
}
