"""The losses by name, and the flags of the loss."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dtron.errors import UserError
from dtron.losses.distillation import Distillation
from dtron.losses.dpo import DPO
from dtron.losses.ipo import IPO
from dtron.losses.objective import CrossEntropy, Objective
from dtron.losses.simpo import SimPO

LOSSES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "dpo": DPO,
    "ipo": IPO,
    "simpo": SimPO,
    "distillation": Distillation,
}


@dataclass(frozen=True)
class LossConfig:
    """The loss. An option of the loss (a field of its class) is the flag of the same name."""

    name: str = "cross_entropy"
    """the loss, by its name in losses/config.py: cross_entropy; dpo, ipo or simpo, of pairs of
    answers; distillation, of a teacher"""
    beta: float = 0.1
    """dpo, ipo, simpo: factor of rewards; a small one lets the model leave the reference"""
    length_normalized: bool = False
    """dpo, ipo: scores are divided by the number of tokens of the answer"""
    margin: float = 0.0
    """simpo: the margin of rewards that a pair is to have"""
    reference: str = ""
    """dpo, ipo: Hugging Face folder of the reference; empty: the model before training, which with
    LoRA is the model without its updates"""
    teacher: str = ""
    """distillation: Hugging Face folder of the teacher, which has the same vocabulary"""
    temperature: float = 1.0
    """distillation: divides the logits of both models"""
    weight: float = 0.5
    """distillation: weight of the divergence; the rest is the weight of the cross entropy"""
    reverse: bool = False
    """distillation: the divergence of the student from the teacher, and not the teacher's from the
    student"""
    top_k: int = 0
    """distillation: number of words of the teacher, for each token; 0: all"""

    def __post_init__(self) -> None:
        _ = self.objective  # raises UserError for a name or a value that cannot be
        loss = LOSSES[self.name]
        own = {"name", loss.second_model, *(f.name for f in _options(loss))}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in own and value != f.default:
                flag = f"--loss.{f.name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {value}: --loss.name {self.name} has no such option; leave {flag} out"
                )

    @property
    def objective(self) -> Objective:
        """The loss with its options. Raises UserError for a name that does not exist."""
        if self.name not in LOSSES:
            raise UserError(
                f"--loss.name {self.name}: there is no such loss; use {' or '.join(LOSSES)}"
            )
        chosen: Any = LOSSES[self.name]
        flags = {f.name for f in fields(self)}
        own = [f.name for f in _options(chosen) if f.name in flags]
        return chosen(**{name: getattr(self, name) for name in own})

    @property
    def folder(self) -> str:
        """The folder of the second model; empty: there is none, or none is given."""
        name = LOSSES[self.name].second_model
        return "" if name is None else getattr(self, name)


def _options(loss: Any) -> list[Any]:
    return [f for f in fields(loss) if f.init]
