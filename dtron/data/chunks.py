"""Chunks: one long array of tokens, split into samples of equal length, in a shuffled order.

Sample c of `tokens` is `tokens[c * S : c * S + S + 1]`: S inputs, and the same S shifted by one as
targets. So neighbouring samples share one token, and every token but the first is a target once an
epoch. No sample is padded. The fewer than S tokens left at the end are dropped.

The place in the data is one integer, the number of samples taken since the run began. `rows` is a
pure function of this integer. A checkpoint stores this integer and nothing else, and a resumed run
goes on with exactly the next sample. Global batch n is `rows(..., start=n * B, count=B)` for any
number of devices.

Left out: worker processes (building a batch takes only a few copies out of mapped memory).
"""

from functools import lru_cache

import numpy as np

from dtron.errors import UserError


def split_text(tokens: np.ndarray, seq_len: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split into training tokens and, from the tail, a `fraction` for validation. Each holds at
    least one sample."""
    cut = len(tokens) - int(len(tokens) * fraction)
    check_length(cut, seq_len, "training")
    check_length(len(tokens) - cut, seq_len, "validation", ", raise --data.validation-ratio")
    return tokens[:cut], tokens[cut:]


def rows(
    tokens: np.ndarray, seq_len: int, seed: int, start: int, count: int, shuffle: bool = True
) -> np.ndarray:
    """Return samples `start` to `start + count` of the run, int64 [count, seq_len + 1].

    Sample i is chunk `order[i % N]` of the N chunks. Each epoch i // N has its own order."""
    check_length(len(tokens), seq_len, "given")
    if start < 0 or count < 0:
        raise UserError(
            f"start {start} and count {count} must not be negative; samples count from 0"
        )
    chunks = (len(tokens) - 1) // seq_len
    out = np.empty((count, seq_len + 1), np.int64)
    for row, sample in enumerate(range(start, start + count)):
        epoch, place = divmod(sample, chunks)
        first = int(epoch_order(chunks, seed, epoch)[place] if shuffle else place) * seq_len
        out[row] = tokens[first : first + seq_len + 1]
    return out


def document_ids(tokens: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return, for rows of tokens [B, S], the document of its row that each token is in, and the
    token's position in this document.

    An end token belongs to the document that it ends. The two arrays allow attention to be kept
    inside documents. A row mostly starts in the middle of a document; its positions start from 0
    all the same."""
    begins = np.zeros(tokens.shape, bool)
    if end is not None:
        begins[:, 1:] = tokens[:, :-1] == end
    return begin_ids(begins)


def begin_ids(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the same two arrays from a mask [B, S] of the tokens that begin a document. The first
    token of a row always counts as a beginning, whether marked or not."""
    places = np.broadcast_to(np.arange(begins.shape[1]), begins.shape)
    begins = begins & (places > 0)
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return np.cumsum(begins, axis=1), places - starts


@lru_cache(maxsize=4)  # this epoch's and the next one's, for training and for validation
def epoch_order(chunks: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of the chunks for each epoch."""
    # numpy has frozen RandomState. A Generator's stream may change with numpy's version, and a run
    # that resumes after an upgrade would see some samples twice.
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    order = state.permutation(chunks)
    order.flags.writeable = False  # shared by every caller
    return order


def check_length(tokens: int, seq_len: int, name: str, remedy: str = "") -> None:
    """Raise UserError if ``tokens`` tokens are too few for one sample."""
    if seq_len < 1:
        raise UserError(
            f"--data.seq-len {seq_len} is not a length; set --data.seq-len to 1 or more"
        )
    if tokens < seq_len + 1:
        raise UserError(
            f"the {name} text has {tokens} tokens, and one sample takes {seq_len + 1} "
            f"(--data.seq-len {seq_len}, and one more for the last target); lower "
            f"--data.seq-len{remedy}, or give more text"
        )
