"""Finds where a value first stops being finite: the layer and the line of code.

A dispatch mode sees every operation of a step, on one device and on simulated ranks. It follows the
weights through views, casts and all-gathers, so it knows which weight was used last. That weight
names the layer: its path has the number of the block. The line comes from the call stack.

An infinity below zero is no finding, because attention masks are full of them. Memory that no
kernel has written yet is none either.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import by_rank

PACKAGE = Path(__file__).parents[1]


class FirstNonFinite(TorchDispatchMode):
    """``with FirstNonFinite(leaves(params)) as first: ...`` sets ``first.where`` to a description
    of the first non-finite result; None: every result was finite.

    ``weights``: pairs of a path and a weight."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]):
        super().__init__()
        self.where: str | None = None
        self._layer: str | None = None
        # The tensors are kept, so that no other tensor gets the id of one of them.
        self._weights: dict[int, tuple[Tensor, str]] = {}
        for path, w in weights:
            if self.where is None and (ranks := not_finite(w)):
                self.where = f"the weight {path} itself is not finite{_on(ranks)}"
            self._weights[id(to_local(w))] = to_local(w), path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        paths = [self._weights[id(x)][1] for x in inputs if id(x) in self._weights]
        if paths and len(paths) == len(inputs):  # a view, a cast or an all-gather of a weight
            self._weights |= {id(x): (x, paths[0]) for x in outputs}
        elif paths:
            self._layer = paths[0]
        if self.where is None and inputs and "empty" not in func.overloadpacket.__name__:
            ranks = [r for x in outputs for r in not_finite(x)]
            if ranks:
                self.where = f"{self._describe()}{_on(ranks)}"
        return out

    def _describe(self) -> str:
        lines = [
            f"{Path(f.filename).name}:{f.lineno}: {f.line}"
            for f in traceback.extract_stack()
            if PACKAGE in Path(f.filename).parents and f.filename != __file__
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


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
