"""Finds where a value first stops being finite: the layer and the line of code.

A dispatch mode sees every operation of a step, and which weight it uses (weight_use.py). The weight
that was used last names the layer: its path has the number of the block. The line comes from the
call stack.

An infinity below zero is no finding, because attention masks are full of them. Memory that no
kernel has written yet is none either.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import by_rank
from dtron.tools import weight_use

PACKAGE = Path(__file__).parents[1]


class FirstNonFinite(weight_use.WeightUse):
    """``with FirstNonFinite(leaves(params)) as first: ...`` sets ``first.where`` to a description
    of the first non-finite result; None: every result was finite.

    ``weights``: pairs of a path and a weight."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]):
        pairs = list(weights)
        super().__init__(pairs)
        self.where: str | None = None
        self._layer: str | None = None
        for path, w in pairs:
            if self.where is None and (ranks := not_finite(w)):
                self.where = f"the weight {path} itself is not finite{_on(ranks)}"

    def see(
        self, func: Any, path: str | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self._layer = path or self._layer
        if self.where is None and inputs and "empty" not in func.overloadpacket.__name__:
            ranks = [r for x in outputs for r in not_finite(x)]
            if ranks:
                self.where = f"{self._describe()}{_on(ranks)}"

    def _describe(self) -> str:
        mode = weight_use.__file__
        lines = [
            f"{Path(f.filename).name}:{f.lineno}: {f.line}"
            for f in traceback.extract_stack()
            if PACKAGE in Path(f.filename).parents and f.filename not in (__file__, mode)
        ]
        layer = "before any weight is used" if self._layer is None else f"at {self._layer}"
        return f"first {layer}, in {lines[-1]}" if lines else f"first {layer}"


def not_finite(x: Tensor) -> list[int]:
    """Return the ranks on which a tensor has a NaN or an infinity above zero."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return []
    return [r for r, t in by_rank(to_local(x), 0).items() if bool((t.isnan() | t.isposinf()).any())]


def _on(ranks: list[int]) -> str:
    found = sorted(set(ranks))
    return "" if found == [0] else f", on rank {', '.join(map(str, found))}"
