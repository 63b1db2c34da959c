"""Matmuls in 8 bits. Layers call matmul.py. recipe.py defines a recipe, and recipes.py lists the
recipes."""
