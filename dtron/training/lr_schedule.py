"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from dtron.training.optim_config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of update ``step`` (from 0) of ``steps``: warm-up to ``lr``, then
    the schedule. The schedule reaches ``min_lr_ratio * lr`` on the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    after = max(steps - config.warmup - 1, 1)
    progress = min((step - config.warmup) / after, 1.0)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            ratio = config.wsd_decay_ratio
            share = min(1.0, (1 - progress) / ratio) if ratio else 1.0
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
