"""The mask of attention: the keys that a query may see.

One rule, ``sees``, defines the mask for all attention cores (attention_kernels.py), for the shards
of context parallelism (context_parallel.py) and for generation (kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class AttentionMask:
    """The mask: a token sees itself and earlier tokens of its sequence. Where documents are given,
    a token sees only tokens of its own document.

    ``seq_len``: the number of tokens of a sequence.
    ``window``: the number of tokens that a token sees at most, itself included.
    ``chunked``: the sequence has chunks of ``window`` tokens, and a token sees only tokens of its
        own chunk (Llama 4). Otherwise it sees the last ``window`` tokens.
    ``softcap``: bounds scores to (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118).
    ``scale``: the factor on scores, applied before the soft-cap (None: 1 / sqrt(H)).
    ``queries [B, S]``, ``keys [S]``: the places of the given queries and keys in the sequence
        (None: the whole sequence in order; B = 1: the same in every row). kv_cache.py and
        context_parallel.py set the places.
    ``blocks``: for flex only, see ``with_blocks`` in attention_kernels.py.
    ``selected [B, queries, keys]``: the pairs that see each other. No other rule counts beside it
        (sparse_attention.py)."""

    seq_len: int
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    blocks: FlexBlocks | None = None
    chunked: bool = False
    selected: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether each token of a whole row sees itself and all earlier tokens."""
        return not self.windowed and self.queries is None and self.selected is None

    @property
    def windowed(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and self.window < self.seq_len

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the places of the given queries, ``[B, S]``, and of the given keys, ``[S]``."""
        whole_S = torch.arange(self.seq_len, device=device)
        queries = whole_S[None] if self.queries is None else self.queries
        return queries, whole_S if self.keys is None else self.keys


def sees(
    mask: AttentionMask, documents_BS: Tensor | None, b: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """Return whether query i of row b may see key j, for indices of any shapes that broadcast. All
    cores use this rule: the reference for all pairs at once, a compiled kernel for one pair."""
    ok = j <= i
    if mask.window is not None and mask.windowed:
        near = i // mask.window == j // mask.window if mask.chunked else i - j < mask.window
        ok = ok & near
    if documents_BS is not None:
        ok = ok & (documents_BS[b, i] == documents_BS[b, j])
    return ok


def allowed(mask: AttentionMask, documents_BS: Tensor | None, device: torch.device) -> Tensor:
    """Return ``[B, 1, S, S]``: True where the query (row) may see the key (column). B = 1 if all
    batch rows are the same."""
    if mask.selected is not None:
        return mask.selected[:, None]
    i, j = mask.places(device)
    rows = max(len(i), 1 if documents_BS is None else len(documents_BS))
    b = torch.arange(rows, device=device)[:, None, None, None]
    return sees(mask, documents_BS, b, i[:, None, :, None], j).expand(rows, 1, -1, -1)


@dataclass(frozen=True)
class MaskRule:
    """The rule of a mask for one pair of indices, of any shapes that broadcast.

    ``queries``: the places of queries, for each row."""

    mask: AttentionMask
    documents_BS: Tensor | None
    queries: Tensor | None

    def __call__(self, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return whether query i of row b may see key j. All heads n have one mask."""
        if self.mask.selected is not None:
            return self.mask.selected[b, i, j]
        query = i if self.queries is None else self.queries[b, i]
        key = j if self.mask.keys is None else self.mask.keys[j]
        return sees(self.mask, self.documents_BS, b, query, key)


@dataclass(frozen=True)
class FlexBlocks:
    """flex's block mask as plain data, so that a compiled block takes its tensors as inputs.

    ``values``: the arguments of ``BlockMask`` but its rule.
    ``rule``: ``MaskRule``, or another rule for one pair of indices."""

    values: dict[str, Any]
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, made: BlockMask, rule: MaskRule) -> FlexBlocks:
        names = [name for name in signature(BlockMask).parameters if name != "mask_mod"]
        return cls({name: getattr(made, name) for name in names}, rule)

    @classmethod
    def of_selected(cls, mask: AttentionMask, size: int = 128) -> FlexBlocks:
        """Return the blocks of ``mask.selected``. A block is empty if none of its queries selects
        one of its keys. Otherwise flex asks for each pair. Plain operators make the blocks, so they
        may be in a recomputed region."""
        assert mask.selected is not None
        queries, keys = mask.selected.shape[1:]
        pairs = F.pad(mask.selected, (0, -keys % size, 0, -queries % size))
        some_BQK = pairs.unflatten(2, (-1, size)).unflatten(1, (-1, size)).any(-1).any(2)
        counts = some_BQK.sum(-1, dtype=torch.int32)[:, None]
        order = some_BQK.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]
        rule = MaskRule(mask, None, None)
        made = BlockMask.from_kv_blocks(
            counts, order, BLOCK_SIZE=size, mask_mod=rule, seq_lengths=(queries, keys)
        )
        return cls.of(made, rule)

    def block_mask(self) -> BlockMask:
        def rule(b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self.rule(b, n, i, j)

        return BlockMask(**self.values, mask_mod=rule)


def chunks_of_documents(documents_T: Tensor, seq_len: int, size: int) -> Tensor:
    """Return documents that are the chunks of ``size`` tokens of the given documents, ``[T]``.
    Rank-local.

    ``documents_T``: the document of each token of whole rows."""
    documents_BS = documents_T.unflatten(0, (-1, seq_len))
    places_S = torch.arange(seq_len, device=documents_T.device)
    first_BS = documents_BS != documents_BS.roll(1, 1)
    first_BS = first_BS | (places_S == 0)
    start_BS = torch.where(first_BS, places_S, 0).cummax(1).values
    return (((places_S - start_BS) % size == 0) | first_BS).cumsum(1).flatten()
