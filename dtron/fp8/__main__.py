"""``python -m dtron.fp8``: measure the error of each recipe. On a CPU, in seconds."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dtron.fp8.matmul import matmul
from dtron.fp8.recipes import RECIPES
from dtron.runtime.exit import Parser, run_cli


def products(
    fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, g: Tensor
) -> list[Tensor]:
    """Return ``fn(x, w)`` and the gradients of x and w.

    ``g``: the gradient of the result."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = fn(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of ``want``."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def table(size: int = 1024) -> list[str]:
    """Return rows in Markdown: the errors of matmuls of normal values in bfloat16, against float64.
    The last column has the error of the other rows when one row of x is a million times as large.

    ``size``: rows and columns of the matrices."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(size, size, generator=generator).bfloat16() for _ in range(3))
    want = products(torch.matmul, x.double(), w.double(), g.double())
    with_huge_row = x.clone()
    with_huge_row[0] *= 2**20
    rows = [
        "| products in | y | gradient of x | gradient of w | y, beside a huge row |",
        "|---|---|---|---|---|",
    ]
    recipes = {name: replace(recipe, min_weights=0) for name, recipe in RECIPES.items()}
    for name, recipe in {"bfloat16": None, **recipes}.items():
        fn = partial(matmul, recipe=recipe)
        errors = [error(a, b) for a, b in zip(products(fn, x, w, g), want, strict=True)]
        errors.append(error(fn(with_huge_row, w)[1:], want[0][1:]))
        cells = " | ".join(f"{e:.2g}" for e in errors)
        rows.append(f"| {name} | {cells} |")
    return rows


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m dtron.fp8", description="Measure the error of each FP8 recipe.")
    parser.parse_args(argv)
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
