"""The largest attention logit of each head, for QK-clip (training/qk_clip.py).

A logit is the scaled product of a query and a key, before the soft-cap. The maximum is over the
pairs that see each other. Fused attention kernels do not return it. So ``largest_logits`` computes
the products once more, without gradients, for some queries at a time. The ``[S, S]`` matrix is
never in memory as a whole.

It is an operator of its own, which no compiler and no recomputed region looks into: a recomputed
region may keep the results of matmuls, and would keep all logits.

Left out: the maxima of flex_attention (``AuxRequest(max_scores=True)``). They need flex's kernels
and block masks where attention takes sdpa or a ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.layers.attention_mask import AttentionMask, sees

LOGITS_AT_ONCE = 1 << 27  # 256 MiB in bfloat16


def largest_logits(
    q: Tensor, k: Tensor, documents_BS: Tensor | None, mask: AttentionMask
) -> Tensor:
    """Return the largest logit of each head, ``[N]``, in float32 at least. It has no gradient.

    ``q``: ``[B, N, S, H]``.
    ``k``: ``[B, K, S, H]``.
    ``documents_BS``: see ``sees``.
    ``mask``: the mask; its ``queries`` and ``keys`` may be places in the row."""
    with torch.no_grad():
        return _largest_logits(
            q.detach(),
            k.detach(),
            documents_BS,
            mask.queries,
            mask.keys,
            mask.seq_len,
            mask.window if mask.windowed else None,
            mask.scale,
            mask.chunked,
        )


@torch.library.custom_op(
    "dtron::largest_logits",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor? documents, Tensor? queries, Tensor? keys, int seq_len, "
        "int? window, float? scale, bool chunked) -> Tensor"
    ),
)
def _largest_logits(
    q: Tensor,
    k: Tensor,
    documents: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    seq_len: int,
    window: int | None,
    scale: float | None,
    chunked: bool,
) -> Tensor:
    mask = AttentionMask(seq_len, window, None, scale, queries, keys, chunked=chunked)
    (rows, heads, length, width), (key_heads, key_count) = q.shape, k.shape[1:3]
    b = torch.arange(rows, device=q.device)[:, None, None]
    i_BS, j_S = mask.places(q.device)
    ordered, k = queries is None and keys is None, k.contiguous()
    largest = q.new_full((heads,), float("-inf"))
    size = max(1, LOGITS_AT_ONCE // (rows * heads * key_count))
    for start in range(0, length, size):
        stop = min(start + size, length)
        # In a whole row no later key is seen, and without windows and documents all earlier ones
        # are: only the rest needs a mask, which is a pass over the memory.
        end = stop if ordered else key_count
        some = start if ordered and window is None and documents is None else 0
        i, j = i_BS[:, start:stop, None], j_S[some:end]
        hidden = ~sees(mask, documents, b, i, j)[:, None, None]  # [B or 1, 1, 1, queries, keys]
        groups = q[:, :, start:stop].unflatten(1, (key_heads, -1))
        logits = (groups.flatten(2, 3) @ k[:, :, :end].mT).unflatten(2, (-1, stop - start))
        logits[..., some:].masked_fill_(hidden, float("-inf"))
        largest = torch.maximum(largest, logits.amax((0, 3, 4)).flatten())
    wide = largest.to(torch.promote_types(q.dtype, torch.float32))
    return wide * (width**-0.5 if scale is None else scale)


@_largest_logits.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
