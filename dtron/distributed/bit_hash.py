"""A hash of the bits of a tensor, computed on its device in whole numbers.

The hash is the sum of ``bits[i] * weight[i]`` modulo 2**64. The bits of an element are an integer,
and every weight is odd. So one flipped bit always changes the hash: it adds ``±2**k * weight``, and
no odd number times ``2**k`` with k < 64 is 0 modulo 2**64. The weights differ, so the hash of
exchanged elements differs too. The order of a sum does not change it, as it would change a sum of
floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements that are hashed at once; their weights take 32 MiB
_ODD = 0x9E3779B97F4A7C15  # the golden ratio times 2**64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def odd_weights(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ``n`` different odd numbers, ``[n]`` int64."""
    return (torch.arange(1, n + 1, device=device) * _signed(2 * _ODD)) | 1


def bit_hash(x: Tensor, weights: Tensor) -> Tensor:
    """Return the hash of a plain tensor as a scalar of int64 on its device. The host does not wait.

    ``weights``: the numbers of ``odd_weights(CHUNK)`` on this device, or fewer: as many elements
        are hashed at once."""
    bits = x.detach().reshape(-1).view(_INTEGERS[x.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, part in enumerate(bits.split(len(weights)) if len(bits) else ()):
        total += (part.to(torch.int64) * weights[: len(part)]).sum() * _signed(_ODD**i)
    return total


def _signed(n: int) -> int:
    """Return a number modulo 2**64 as a signed number of 64 bits."""
    return (n + 2**63) % 2**64 - 2**63
