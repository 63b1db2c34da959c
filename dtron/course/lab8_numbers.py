"""Lab 8: numbers. Sums, means and casts are compared with float64, bounds with the errors that they
bound, and the student's test of a layer with mutants that read unwritten memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer, caught
from dtron.course.lab8_means import MUTANTS, RIGHT

FORMATS = {"float64": 52, "float32": 23, "bfloat16": 7, "e4m3": 3}  # mantissa bits
LARGEST, UNIT, TINY = 448.0, 2.0**-4, 2.0**-10  # of e4m3; TINY: half of its smallest number
RANDOM = 1 << 16


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(generator=generator)


def rounding(module: ModuleType) -> None:
    """Compare the arithmetic of formats."""
    unit, stalls, bound = (answer(module, n) for n in ("unit_roundoff", "stalls_at", "sum_bound"))
    for name, bits in FORMATS.items():
        if (got := unit(bits)) != 2.0 ** -(bits + 1):
            raise Wrong(
                f"{name} ({bits} mantissa bits): a rounding to nearest is wrong by a share of at "
                f"most {2.0 ** -(bits + 1):g}, and you say {got:g}"
            )
    for name, bits in FORMATS.items():
        if (got := stalls(bits)) != 2.0 ** (bits + 1):
            raise Wrong(
                f"{name}: a sum of ones stays at {2.0 ** (bits + 1):g}, and you say {got:g}"
            )
    for terms, bits, total in ((4096, 52, 1.0), (4096, 7, 3.0), (2, 23, 10.0), (1, 7, 5.0)):
        want = (terms - 1) * 2.0 ** -(bits + 1) * total
        if abs((got := bound(terms, bits, total)) - want) > 1e-9 * want:
            raise Wrong(
                f"a sum of {terms} numbers with {bits} mantissa bits: the bound is {want:g}, and "
                f"you say {got:g}"
            )


def sums(seed: int) -> Callable[[ModuleType], None]:
    """Make a check of ``running_sum``, to the bit."""

    def check(module: ModuleType) -> None:
        running_sum = answer(module, "running_sum")
        for what, x_N in (
            ("300 ones", torch.ones(300)),
            ("64 normal numbers", normal(seed, 64)),
        ):
            x_N = x_N.bfloat16()
            for dtype in (torch.bfloat16, torch.float32):
                got, total = running_sum(x_N, dtype), torch.zeros((), dtype=dtype)
                for x in x_N:
                    total = total + x.to(dtype)
                _has(f"running_sum of {what}", got, torch.bfloat16, ())
                if got != (want := total.bfloat16()):
                    raise Wrong(f"{what}, summed in {dtype}: {want:g}, and yours is {got:g}")

    return check


def means(cases: Sequence[int]) -> Callable[[ModuleType], None]:
    """Make a check of ``mean_over_ranks`` on these numbers of ranks."""

    def check(module: ModuleType) -> None:
        mean_over_ranks = answer(module, "mean_over_ranks")
        for ranks in cases:
            grads = [*(1 + normal(ranks, ranks, 50) / 8).bfloat16()]
            got = mean_over_ranks(grads)
            _has(f"the mean over {ranks} ranks", got, torch.bfloat16, (50,))
            want = torch.stack(grads).double().mean(0)
            error = ((got.double() - want) / want).abs().max().item()
            if error > 2.0**-8 * 1.001:
                raise Wrong(
                    f"the mean over {ranks} ranks is wrong by a share of {error:.1e}; one rounding "
                    f"to bfloat16 at the end is wrong by at most {2.0**-8:.1e}"
                )

    return check


def stochastic(numbers: Sequence[float]) -> Callable[[ModuleType], None]:
    """Make a check of ``stochastic``: over all random numbers its mean is exact."""

    def check(module: ModuleType) -> None:
        rounded = answer(module, "stochastic")
        for number in numbers:
            x = torch.tensor(number)
            got = rounded(x.expand(RANDOM), torch.arange(RANDOM, dtype=torch.int32))
            _has("the result of stochastic", got, torch.bfloat16, (RANDOM,))
            low = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
            high = ((x.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
            if not ((got == low) | (got == high)).all():
                raise Wrong(f"{x:g} is between {low:g} and {high:g}, and yours are others too")
            bias = ((got.double().mean() - x.double()) / x.double()).item()
            if abs(bias) > 1e-12:
                raise Wrong(f"{x:g}: the mean over all random numbers is off by {bias:+.1e} of it")

    return check


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def casts(what: str, numbers: Tensor) -> Callable[[ModuleType], None]:
    """Make a check of ``cast`` on these numbers."""

    def check(module: ModuleType) -> None:
        got, want = answer(module, "cast")(numbers), _e4m3(numbers)
        _has("the result of cast", got, torch.float32, tuple(numbers.shape))
        if (wrong := got != want).any():
            x, g, w = (t[wrong][0].item() for t in (numbers, got, want))
            raise Wrong(f"cast, {what}: {x:g} becomes {w:g} in e4m3, and yours is {g:g}")

    return check


def _every_number() -> Tensor:
    """All numbers of e4m3 that are not negative, in order."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _midpoints() -> Tensor:
    numbers = _every_number()
    return (numbers[1:] + numbers[:-1]) / 2


