"""A dispatch mode that sees every operation, and knows which weight the operation uses.

It follows weights through views, casts and all-gathers, on one device and on simulated ranks. A
weight's path names the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.redistribute import to_local


class WeightUse(TorchDispatchMode):
    """The base of modes that watch a step. A subclass has ``see``.

    ``weights``: pairs of a path and a weight."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]):
        super().__init__()
        # The tensors are kept, so that no other tensor gets the id of one of them.
        self._weights = {id(to_local(w)): (to_local(w), path) for path, w in weights}

    def see(
        self, func: Any, path: str | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """See an operation.

        ``path``: the weight that it uses together with another tensor (None: it uses none)."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        paths = [self._weights[id(x)][1] for x in inputs if id(x) in self._weights]
        used = None
        if paths and len(paths) == len(inputs):  # a view, a cast or an all-gather of a weight
            self._weights |= {id(x): (x, paths[0]) for x in outputs}
        elif paths:
            used = paths[0]
        self.see(func, used, inputs, outputs)
        return out


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
