"""Schedules of the learning rate and of the weight decay: pure functions of the progress of a run.

A run with one batch size counts its progress in steps. With a batch ramp it counts samples, as
Megatron does: the curve over the tokens stays the same when the sizes of the steps change, and a
larger batch passes through it in fewer steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dtron.training.optim_config import OptimConfig


class Progress(NamedTuple):
    """The place of an update in its run, in steps or in samples.

    ``done``: what the run has done before the update.
    ``size``: what the update does. In steps this is 1.
    ``warmup``: the length of the warm-up.
    ``last``: what the run has done before its last update."""

    done: int
    size: int
    warmup: int
    last: int


class Rates(NamedTuple):
    """The numbers of an update that follow a schedule.

    ``lr``: the learning rate.
    ``decay``: the factor of the weight decay; None: it is constant."""

    lr: float
    decay: float | None


def scheduled_rates(config: OptimConfig, at: Progress) -> Rates:
    """Return the numbers of an update."""
    return Rates(learning_rate(config, at), weight_decay_factor(config, at))


def learning_rate(config: OptimConfig, at: Progress) -> float:
    """Return the learning rate of an update: warm-up to ``lr``, then the schedule. The schedule
    reaches ``min_lr_ratio * lr`` at the last update."""
    if at.done < at.warmup:
        return config.lr * min(at.done + at.size, at.warmup) / at.warmup
    progress = min((at.done - at.warmup) / max(at.last - at.warmup, 1), 1.0)
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


def weight_decay_factor(config: OptimConfig, at: Progress) -> float | None:
    """Return the weight decay of an update as a factor of the optimizer's (``build_optimizer``).
    None: the decay is constant.

    The decay goes from ``weight_decay`` at the first update to ``final_weight_decay`` at the last
    one, on a straight line or on half a period of a cosine. (The warm-up is of the rate alone.)"""
    if config.weight_decay_schedule == "constant":
        return None
    assert config.final_weight_decay is not None  # OptimConfig refuses this
    share = min(at.done / max(at.last, 1), 1.0)
    if config.weight_decay_schedule == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    first, final = config.weight_decay, config.final_weight_decay
    return ((1 - share) * first + share * final) / (config.largest_weight_decay or 1.0)