def _scale(x: Tensor, dim: int) -> Tensor:
    most = x.abs().amax(dim, keepdim=True)
    return torch.where(most == 0, 1.0, LARGEST / most)


def scales(module: ModuleType) -> None:
    """Compare ``scale`` with the largest element of each row and column."""
    x = normal(0, 4, 5) * torch.tensor([1e-3, 1.0, 1e6, 0.0])[:, None]
    for dim in (1, 0):
        got, want = answer(module, "scale")(x, dim), _scale(x, dim)
        what = f"scale over dim {dim}"
        _has(what, got, torch.float32, tuple(want.shape))
        if not got.isfinite().all():
            raise Wrong(f"{what}: it is not finite; a row of zeros has the scale 1")
        if ((got - want).abs() > 1e-5 * want).any():
            raise Wrong(
                f"{what}: {want.flatten()[0]:g} is first, and yours is {got.flatten()[0]:g}"
            )


def operands() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of matrices: with errors that cancel, errors of one sign, and numbers near zero."""
    huge = normal(1, 6, 32)
    huge[2] *= 1e6
    one = torch.ones(1)

    def row(middle: float, first: float, last: float) -> Tensor:
        return torch.cat([one * first, one.expand(8) * middle, one * last])

    half = row(67.9, LARGEST, 0)[None], row(67.9, 0, LARGEST)[:, None]
    tiny = row(9e-4, LARGEST, 0)[None], row(100, 0, LARGEST)[:, None]
    return {
        "normal numbers": (huge, normal(2, 32, 5)),
        "numbers between two of e4m3": half,
        "numbers near zero": tiny,
    }


def products(module: ModuleType) -> None:
    """Compare ``product`` with the product of casted matrices in float64."""
    product = answer(module, "product")
    for what, (a, b) in operands().items():
        sa, sb = _scale(a, 1), _scale(b, 0)
        want = (_e4m3(a * sa).double() @ _e4m3(b * sb).double()) / (sa * sb).double()
        got = product(a, b)
        _has("the product", got, torch.float32, tuple(want.shape))
        size = a.abs().double() @ b.abs().double()
        error = (got - want).abs() / size
        if (worst := error.max().item()) > 1e-5:
            i, j = divmod(int(error.argmax()), error.shape[1])
            raise Wrong(f"{what}: row {i}, column {j}: the product is wrong by {worst:.1e} of it")


def bounds(module: ModuleType) -> None:
    """Require that the error of a right product is below ``bound``, and the bound is not loose."""
    bound = answer(module, "bound")
    for what, (a, b) in operands().items():
        sa, sb = _scale(a, 1), _scale(b, 0)
        product = (_e4m3(a * sa) @ _e4m3(b * sb)) / (sa * sb)
        error = (product.double() - a.double() @ b.double()).abs()
        got, ea, eb = bound(a, b), _most(a, sa), _most(b, sb)
        _has("the bound", got, torch.float32, tuple(error.shape))
        if (over := error > got).any():
            raise Wrong(
                f"{what}: an error of {error[over][0]:.3g} is above your bound, {got[over][0]:.3g}"
            )
        want = a.abs() @ eb + ea @ b.abs() + ea @ eb
        if (loose := got > 2 * want).any():
            raise Wrong(
                f"{what}: your bound is {got[loose][0]:.3g}, and {want[loose][0]:.3g} is one too"
            )


def _most(x: Tensor, scale: Tensor) -> Tensor:
    """The largest error of each casted element."""
    return torch.maximum(x.abs() * UNIT, TINY / scale)


def _has(what: str, got: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} is {type(got).__name__}, not a tensor")
    if got.dtype != dtype:
        raise Wrong(f"{what} is in {got.dtype}, not in {dtype}")
    if tuple(got.shape) != shape:
        raise Wrong(f"{what} has the shape {tuple(got.shape)}, not {shape}")


def test_of_the_student(module: ModuleType) -> None:
    caught(answer(module, "check_means"), [(f,) for f in RIGHT], [(f,) for f in MUTANTS])


LAB = Lab(
    8,
    "numbers",
    (
        Part("unit_roundoff, stalls_at, sum_bound", 2, rounding),
        Part("running_sum", 1, sums(0)),
        Part("mean_over_ranks", 1, means((2, 8))),
        Part("stochastic", 2, stochastic((1.0, 1.006, 0.1))),
        Part("cast", 1, casts("500 numbers", torch.linspace(-399.7, 399.7, 500))),
        Part("cast, midpoints", 1, casts("midpoints", _midpoints()), hidden=True),
        Part(
            "cast, the ends",
            1,
            casts("the ends", torch.tensor([0.0, -1e-3, 470, -1e9])),
            hidden=True,
        ),
        Part("scale", 1, scales),
        Part("product", 1, products),
        Part("bound", 2, bounds),
        Part("running_sum, other numbers", 1, sums(1), hidden=True),
        Part("mean_over_ranks, other sizes", 1, means((5, 256)), hidden=True),
        Part("stochastic, other numbers", 1, stochastic((-3.3, -1e-3, 255.7)), hidden=True),
        Part("check_means", 4, test_of_the_student, hidden=True),
    ),
)
