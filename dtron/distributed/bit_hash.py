"""A hash of the bits of a tensor, computed on its device in whole numbers.

The hash is the sum of ``bits[i] * weight[i]`` modulo 2**64. Eight octets of the tensor are an
integer, and every weight is odd. So one flipped bit always changes the hash: it adds
``±2**k * weight``, and no odd number times ``2**k`` with k < 64 is 0 modulo 2**64. The weights
differ, so the hash of exchanged integers differs too. The order of a sum does not change it, as it
would change a sum of floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24  # integers that are hashed at once; their weights take 128 MiB
_ODD = 0x9E3779B97F4A7C15  # the golden ratio times 2**64


def odd_weights(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ``n`` different odd numbers, ``[n]`` int64. Their bits look random, so that the
    difference of two has no large power of two as a factor."""
    mixed = torch.arange(1, n + 1, device=device) * _signed(_ODD)
    mixed = (mixed ^ (mixed >> 32)) * _signed(_ODD)  # the high bits change the low bits
    return mixed | 1


def bit_hash(x: Tensor, weights: Tensor) -> Tensor:
    """Return the hash of a plain tensor as a scalar of int64 on its device. The host does not wait.

    ``weights``: the numbers of ``odd_weights(CHUNK)`` on this device, or fewer, but one at least:
        as many integers are hashed at once."""
    octets = x.detach().reshape(-1).view(torch.uint8)
    whole = len(octets) // 8 * 8
    if octets.storage_offset() % 8:  # a view of wider integers needs an aligned start
        octets = octets.clone()
    rest = octets[whole:].to(torch.int64)  # the last octets, of a tensor whose size is no multiple
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    parts = (*octets[:whole].view(torch.int64).split(len(weights)), *rest.split(len(weights)))
    for i, part in enumerate(part for part in parts if len(part)):
        total = total + (part * weights[: len(part)]).sum() * _signed(_ODD**i)
    return total


def _signed(n: int) -> int:
    """Return a number modulo 2**64 as a signed number of 64 bits."""
    return (n + 2**63) % 2**64 - 2**63
