"""Samples as text, with the tokens that are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
from rich.text import Text

from dtron.data.sources import Rows

LEARNED = "bold green"


def shown(rows: Rows, decode: Callable[[list[int]], str], colour: bool) -> Iterator[Text]:
    """Yield a heading and a text for each document of each row.

    ``decode``: makes text of ids.
    ``colour``: learned tokens are coloured; otherwise they stand between ``[[`` and ``]]``."""
    for i, tokens in enumerate(rows.tokens):
        counted = np.ones(len(tokens) - 1, bool) if rows.counted is None else rows.counted[i]
        documents = np.zeros(len(tokens) - 1, int) if rows.documents is None else rows.documents[i]
        learned = np.concatenate([[False], counted])
        # A target is in the document of its input, but for the first token of a document.
        last = documents[-1] + (rows.crosses is not None and bool(rows.crosses[i][-1]))
        own = np.append(documents, last)
        for number in np.unique(own):
            at = own == number
            yield Text(
                f"row {i + 1}, document {number + 1}: {at.sum()} tokens, "
                f"{learned[at].sum()} learned",
                style="dim" if colour else "",
            )
            yield _marked(tokens[at], learned[at], decode, colour)


def _marked(
    tokens: np.ndarray, learned: np.ndarray, decode: Callable[[list[int]], str], colour: bool
) -> Text:
    text = Text()
    for flag, run in groupby(zip(tokens.tolist(), learned.tolist(), strict=True), lambda x: x[1]):
        part = decode([token for token, _ in run])
        if colour:
            text.append(part, style=LEARNED if flag else "")
        else:
            text.append(f"[[{part}]]" if flag else part)
    return text
