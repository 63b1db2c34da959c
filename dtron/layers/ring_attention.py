"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values go round, queries stay.

Each of n ranks holds a shard of every row. Ring attention takes n steps. In step 0 a rank attends
to its own keys and values. In each later step it receives keys and values from the previous rank
and passes its current ones to the next rank. The softmax of one step covers only some of the keys.
Two such results merge by their log-sum-exps (Milakov & Gimelshein 2018, arXiv:1805.02867):

    lse = log(e^lse_1 + e^lse_2)        out = out_1 e^(lse_1 - lse) + out_2 e^(lse_2 - lse)

The exchange for a step is posted before the computation of the previous step. So that computation
hides the exchange.

There are two implementations:

- ``ring_plainly`` works for every mask. Each step runs an attention core that also returns its lse.
  Autograd derives the backward ring.
- ``ring`` works for the plain causal mask, on fused kernels. For backward it saves only the rank's
  own keys and values. In backward all keys and values go round once more. The sum of their
  gradients follows one step behind: every rank adds to the sum, and the sum ends on the rank that
  owns the keys.

Under a causal mask half of all query-key pairs are masked. In zig-zag order (see token_order.py) a
rank has an early half, 0, and a late half, 1. Between a rank's queries and another rank's keys, two
of the four pairs of halves are unmasked, and each of the two is unmasked as a whole:

- Query half 1 always sees key half 0.
- Query half 0 sees key half 0 if the key shard is earlier. Query half 1 sees key half 1 if the key
  shard is later.

``ring`` computes only these two pairs. So ``ring`` does no masked work, and every rank does the
same amount of work in every step. A tensor selects the pair, and all ranks run the same program: a
compiler that moves collectives must find the same collectives on every rank. In contiguous order
the last rank needs every shard, and the other ranks wait for the last rank. Meanwhile they compute
results that they discard.

Left out: skipping the communication of steps that a sliding window makes empty. flex skips their
computation block by block, but their keys and values are still sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.collectives import AxisGroup, shift, wait
from dtron.layers.attention_block_kernels import BlockResult, block_backward, block_forward
from dtron.layers.attention_kernels import attention_and_lse, with_sinks
from dtron.layers.attention_mask import AttentionMask

AXIS = "sequence"
Result = tuple[Tensor, Tensor]  # out, lse


