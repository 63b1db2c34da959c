"""Placements encoded as integers.

``Unshard`` and ``LocalToDTensor`` (redistribute.py) choose their backward by the gradient's
placement. They are opaque to torch.compile until AOTAutograd runs, and opaque functions may not
take Placement objects.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from dtron.torch_compile import static


@static
def code(placements: Sequence[Placement]) -> tuple[int, ...]:
    """Encode placements as integers: the dim of a Shard, -1 for Replicate, -2 for Partial."""
    return tuple(
        p.dim if isinstance(p, Shard) else -1 if p.is_replicate() else -2 for p in placements
    )


def decode(numbers: Sequence[int]) -> tuple[Placement, ...]:
    """Decode the placements that ``code`` has encoded."""
    return tuple([_PLACEMENTS[n] for n in numbers])


# Constructed once: the compiler would trace each call of these constructors.
_PLACEMENTS = {-2: Partial(), -1: Replicate(), **{dim: Shard(dim) for dim in range(8)}}


def dim_of(p: Placement) -> int:
    """Return the dim that a Shard shards."""
    return typing.cast(Shard, p).dim
