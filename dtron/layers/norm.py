"""Normalisation over the embedding: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and LayerNorm
(Ba et al. 2016, arXiv:1607.06450).

Both work on each token alone. So under sequence parallelism they run on a rank's own tokens and
need no communication. Their weights are whole on every rank, and each rank sees only some of the
tokens. So the weight's gradient is a sum still pending over dp, cp *and* tp. DTensor keeps track of
this sum. A trainer that forgets the sum over tp is wrong in exactly the norm weights. This bug has
shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtron.params import ones, weight, zeros


@dataclass(frozen=True)
class Norm:
    """The weights. RMSNorm has no ``bias``; LayerNorm has one."""

    scale: Tensor = weight("act_embed", init=ones)
    bias: Tensor | None = weight("act_embed", init=zeros, when="layernorm")


def norm(p: Norm, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last dim. Statistics are in float32 at least; the result has the shape and
    dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if p.bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide.to(x.dtype) * p.scale
    return y if p.bias is None else y + p.bias
