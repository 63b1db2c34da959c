"""How many examples a property draws, and the examples that it never leaves to chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import example, settings


def examples(n: int, thorough: int = 0) -> int:
    """Scale a number of examples: ``n`` of the hundred that hypothesis draws by default, in any
    profile.

    ``thorough``: the number in a profile that draws more than that; 0: scaled too."""
    most = settings().max_examples
    return thorough if thorough and most > 100 else max(1, n * most // 100)


# One mesh for each set of axes. 3 divides few sizes.
KINDS = [
    "dp_replicate=2",
    "dp=3",
    "tp=4",
    "dp_replicate=2,dp=3",
    "dp_replicate=2,tp=3",
    "dp=2,tp=2",
    "dp_replicate=2,dp=2,tp=2",
]


def seen(**lists: Sequence[Any]) -> Callable[[Callable], Callable]:
    """Add examples to those that ``@given`` draws, for cases that chance might leave out.

    There are as many examples as the longest list has values. The values of shorter lists
    repeat."""

    def add(test: Callable) -> Callable:
        for i in range(max(map(len, lists.values()))):
            test = example(**{name: xs[i % len(xs)] for name, xs in lists.items()})(test)
        return test

    return add
