"""Packs encoded conversations, completions or pairs of answers into rows, by best fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dtron.data.best_fit_packing import Fitted, TokenizedDocuments
from dtron.data.chat import Chats
from dtron.data.sources import Source
from dtron.errors import UserError

if TYPE_CHECKING:
    from dtron.data.config import DataConfig


def learned_rows(
    d: DataConfig, chats: Chats, encoded: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int
) -> tuple[Source, Source, str | None]:
    """Return samples of conversations, and a line about what is dropped or cut. Two answers of a
    pair are dropped together, and never cut."""
    tokens, learn, lengths = encoded
    starts = np.cumsum(lengths) - lengths
    kept = np.minimum(lengths, d.seq_len + 1)  # a longer conversation loses its end
    taught = np.concatenate([[0], np.cumsum(learn)])
    some = taught[starts + kept] > taught[np.minimum(starts + 1, starts + kept)]
    group = 2 if d.kind == "preference" else 1
    if group > 1:
        fits = lengths.reshape(-1, group).sum(1) <= d.seq_len + 1
        some = np.repeat(some.reshape(-1, group).all(1) & fits, group)
    cut = int((some & (kept < lengths)).sum())
    starts, kept = starts[some], kept[some]
    groups = len(kept) // group
    held_out = group * (groups - int(groups * d.validation_ratio))
    what = {"documents": "conversations", "completion": "completions", "preference": "pairs"}[
        d.kind
    ]
    if held_out == len(kept):
        raise UserError(
            f"--data.path {chats.path!r}: {groups} of {len(lengths) // group} {what} have "
            f"something to learn in their first {d.seq_len} tokens, and a share of "
            f"{d.validation_ratio} of them is not one to validate with; raise --data.seq-len or "
            "--data.validation-ratio, or give more"
        )
    documents = TokenizedDocuments(tokens, starts, kept, learn, group)
    train, held = documents.part(slice(held_out)), documents.part(slice(held_out, None))
    note = None
    if group > 1 and groups < len(lengths) // group:
        note = (
            f"{chats.path}: {len(lengths) // group - groups:,} of {len(lengths) // group:,} pairs "
            f"do not fit into {d.seq_len:,} tokens or have nothing to learn, and are dropped; "
            "raise --data.seq-len"
        )
    elif len(kept) < len(lengths) or cut:
        what = what if len(lengths) == chats.count else f"samples of {what}"
        note = (
            f"{chats.path}: {len(lengths) - len(kept):,} of {len(lengths):,} {what} have "
            f"nothing to learn in their first {d.seq_len:,} tokens and are dropped; {cut:,} are "
            "cut; raise --data.seq-len"
        )
    return (
        Fitted(train, d.seq_len, seed),
        Fitted(held, d.seq_len, seed, shuffle=False),
        note,
    )
