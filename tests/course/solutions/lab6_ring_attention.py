"""The reference solution of lab 6."""

import torch

from dtron.distributed.collectives import ring_shift
from dtron.layers.attention_kernels import attention_and_lse


def merge(a, b):
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a * share_a + out_b * share_b, lse


def zigzag(seq_len, ranks):
    chunk = seq_len // (2 * ranks)
    chunks = [list(range(i * chunk, (i + 1) * chunk)) for i in range(2 * ranks)]
    return [chunks[r] + chunks[2 * ranks - 1 - r] for r in range(ranks)]


def pairs(places):
    return sum(i + 1 for i in places)


def ring_attention(q, k, v, masks, peers):
    result = attention_and_lse(q, k, v, None, masks[0])
    for mask in masks[1:]:
        k, v = ring_shift(k, peers), ring_shift(v, peers)
        result = merge(result, attention_and_lse(q, k, v, None, mask))
    return result[0]
