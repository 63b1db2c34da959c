"""In which order a run meets the documents of an indexed corpus: the order of Megatron's
GPTDataset.

Three shuffles decide it, all from one ``numpy.random.RandomState(seed)``. With N samples of L
tokens to draw from documents that have T tokens together:

1. **Epochs.** A sample is L inputs and their L targets, L + 1 tokens, and shares its last with the next one.
   So E epochs, the smallest with ``E * T >= N * L + 1``, are enough.
2. **Documents.** The documents of all E epochs are shuffled together: one may come twice before another comes
   once. Where that would hurt, because less than 80 % of the last epoch's samples are needed, the last epoch
   is shuffled apart, after the others.
3. **Samples.** That row of documents is one long line of tokens, and sample k begins at its token ``k * L``.
   The samples of the full epochs are shuffled, then those of the last one if it stands apart.

``Order`` is the result: a pure function of (lengths, L, N, seed). What only follows from the line
of tokens, which document sample k begins in, is looked up when asked (a bisection) and not kept.
Left out: partial samples at the end of an epoch, which Megatron can pad for validation, and saving
the order to disk: building it takes a second or two for ten million documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtron.errors import UserError

APART = 0.8  # of an epoch's samples: a last epoch that gives fewer is shuffled apart


@dataclass(frozen=True, eq=False)
class Order:
    """``documents`` [E * n] ids in the order they are read, ``ends`` where each ends in the line of
    tokens, ``shuffle`` [samples] which sample of the line is drawn i-th."""

    documents: np.ndarray
    ends: np.ndarray
    shuffle: np.ndarray
    sequence: int

    def __len__(self) -> int:
        return len(self.shuffle)

    def place(self, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places in the line of tokens: which of ``documents`` each is in, and how far
        inside."""
        at = np.searchsorted(self.ends, token, side="right")
        before = np.where(at > 0, self.ends[at - 1], 0)
        return at, token - before


def plan_epochs(tokens: int, sequence: int, samples: int) -> tuple[int, bool]:
    """``(E, whether the last of them is shuffled apart)`` for ``samples`` from epochs of
    ``tokens``."""
    epochs = max(1, -(-(samples * sequence + 1) // tokens))
    if epochs == 1:
        return 1, False
    from_last = samples - ((epochs - 1) * tokens - 1) // sequence
    return epochs, from_last < int(APART * ((tokens - 1) // sequence))


def most_samples(tokens: int, sequence: int, samples: int) -> int:
    """The largest number of samples that has the same order as ``samples``."""
    epochs, apart = plan_epochs(tokens, sequence, samples)
    if not apart:
        return (epochs * tokens - 1) // sequence
    of_full = ((epochs - 1) * tokens - 1) // sequence
    return of_full + int(APART * ((tokens - 1) // sequence)) - 1


def make_order(
    lengths: np.ndarray, documents: np.ndarray, sequence: int, samples: int, seed: int
) -> Order:
    """The order of ``samples`` samples, or a few more, of the ``documents`` (ids) of an index that
    has ``lengths`` [all documents]. Their tokens together must be ``sequence`` + 1 at least."""
    random = np.random.RandomState(seed)
    tokens = int(lengths[documents].sum(dtype=np.int64))
    epochs, apart = plan_epochs(tokens, sequence, samples)
    parts = [epochs - 1, 1] if apart else [epochs]
    total = (epochs * tokens - 1) // sequence
    cuts = [0, ((epochs - 1) * tokens - 1) // sequence, total] if apart else [0, total]
    lines = [_shuffled(np.tile(documents.astype(np.int32), n), random) for n in parts]
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    draws = [
        _shuffled(np.arange(a, b, dtype=kind), random) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    line = np.concatenate(lines)
    return Order(line, np.cumsum(lengths[line], dtype=np.int64), np.concatenate(draws), sequence)


def in_order(lengths: np.ndarray, documents: np.ndarray, sequence: int) -> Order:
    """One epoch as it lies in the file, nothing shuffled."""
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    return Order(documents, ends, np.arange((int(ends[-1]) - 1) // sequence), sequence)


def split_documents(split: str, documents: int) -> list[tuple[int, int]]:
    """``969,30,1`` of so many documents: from where to where the training, validation and test
    documents go.

    Shares need not sum to anything; missing ones are 0. Raises UserError for what is no share.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if (
        not 1 <= len(shares) <= 3
        or not all(0 <= share < float("inf") for share in shares)
        or not sum(shares)
    ):
        raise UserError(
            f"--data.split {split!r}: one to three shares that are not negative and not all 0, for training, "
            "validation and test; as 969,30,1"
        )
    shares += [0.0] * (3 - len(shares))
    # Megatron divides first and sums then, and rounds half to even: the same float for the same
    # bounds.
    total, bounds = float(np.sum(np.array(shares))), [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share / total)
    ends = [int(round(bound * float(documents))) for bound in bounds]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values
