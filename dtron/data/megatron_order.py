"""The order in which a run reads an indexed corpus: the order of Megatron's GPTDataset.

Three shuffles decide the order, all from one ``numpy.random.RandomState(seed)``. A run draws N
samples of L tokens from documents with T tokens in total:

1. **Epochs.** A sample is L inputs and their L targets, L + 1 tokens. It shares its last token with
the next sample. So E epochs are enough, where E is the smallest number with ``E * T >= N * L + 1``.
2. **Documents.** The documents of all E epochs are shuffled together: one document may come twice
before another comes once. This would hurt if less than 80 % of the last epoch's samples are needed.
Then the last epoch is shuffled separately, after the others.
3. **Samples.** The shuffled documents are concatenated into one stream of tokens. Sample k begins
at token ``k * L`` of the stream. The samples of the full epochs are shuffled, then the samples of
the last epoch if it is separate.

``Order`` is the result: a pure function of (lengths, L, N, seed). The document in which sample k
begins follows from the stream of tokens. It is looked up on request (a bisection) and not stored.
Left out: partial samples at the end of an epoch, which Megatron can pad for validation. Also left
out: saving the order to disk, because building it takes a second or two for ten million documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtron.errors import UserError

APART = 0.8  # of an epoch's samples: a last epoch with fewer is shuffled separately


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run.

    ``documents``: [E * n]; document ids in the order they are read.
    ``ends``: the end of each document in the stream of tokens.
    ``shuffle``: [samples]; the sample of the stream that is drawn i-th."""

    documents: np.ndarray
    ends: np.ndarray
    shuffle: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return len(self.shuffle)

    def place(self, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for places in the stream of tokens, the index into ``documents`` and the offset
        inside this document."""
        at = np.searchsorted(self.ends, token, side="right")
        before = np.where(at > 0, self.ends[at - 1], 0)
        return at, token - before


def plan_epochs(tokens: int, seq_len: int, samples: int) -> tuple[int, bool]:
    """Return ``(E, whether the last epoch is shuffled separately)`` for ``samples`` samples from
    epochs of ``tokens`` tokens."""
    epochs = max(1, -(-(samples * seq_len + 1) // tokens))
    if epochs == 1:
        return 1, False
    from_last = samples - ((epochs - 1) * tokens - 1) // seq_len
    return epochs, from_last < int(APART * ((tokens - 1) // seq_len))


def most_samples(tokens: int, seq_len: int, samples: int) -> int:
    """Return the largest number of samples that has the same order as ``samples``."""
    epochs, apart = plan_epochs(tokens, seq_len, samples)
    if not apart:
        return (epochs * tokens - 1) // seq_len
    of_full = ((epochs - 1) * tokens - 1) // seq_len
    return of_full + int(APART * ((tokens - 1) // seq_len)) - 1


def make_order(
    lengths: np.ndarray, documents: np.ndarray, seq_len: int, samples: int, seed: int
) -> Order:
    """Return the order of ``samples`` samples, or a few more.

    ``lengths``: [all documents]; the lengths in the index.
    ``documents``: ids of the documents to use. Together they must have at least ``seq_len`` + 1
    tokens."""
    random = np.random.RandomState(seed)
    tokens = int(lengths[documents].sum(dtype=np.int64))
    epochs, apart = plan_epochs(tokens, seq_len, samples)
    parts = [epochs - 1, 1] if apart else [epochs]
    total = (epochs * tokens - 1) // seq_len
    cuts = [0, ((epochs - 1) * tokens - 1) // seq_len, total] if apart else [0, total]
    lines = [_shuffled(np.tile(documents.astype(np.int32), n), random) for n in parts]
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    draws = [
        _shuffled(np.arange(a, b, dtype=kind), random) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    line = np.concatenate(lines)
    return Order(line, np.cumsum(lengths[line], dtype=np.int64), np.concatenate(draws), seq_len)


def in_order(lengths: np.ndarray, documents: np.ndarray, seq_len: int) -> Order:
    """Return one epoch in the order of the file, without a shuffle."""
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    return Order(documents, ends, np.arange((int(ends[-1]) - 1) // seq_len), seq_len)


def split_documents(split: str, documents: int) -> list[tuple[int, int]]:
    """Return the ranges of the training, validation and test documents for a split like
    ``969,30,1``.

    Shares need not sum to anything. Missing shares are 0. Raises UserError for a value that is not
    a share."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    finite = all(0 <= share < float("inf") for share in shares)
    if not (1 <= len(shares) <= 3 and finite and sum(shares) > 0):
        raise UserError(
            f"--data.split {split!r}: one to three shares that are not negative and not all 0, for "
            "training, validation and test; as 969,30,1"
        )
    shares += [0.0] * (3 - len(shares))
    # Megatron divides first, then sums, and rounds half to even. The same floats give the same
    # bounds.
    total, bounds = float(np.sum(np.array(shares))), [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share / total)
    ends = [int(round(bound * float(documents))) for bound in bounds]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values