def merge(a: Result, b: Result) -> Result:
    """Merge the attention results for two sets of keys, in float32 at least. In ``a`` every query
    must have seen at least one key."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * (lse_a - lse).exp()[..., None] + o_b * (lse_b - lse).exp()[..., None], lse


def ring_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    masks: Sequence[AttentionMask],
    peers: AxisGroup,
    flex: bool,
) -> Tensor:
    """Run the ring for any mask, with autograd's backward. Shapes as in attention_kernels.py.

    ``masks``: one mask per step, with the places of its queries and keys."""
    message, merged = _pack(k, v), None
    for step, mask in enumerate(masks):
        coming = _Shift.apply(message, *peers.args) if step + 1 < len(masks) else None
        result = attention_and_lse(q, *_unpack(message, k, v), documents_BS, mask, flex)
        merged = result if merged is None else merge(merged, result)
        if coming is not None:
            message = _Wait.apply(coming)
    assert merged is not None  # the first step is this rank's own keys
    o, lse = merged
    o = o if sinks_N is None else with_sinks(o, lse, sinks_N)
    return o.to(v.dtype)


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    later: Tensor,
    zigzag: bool,
    peers: AxisGroup,
    scale: float | None = None,
) -> Tensor:
    """Run the ring for the plain causal mask, on fused kernels.

    ``later [n]``: for each step, whether its key shard is later in the row than this rank's shard.
    ``zigzag``: whether rows are in zig-zag order.
    ``scale``: the factor on scores, see ``AttentionMask``."""
    return _Ring.apply(q, k, v, later, _RingOptions(zigzag, scale, peers.args))


class _RingOptions(NamedTuple):
    """The arguments of the ring that are no tensors.

    ``peers``: the group's name, this rank's place, and the number of ranks; see ``shift``."""

    zigzag: bool
    scale: float | None
    peers: tuple[str, int, int]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, later: Tensor, options: _RingOptions
    ) -> Tensor:
        zigzag, scale, peers = options
        steps = peers[-1]
        message = _pack(k, v)
        coming = shift(message, *peers)
        o, lse, dropout = block_forward(q, k, v, causal=True, scale=scale)
        wide = o.to(lse.dtype)
        halves = list(zip(_halves(wide, zigzag), _halves(lse, zigzag), strict=True))
        for step in range(1, steps):
            message = wait(coming)
            if step + 1 < steps:
                coming = shift(message, *peers)
            late, kv = later[step], _unpack(message, k, v)
            if not zigzag:
                o, lse, _ = block_forward(q, *kv, causal=False, scale=scale)
                halves = [merge(halves[0], (o, lse.masked_fill(late, float("-inf"))))]
                continue
            q_2 = _pairs(q, late, first=1)
            k_2, v_2 = (_pairs(x, late, first=0) for x in kv)
            o, lse, _ = block_forward(q_2, k_2, v_2, causal=False, scale=scale)
            (o_1, o_same), (lse_1, lse_same) = o.chunk(2), lse.chunk(2)
            halves = [
                merge(halves[0], (o_same, lse_same.masked_fill(late, float("-inf")))),
                merge(
                    merge(halves[1], (o_1, lse_1)),
                    (o_same, lse_same.masked_fill(~late, float("-inf"))),
                ),
            ]
        o = torch.cat([o.to(q.dtype) for o, _ in halves], dim=2)
        lse = torch.cat([lse for _, lse in halves], dim=2)
        ctx.save_for_backward(q, k, v, o, lse, later, *(dropout or ()))
        ctx.options, ctx.fused = options, dropout is not None
        return o

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, later, *dropout = ctx.saved_tensors
        dropout = tuple(dropout) if ctx.fused else None
        zigzag, scale, peers = ctx.options
        steps = peers[-1]
        returning = None
        message = _pack(k, v)
        coming = shift(message, *peers)
        result = BlockResult(o, lse, dropout)
        dq, dk, dv = block_backward(g, q, k, v, result, causal=True, scale=scale)
        for step in range(1, steps):
            message = wait(coming)
            if step + 1 < steps:
                coming = shift(message, *peers)
            late, kv = later[step], _unpack(message, k, v)
            if zigzag:
                g_2, q_2, o_2, lse_2 = (_pairs(x, late, first=1) for x in (g, q, o, lse))
                k_2, v_2 = (_pairs(x, late, first=0) for x in kv)
                both = BlockResult(o_2, lse_2, dropout)
                grads = block_backward(g_2, q_2, k_2, v_2, both, causal=False, scale=scale)
                grads = [_unpaired(x, late, i) for x, i in zip(grads, (1, 0, 0), strict=True)]
            else:
                grads = block_backward(g, q, *kv, result, causal=False, scale=scale)
                grads = [x.masked_fill(late, 0) for x in grads]
            dq = dq + grads[0]
            sums = _pack(*grads[1:])
            if returning is not None:
                sums = sums + wait(returning)  # previous ranks' sum for the same keys
            returning = shift(sums, *peers)
        assert returning is not None  # a ring has two ranks or more
        dk_others, dv_others = _unpack(wait(returning), k, v)
        return dq, dk + dk_others, dv + dv_others, None, None


def _halves(x: Tensor, zigzag: bool) -> tuple[Tensor, ...]:
    return x.chunk(2, dim=2) if zigzag else (x,)


def _pairs(x: Tensor, late: Tensor, first: int) -> Tensor:
    """Return ``[2B, ...]``: half ``first`` of every row, then one more half of every row.

    ``late``: whether the key shard is later. The second half of the pair is then half 1, and
        otherwise half 0."""
    halves = x.chunk(2, dim=2)
    return torch.cat([halves[first], torch.where(late, halves[1], halves[0])])


def _unpaired(x: Tensor, late: Tensor, first: int) -> Tensor:
    """Undo ``_pairs`` for a gradient. A half that ``_pairs`` used twice gets the sum of both."""
    one, same = x.chunk(2)
    halves = [same.masked_fill(late, 0), same.masked_fill(~late, 0)]
    halves[first] = halves[first] + one
    return torch.cat(halves, dim=2)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Concatenate two tensors into one message."""
    return torch.cat([k.flatten(), v.flatten()])


def _unpack(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a, b = message.split([k.numel(), v.numel()])
    return a.view(k.shape), b.view(v.shape)


class _Shift(torch.autograd.Function):
    """Send a tensor to the next rank. The result is ready only after ``_Wait``. In backward the
    gradient goes to the previous rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, place: int, n: int) -> Tensor:
        ctx.ring = (group, place, n)
        return shift(x, group, place, n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        group, place, n = ctx.ring
        return wait(shift(g, group, place, n, by=-1)), None, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return wait(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g
