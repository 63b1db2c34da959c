"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): the student learns the teacher's
probabilities of every word, and not only the word of the text.

    loss = (1 - weight) CE + weight t^2 KL(p || q)

CE is the cross entropy, p and q are the probabilities of teacher and student at the temperature t.
The reverse divergence KL(q || p) lets the student leave out what it cannot learn (MiniLLM, Gu et
al. 2023, arXiv:2306.08543, section 2.1). layers/divergence.py computes both.

The teacher's logits are not kept. Its last activations are, ``[T, E]`` per microbatch, and its
logits are computed chunk by chunk beside the student's. With ``top_k``, its k largest logits are
kept instead, and its probabilities are those of the k words alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from dtron.bounds import from_to
from dtron.errors import UserError
from dtron.layers.cross_entropy import Loss
from dtron.layers.divergence import Divergence, distillation_loss, fewest_words, largest_logits
from dtron.losses.objective import LossInputs, Objective
from dtron.mesh import Layout


@dataclass(frozen=True)
class Distillation(Objective):
    """Knowledge distillation from a teacher.

    ``temperature``: divides the logits of both models.
    ``weight``: the weight of the divergence.
    ``reverse``: the reverse divergence.
    ``top_k``: the number of the teacher's words; 0: all of them."""

    second_model: ClassVar[Literal["reference", "teacher"] | None] = "teacher"
    requires_folder: ClassVar[bool] = True

    temperature: float = 1.0
    weight: float = 0.5
    reverse: bool = False
    top_k: int = 0

    def __post_init__(self) -> None:
        from_to(self, "loss", {"weight": (0, 1), "temperature": (1e-3, 1e3), "top_k": (0, 1 << 20)})
        if self.top_k and self.reverse:
            raise UserError(
                f"--loss.top-k {self.top_k} --loss.reverse: the reverse divergence is infinite "
                "where the teacher's probability is 0; drop one of the two"
            )

    def check(self, options: Loss, words: int, tp: int) -> None:
        fewest = min(options.vocab, fewest_words(words, tp))
        if self.top_k > fewest:
            raise UserError(
                f"--loss.top-k {self.top_k}: a rank of tp={tp} has {fewest} words; use "
                f"--loss.top-k {fewest}"
            )

    def stats(self, options: Loss) -> tuple[str, ...]:
        return ("cross_entropy", "divergence")

    def __call__(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Tensor, ...]:
        first, second, cap = inputs.reference
        rule = Divergence(self.temperature, self.weight, self.reverse, cap)
        return distillation_loss(
            x_TD, w_head, inputs.targets_T, (first, second), rule, options, layout
        )

    def reference(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Any, ...]:
        """Return the two tensors of ``distillation_loss``'s ``teacher``, and the soft-cap."""
        if self.top_k:
            return *largest_logits(x_TD, w_head, self.top_k, options, layout), None
        return layout.constrain(x_TD, "tokens", "act_embed"), w_head, options.softcap
