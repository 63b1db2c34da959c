"""A picture of experts: their loads, and the slots that a capacity drops."""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.errors import UserError
from dtron.moe.dispatch import ExpertGroup, static
from dtron.tools.charts import Scale
from dtron.tools.drawing import FAINT, Canvas

TAKEN, DROPPED, ROOM = "#50b060", "#d05050", "#222"


def choices(tokens: int, experts: int, k: int, liked: float) -> tuple[Tensor, Tensor]:
    """Return the weights and the experts of each token: the k largest of random scores.

    ``liked``: how much better the scores of the first experts are than those of the last."""
    if k > experts:
        raise UserError(f"k={k}: a token has at most {experts} experts; take a smaller k")
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(tokens, experts).normal_(generator=generator)
    scores_TE = (noise + liked * torch.linspace(1, 0, experts)).softmax(-1)
    weights_TK, index_TK = scores_TE.topk(k)
    return weights_TK, index_TK


def loads(tokens: int, experts: int, k: int, factor: float, liked: float) -> tuple[Tensor, Tensor]:
    """Return the slots of each expert: chosen, and kept by dtron's dispatcher.

    ``factor``: the capacity as a multiple of the mean load."""
    weights_TK, index_TK = choices(tokens, experts, k, liked)
    kept_E = torch.zeros(experts, dtype=torch.long)

    def count(rows_ERD: Tensor, _: Tensor | None) -> Tensor:
        kept_E.copy_(rows_ERD.ne(0).any(-1).sum(-1))
        return rows_ERD

    ones = torch.ones(tokens, 1)
    group = ExpertGroup(experts, None, factor)
    static(ones, weights_TK, index_TK, torch.tensor(0), count, group)
    return torch.bincount(index_TK.flatten(), minlength=experts), kept_E


def expert_loads(
    tokens: int = 64, experts: int = 8, k: int = 2, factor: float = 1.0, liked: float = 1.0
) -> str:
    """Draw the slots of each expert: kept, and dropped beyond the capacity."""
    chosen_E, kept_E = loads(tokens, experts, k, factor, liked)
    canvas, mean = Canvas(900), tokens * k / experts
    room = min(tokens, int(-(-factor * mean // 1)))
    scale = Scale(max(float(chosen_E.max()), room), 110, 640)
    dropped = int((chosen_E - kept_E).sum())
    canvas.text(
        20,
        24,
        f"{tokens} tokens, {k} of {experts} experts: {dropped} of {tokens * k} slots dropped",
        bold=True,
        size=14,
    )
    for e, (chosen, kept) in enumerate(zip(chosen_E.tolist(), kept_E.tolist(), strict=True)):
        y = 44 + 26 * e
        canvas.text(20, y + 14, f"expert {e}")
        canvas.rect(110, y, scale.size(kept), 18, TAKEN)
        canvas.rect(scale(kept), y, scale.size(chosen - kept), 18, DROPPED, line="none")
        canvas.text(scale(chosen) + 8, y + 14, f"{kept} of {chosen}", colour=FAINT)
    bottom = 44 + 26 * experts
    canvas.line([(scale(room), 36), (scale(room), bottom)], ROOM, dashed=True)
    canvas.text(20, bottom + 16, f"dashed: the capacity, {room} slots; the mean load is {mean:g}")
    busiest = float(chosen_E.max()) / mean
    canvas.text(20, bottom + 36, f"the busiest expert has {busiest:.2f} times the mean load")
    return canvas.svg()
