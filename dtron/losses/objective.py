"""The seam of losses: a loss is a function of the last activations, the head and the targets.

A new loss is one file with a frozen dataclass, and one line in ``LOSSES`` (config.py). Its fields
are its options. A loss that needs a second model, such as the reference of DPO or the teacher of
distillation, has two functions: ``reference`` runs at the end of the second model and returns
tensors, and ``__call__`` gets these tensors in ``LossInputs.reference``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from dtron.layers.cross_entropy import Loss, cross_entropy
from dtron.mesh import Layout


class LossInputs(NamedTuple):
    """What a loss takes of a microbatch.

    ``targets_T``: ``[T@tokens]``, the next token, or IGNORE.
    ``sequences_T``: ``[T@tokens]``, the slot of each token's sequence (sequence_sums.py); None
        without sequences.
    ``slots``: the number of slots of sequences on a data rank.
    ``reference``: what ``Objective.reference`` has returned for the microbatch."""

    targets_T: Tensor
    sequences_T: Tensor | None = None
    slots: int = 0
    reference: tuple[Any, ...] = ()


class Objective:
    """The base of losses, which are frozen dataclasses. Calling one returns ``(loss, *stats)``.

    ``sequences``: the loss depends on whole sequences, so a batch has their slots. Its mean is then
        over pairs of sequences, and not over targets.
    ``second_model``: the flag that names the folder of a second model; None: there is none.
    ``requires_folder``: whether this flag must be given. If not, the second model is the model as
        it was before training."""

    sequences: ClassVar[bool] = False
    second_model: ClassVar[Literal["reference", "teacher"] | None] = None
    requires_folder: ClassVar[bool] = False

    def stats(self, options: Loss) -> tuple[str, ...]:
        """Return the names of the statistics in metrics.jsonl."""
        return ()

    def check(self, options: Loss, words: int, tp: int) -> None:
        """Raise UserError if the loss does not fit the mesh.

        ``words``: the rows of the head, with padding.
        ``tp``: the number of their shards."""

    def __call__(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Tensor, ...]:
        """Return the loss and the statistics: scalars, which are sums over the ranks' tokens or
        pairs that are still pending (``+tokens``). Only the loss is differentiable.

        ``x_TD``: ``[T@tokens_sp, D]``, the input of the head.
        ``w_head``: ``[V@vocab, D]``.
        ``options``: the vocabulary, the soft-cap and the weight of z-loss."""
        raise NotImplementedError

    def reference(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Any, ...]:
        """Return what the loss needs of the second model, tensors or plain values, given the input
        of its head and its head. Runs without gradients."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The cross entropy of the next token, with z-loss: see layers/cross_entropy.py."""

    def stats(self, options: Loss) -> tuple[str, ...]:
        return ("z_loss",) if options.z else ()

    def __call__(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Tensor, ...]:
        loss, z = cross_entropy(x_TD, w_head, inputs.targets_T, options, layout)
        return (loss, z) if options.z else (loss,)


CROSS_ENTROPY = CrossEntropy()
