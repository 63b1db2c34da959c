"""The factors of QK-clip (qk_clip.py), from the largest attention logits of a step.

``training.gradients`` has reported them as it reports the load of experts, over all microbatches
and over all ranks that have tokens. It reports a maximum, and not a sum. So every rank has the same
factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.model.block_outputs import LARGEST_LOGITS
from dtron.model.config import ModelConfig
from dtron.training.gradients import Reports
from dtron.training.pipeline import Pipeline


def clip_factors(
    reports: Reports, pipe: Pipeline, m: ModelConfig, threshold: float
) -> dict[str, Tensor]:
    """Return the factors of the weights of this process's stages, by path. A factor has the last
    dims of its weight. The host does not wait for them.

    ``reports``: the reports of a step, by stage.
    ``threshold``: the largest logit that is left as it is; 0: no factors."""
    factors: dict[str, Tensor] = {}
    for stage in pipe.stages if threshold else ():
        blocks = [p for p in pipe.specs[stage].all_blocks if m.mixer(p.letter).has_logits]
        rows_LN = reports[stage][LARGEST_LOGITS] if blocks else ()
        for p, largest_N in zip(blocks, rows_LN, strict=True):
            gamma_N = torch.where(largest_N > threshold, threshold / largest_N, 1)
            factors |= m.mixer(p.letter).logit_factors(p.mixer, gamma_N)
    return factors
