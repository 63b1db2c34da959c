"""Normalisation over the embedding: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and LayerNorm
(Ba et al. 2016, arXiv:1607.06450).

Both work on each token alone, so under sequence parallelism they run on the tokens a rank holds and
need no communication. Their weights are whole on every rank; each rank has then seen some of the
tokens only, and the weight's gradient is a sum still pending over dp, cp *and* tp. It is DTensor
that keeps track of that: a trainer that forgets the tp part is wrong in exactly the norm weights (a
bug that has shipped).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtron.params import ones, weight, zeros


@dataclass(frozen=True)
class Norm:
    """``bias`` makes it a LayerNorm."""

    scale: Tensor = weight("act_embed", init=ones)
    bias: Tensor | None = weight("act_embed", init=zeros, when="layernorm")


def norm(p: Norm, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last dim; statistics in float32 at least. Same shape and dtype as x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if p.bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide.to(x.dtype) * p.scale
    return y if p.bias is None else y + p.bias
