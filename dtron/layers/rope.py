"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and three ways to extend it to
longer contexts.

A head's dims form pairs (i, i + H/2). Pair i is rotated by the angle ``position * frequency_i``.
Frequencies fall geometrically from 1 to 1/theta. To extend a model to a longer context, the
frequencies whose wavelength the original context could not fill are slowed:

- Linear: divide all frequencies by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
- Llama 3: keep short wavelengths, divide the frequencies of long ones by ``factor``, blend between.
- YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): the same ramp, measured in rotations over
  the original context, and a temperature. cos and sin are multiplied by 0.1 ln(factor) + 1
  (equation 22). DeepSeek gives this temperature a coefficient. It moves the temperature, or a part
  of it, from cos and sin to the scores. So the temperature applies to dims without rotation too:
  ``RopeConfig.temperature``.

Angles are computed in float32 at least. Positions are an input tensor: a packed document restarts
at 0, and no layer depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtron.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary angles. The fields are as in model cards."""

    theta: float = 10_000.0
    """base of the frequencies"""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """how frequencies are slowed for contexts longer than the original"""
    factor: float = 8.0
    """ratio of the longer context to the original context"""
    original: int = 8192
    """tokens of the original context"""
    low: float = 1.0
    """llama3: low_freq_factor"""
    high: float = 4.0
    """llama3: high_freq_factor"""
    beta_slow: float = 1.0
    """yarn: rotations over the original context below which a frequency is fully slowed"""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a frequency is kept"""
    mscale: float = 1.0
    """yarn: cos and sin are multiplied by 0.1 mscale ln(factor) + 1, and divided by
    0.1 mscale_all ln(factor) + 1"""
    mscale_all: float = 0.0
    """yarn: attention scores are multiplied by the square of 0.1 mscale_all ln(factor) + 1"""
    attention_factor: float = 0.0
    """yarn: factor on cos and sin; 0: computed from factor, mscale and mscale_all"""
    truncate: bool = True
    """yarn: the ramp begins and ends at a pair, not between two pairs; False in gpt-oss"""
    partial: float = 1.0
    """share of a head's dims that is rotated: the first dims (partial rotary); 1: all"""

    def __post_init__(self) -> None:
        fine = 1 < self.theta < math.inf and 1 <= self.factor < math.inf and self.low < self.high
        fine = fine and self.original >= 1 and 0 < self.beta_slow <= self.beta_fast
        fine = fine and 0 <= self.mscale < math.inf and 0 <= self.mscale_all < math.inf
        fine = fine and 0 <= self.attention_factor < math.inf and 0 < self.partial <= 1
        if not fine:
            raise UserError(
                f"rope theta={self.theta}, factor={self.factor}, original={self.original}, "
                f"low={self.low}, high={self.high}, beta_slow={self.beta_slow}, "
                f"beta_fast={self.beta_fast}, mscale={self.mscale}, mscale_all={self.mscale_all}, "
                f"attention_factor={self.attention_factor}, partial={self.partial}: theta must be "
                "over 1, factor and original at least 1, low under high, beta_slow over 0 and at "
                "most beta_fast, mscales and attention_factor at least 0, partial over 0 and at "
                "most 1"
            )

    @property
    def temperature(self) -> float:
        """The factor on attention scores, in addition to 1 / sqrt(head_dim)."""
        return self.stretch(self.mscale_all) ** 2 if self.scaling == "yarn" else 1.0

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or self.stretch(self.mscale) / self.stretch(self.mscale_all)

    def stretch(self, mscale: float) -> float:
        """Return YaRN's factor on cos and sin (equation 22), with the coefficient ``mscale``."""
        return 0.1 * mscale * math.log(self.factor) + 1.0


def frequencies(
    rope: RopeConfig,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """Return the frequencies ``[H/2]``, in radians per token, and the factor on cos and sin."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    freq = rope.theta**-pair
    if rope.scaling == "none":
        return freq.to(dtype), 1.0
    if rope.scaling == "linear":
        return (freq / rope.factor).to(dtype), 1.0
    if rope.scaling == "llama3":
        rotations = rope.original * freq / (2 * math.pi)
        keep = ((rotations - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return (freq * (keep + (1 - keep) / rope.factor)).to(dtype), 1.0

    def pair_with(rotations: float) -> float:
        """Return the pair that makes so many rotations over the original context."""
        inverse_frequency = rope.original / (rotations * 2 * math.pi)
        return head_dim * math.log(inverse_frequency) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # The limits can leave an empty ramp or a reversed one. transformers divides by its length as it
    # is, and published models were trained with the result.
    ramp = (torch.arange(len(pair), dtype=pair.dtype, device=device) - first) / (
        (last - first) or 1e-3
    )
    keep = 1 - ramp.clamp(0, 1)
    return (freq * (keep + (1 - keep) / rope.factor)).to(dtype), rope.attention_scaling


def rope_tables(rope: RopeConfig, positions_T: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the rotary angles ``[T, H]`` of positions ``[T]``: cos in the first half of the last
    dim, sin in the second half. A forward makes the table once for all layers. Rank-local."""
    wide = torch.promote_types(dtype, torch.float32)
    freq, scale = frequencies(rope, head_dim, wide, positions_T.device)
    angle = positions_T[:, None].to(freq.dtype) * freq
    return torch.cat([angle.cos() * scale, angle.sin() * scale], dim=-1)


def rotate(x_TNH: Tensor, table_TH: Tensor) -> Tensor:
    """Rotate every head of every token by the token's angles. Dims after the first
    ``table_TH.shape[-1]`` are not rotated. Rank-local."""
    width = table_TH.shape[-1]
    cos, sin = table_TH[:, None, :].chunk(2, dim=-1)
    a, b = x_TNH[..., :width].to(table_TH.dtype).chunk(2, dim=-1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_TNH.dtype)
    if width == x_TNH.shape[-1]:
        return rotated
    return torch.cat([rotated, x_TNH[..., width:]], dim=-1)
