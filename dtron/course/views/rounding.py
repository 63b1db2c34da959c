"""A picture of rounding: the error of a sum against the number of mantissa bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtron.tools.charts import Scale
from dtron.tools.drawing import FAINT, Canvas

FORMATS = {7: "bfloat16", 10: "float16", 23: "float32", 3: "e4m3"}
BITS = range(3, 24)


def rounded(x: Tensor, mantissa_bits: int) -> Tensor:
    """Round float64 numbers to the nearest with so many mantissa bits, ties to even. The exponent
    is not bounded."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent - mantissa_bits)
    return (x / step).round() * step


def sum_error(terms: int, mantissa_bits: int) -> float:
    """Return the error of a sum of numbers between 0 and 1, one after the other, as a share of the
    sum. Every sum is rounded, and no number is."""
    generator = torch.Generator().manual_seed(0)
    x_N = torch.rand(terms, generator=generator).double()
    total = torch.zeros((), dtype=torch.float64)
    for x in x_N:
        total = rounded(total + x, mantissa_bits)
    return float((total - x_N.sum()).abs() / x_N.sum())


def rounding(mantissa_bits: int = 7, terms: int = 256) -> str:
    """Draw the error of a sum, as a share, against the mantissa bits, below its bound."""
    canvas = Canvas(900)
    canvas.text(20, 24, f"The error of a sum of {terms} numbers", bold=True, size=14)
    across, down = Scale(BITS[-1], 90, 680), Scale(9, 50, 240)

    def height(share: float) -> float:
        return down(min(9.0, max(0.0, -math.log10(max(share, 1e-9)))))

    for power in range(0, 10, 3):
        canvas.line([(90, down(power)), (790, down(power))], "#ddd")
        canvas.text(84, down(power) + 4, f"1e-{power}", anchor="end", colour=FAINT, size=11)
    bound = [(across(b), height((terms - 1) * 2.0 ** -(b + 1))) for b in BITS]
    canvas.line(bound, "#d05050", dashed=True)
    for b in BITS:
        mine = b == mantissa_bits
        x, y = across(b), height(error := sum_error(terms, b))
        canvas.rect(x - 4, y - 4, 8, 8, "#d0a050" if mine else "#4a8fd0")
        canvas.text(x, 310, str(b), anchor="middle", bold=mine, size=11)
        if b in FORMATS:
            canvas.text(x, 326, FORMATS[b], anchor="middle", size=11, colour=FAINT)
        if mine:
            said = f"{mantissa_bits} bits: the error is {error:.1e}"
    canvas.text(20, 350, f"{said}, and the bound {(terms - 1) * 2.0 ** -(mantissa_bits + 1):.1e}")
    canvas.text(20, 370, "dashed: the bound (n - 1) u; an error below 1e-9 is drawn at 1e-9")
    return canvas.svg()
