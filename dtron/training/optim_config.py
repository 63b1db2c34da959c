"""The flags of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtron.bounds import from_to, under
from dtron.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-3
    """learning rate after warm-up"""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """after warm-up: constant; down to min_lr by the last step, linearly or as a cosine; wsd stays,
    then decays"""
    warmup: int = 20
    """steps from 0 to lr"""
    min_lr: float = 0.1
    """the last step's rate, as a share of lr"""
    decay: float = 0.2
    """wsd: the share of steps that decay at the end"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the second moment's root"""
    weight_decay: float = 0.1
    """of matrices; norms and biases have none"""
    clip: float = 1.0
    """largest global gradient norm; 0: do not clip"""

    def __post_init__(self) -> None:
        inf = float("inf")
        from_to(self, "optim", {"min_lr": (0, 1), "decay": (0, 1)})
        under(self, "optim", {"beta1": 1, "beta2": 1})
        under(
            self, "optim", {name: inf for name in ("lr", "warmup", "eps", "weight_decay", "clip")}
        )
        if self.eps == 0:
            raise UserError(
                "optim.eps=0: a weight that never had a gradient would be 0/0; use 1e-8"
            )
