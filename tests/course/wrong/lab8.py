"""Wrong solutions of lab 8."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        8,
        "a whole last bit",
        "float64 (52 mantissa bits): a rounding to nearest is wrong by a share of at most",
        ("return 2.0 ** -(mantissa_bits + 1)", "return 2.0**-mantissa_bits"),
        ("(terms - 1) * unit", "(terms - 1) / 2 * unit"),
        ("* unit_roundoff(3)", "* 2.0**-4"),
    ),
    mistake(
        8,
        "the sum stalls without the leading bit",
        "float64: a sum of ones stays at",
        ("return 2.0 ** (mantissa_bits + 1)", "return 2.0**mantissa_bits"),
    ),
    mistake(
        8,
        "every term is rounded",
        "a sum of 4096 numbers with 52 mantissa bits: the bound is",
        ("(terms - 1) * unit", "terms * unit"),
    ),
    mistake(
        8,
        "a sum in float32 for every dtype",
        "300 ones, summed in torch.bfloat16: 256, and yours is 300",
        ("torch.zeros((), dtype=dtype)", "torch.zeros(())"),
        ("x.to(dtype)", "x.float()"),
    ),
    mistake(
        8,
        "a mean in bfloat16",
        "mean_over_ranks: the mean over 8 ranks is wrong by a share of",
        ("sum(g.float() for g in grads)", "sum(grads)"),
    ),
    mistake(
        8,
        "each rank divides before the sum",
        "mean_over_ranks, other sizes: the mean over 5 ranks is wrong by a share of",
        ("sum(g.float() for g in grads)", "sum((g / len(grads)).float() for g in grads)"),
        ("(total / len(grads)).bfloat16()", "total.bfloat16()"),
    ),
    mistake(
        8,
        "the mean stays in float32",
        "mean_over_ranks: the mean over 2 ranks is in torch.float32, not in torch.bfloat16",
        ("(total / len(grads)).bfloat16()", "total / len(grads)"),
    ),
    mistake(
        8,
        "random bits, and then rounding to nearest",
        "stochastic: 1 is between 1 and 1, and yours are others too",
        ("return (bits >> 16 << 16).view(", "return bits.view("),
    ),
    mistake(
        8,
        "truncation",
        "stochastic: 1.006: the mean over all random numbers is off by -6.0e-03 of it",
        ("x.view(torch.int32) + random", "x.view(torch.int32)"),
    ),
    mistake(
        8,
        "rounding to nearest",
        "stochastic: 1.006: the mean over all random numbers is off by +1.8e-03 of it",
        ("return (bits >> 16 << 16).view(torch.float32).bfloat16()", "return x.bfloat16()"),
    ),
    mistake(
        8,
        "15 random bits",
        "stochastic: 1.006: the mean over all random numbers is off by -1.8e-03",
        ("x.view(torch.int32) + random", "x.view(torch.int32) + random // 2"),
    ),
    mistake(
        8,
        "numbers below 2^-6 keep their bits",
        "cast, midpoints: 0.000976562 becomes 0 in e4m3, and yours is 0.000976562",
        ("exponent.clamp(min=-5)", "exponent"),
    ),
    mistake(
        8,
        "ties go up",
        "cast, midpoints: 0.000976562 becomes 0 in e4m3, and yours is 0.00195312",
        ("(x / step).round()", "(x / step + 0.5).floor()"),
    ),
    mistake(
        8,
        "one bit too many",
        "cast: cast, 500 numbers:",
        ("exponent - 4)", "exponent - 5)"),
    ),
    mistake(
        8,
        "nothing ends at 448",
        "cast, the ends: 470 becomes 448 in e4m3, and yours is 480",
        ("    x = x.clamp(-448, 448)\n", ""),
    ),
    mistake(
        8,
        "a scale of zeros is infinite",
        "scale over dim 1: it is not finite; a row of zeros has the scale 1",
        ("torch.where(most == 0, 1.0, 448 / most)", "448 / most"),
    ),
    mistake(
        8,
        "one scale for all rows",
        "product: normal numbers: row 3, ",
        (
            "scale_a, scale_b = scale(a_MK, 1), scale(b_KN, 0)",
            "scale_a, scale_b = scale(a_MK.view(1, -1), 1), scale(b_KN, 0)",
        ),
    ),
    mistake(
        8,
        "scales are not taken out",
        "product: normal numbers: row 5, ",
        (" / (scale_a * scale_b)", ""),
    ),
    mistake(
        8,
        "the bound has the error of one operand",
        "bound: numbers between two of e4m3: an error of",
        ("a_MK.abs() @ error_b + error_a @ b_KN.abs() + error_a @ error_b", "error_a @ b_KN.abs()"),
    ),
    mistake(
        8,
        "a bound without the numbers near zero",
        "bound: numbers near zero: an error of",
        ("torch.maximum(x.abs() * unit_roundoff(3), 2.0**-10 / scale(x, dim))", "x.abs() / 16"),
    ),
    mistake(
        8,
        "a bound from the last bit",
        "bound: normal numbers: your bound is",
        ("x.abs() * unit_roundoff(3)", "x.abs() / 4"),
    ),
    mistake(
        8,
        "a test without poison",
        "check_means: your test catches 2 of 6 mutants",
        ("with poisoned_memory():", "if True:"),
    ),
    mistake(
        8,
        "a test of values alone",
        "check_means: your test catches 4 of 6 mutants",
        (
            "        torch.testing.assert_close(dx_TD[own], (g_ED[e] / n).expand(own.sum(), 2))\n",
            "",
        ),
    ),
    mistake(
        8,
        "a test where every expert has tokens",
        "check_means: your test catches 5 of 6 mutants",
        ("[0, 2, 2, 0, 2, 4, 0]", "[0, 2, 1, 0, 2, 4, 3]"),
    ),
    mistake(
        8,
        "a test that wants no mean for no tokens",
        "check_means: your test fails on a solution that is right",
        ("x_TD[own].sum(0) / n)", "x_TD[own].mean(0))"),
    ),
]
