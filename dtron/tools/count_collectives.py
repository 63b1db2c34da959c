"""Counts the collectives of a program: kind, mesh axis, number and bytes.

A dispatch mode sees every functional collective, issued by DTensor or by a local region, in forward
and in backward, on real and on simulated ranks. Tests assert these counts, so communication can be
added only on purpose. ``dtron.verify`` prints the counts.

Bytes are the size of the unsharded tensor on one rank: the output of an all-gather, the input of
the other collectives. A ring over n ranks sends (n-1)/n of these bytes per rank; an all-reduce
sends twice as much. (An all-to-all by ``swap`` or ``shift`` sends all bytes: it has no data for the
rank itself.)
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# The guard is private to torch; only this module imports it.
from torch.distributed.tensor._utils import ExplicitRedistributionContext
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.simulated_ranks import one_rank
from dtron.mesh import axes_of, ranks_along
from dtron.rules import EXCHANGED

_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast": "broadcast",
}


@dataclass(frozen=True, order=True)
class Collective:
    """The key of a count: the kind of a collective and its mesh axis."""

    kind: str
    axis: str


class CollectiveCounter(TorchDispatchMode):
    """``with CollectiveCounter(mesh) as c: ...`` fills ``c.count`` and ``c.bytes``, keyed by (kind,
    mesh axis), and ``c.order``, the collectives in issue order."""

    def __init__(self, mesh: DeviceMesh | None):
        super().__init__()
        self._axis: dict[str, str] = {}
        if mesh is not None:
            self._axis |= {mesh.get_group(name).group_name: name for name in axes_of(mesh)}
        for axis in EXCHANGED:  # groups of their own where they are several dims of the mesh
            if (ranks := ranks_along(mesh, axis)) is not None:
                self._axis.setdefault(ranks.get_group().group_name, axis)
        self.count: Counter[Collective] = Counter()
        self.bytes: Counter[Collective] = Counter()
        self.order: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let DTensor decompose into collectives first
        out = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func.overloadpacket.__name__)
        if kind and func.namespace in ("_c10d_functional", "_dtensor", "c10d"):
            group = next(
                self._axis[a] for a in reversed(args) if isinstance(a, str) and a in self._axis
            )
            key = Collective(kind, group)
            whole = one_rank(out if kind == "all_gather" else args[0])
            self.count[key] += 1
            self.order.append(key)
            self.bytes[key] += whole.numel() * whole.element_size()
        return out

    def __str__(self) -> str:
        counts = (f"{n} {c.kind} over {c.axis}" for c, n in sorted(self.count.items()))
        return ", ".join(counts) or "none"


class HiddenCommunication(RuntimeError):
    """An operation would communicate without an explicit redistribution in the code."""


@contextmanager
def no_hidden_communication() -> Iterator[None]:
    """Raise HiddenCommunication for any implicit redistribution inside the context. Every
    collective of a forward must be a ``constrain``, an ``unshard`` or part of a local region."""
    try:
        with ExplicitRedistributionContext():
            yield
    except RuntimeError as error:
        if "mplicit redistribution" not in str(error):
            raise
        what = str(error).splitlines()[0].partition(" while ")[0]
        raise HiddenCommunication(
            f"{_own_lines(error)}: DTensor would redistribute an operand of this line by itself; "
            f"constrain it first, to where the operation needs it ({what})"
        ) from error


def _own_lines(error: BaseException) -> str:
    """Return the three innermost lines of the traceback outside torch and this module."""
    torch_folder = str(Path(torch.__file__).parent)
    others = (__file__, contextlib.__file__)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(torch_folder) and f.filename not in others
    ]
    return ", in ".join(
        f"{Path(f.filename).name}:{f.lineno}: {f.line}" for f in reversed(frames[-3:])
    )
