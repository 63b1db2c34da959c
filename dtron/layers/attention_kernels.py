"""Attention cores: one function, as a plain reference and through two kinds of fused kernel.

- ``attention_reference`` is the definition: scores, soft-cap, mask, sinks, softmax, with the whole
  ``[S, S]`` matrix in memory.
- ``attention_sdpa`` is torch's fused attention, the fastest core for a plain causal mask. It takes
  other masks as a bias. It has no soft-cap and no sinks.
- ``attention_flex`` is flex_attention (Dong et al. 2024, arXiv:2412.05496). It compiles a kernel
  for any mask and skips empty blocks of the mask. It runs on GPUs only, because torch has no
  backward for flex_attention on a CPU.

All cores have one signature, ``(q [B, N, S, H], k [B, K, S, H], v [B, K, S, W], documents_BS,
sinks_N, mask) -> [B, N, S, W]``, and a test checks that they agree. W equals H except in latent
attention. ``choose`` selects the core for ``auto``.

A sink (Xiao et al. 2023, arXiv:2309.17453; as a learned score, gpt-oss) is one more term in the
denominator of a head's softmax. A head that finds no relevant token gives its weight to the sink
and adds little. In a plain softmax the weights of tokens always sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from dtron.errors import UserError
from dtron.layers.attention_mask import AttentionMask, FlexBlocks, MaskRule, allowed
from dtron.layers.recompute import recompute_in_backward
from dtron.torch_compile import flex_in_trace, jit, kernel_device, planned, tracing

AttentionPath = Literal["auto", "reference", "sdpa", "flex"]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    mask: AttentionMask,
) -> Tensor:
    """Define attention, for every mask. The softmax runs in float32 at least."""
    k, v = repeated(k, q), repeated(v, q)
    scores = _scores(q, k, documents_BS, mask)
    if sinks_N is not None:  # a key that every query sees, without a value
        sink = sinks_N.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def products(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Return the scaled scores q k^T, ``[B, N, S, S]``, in float32 at least."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale


def _scores(q: Tensor, k: Tensor, documents_BS: Tensor | None, mask: AttentionMask) -> Tensor:
    """Return the scores ``[B, N, S, S]``: -inf where a query does not see a key."""
    scores = products(q, k, mask.scale)
    if mask.softcap is not None:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    return scores.masked_fill(~allowed(mask, documents_BS, q.device), float("-inf"))


def attention_and_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    mask: AttentionMask,
    flex: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, N, S, H], lse [B, N, S])`` for the given keys, which may be some of a row's
    keys. Both results are differentiable. A query that sees no key has out = 0 and lse = -inf.

    lse is the logarithm of the softmax's denominator. By their lse the results for two sets of keys
    can be merged.

    ``flex``: run through flex, and otherwise as plain matmuls."""
    if flex:
        mask = mask if mask.blocks is not None else with_blocks(mask, documents_BS, q.device)
        return by_itself(run_flex, q.device)(q, k, v, mask)
    k, v = repeated(k, q), repeated(v, q)
    scores = _scores(q, k, documents_BS, mask)
    top = scores.detach().amax(-1, keepdim=True)
    odds = (scores - top.masked_fill(top.isinf(), 0)).exp()
    total = odds.sum(-1, keepdim=True)
    some = total > 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, top + total.log(), float("-inf"))
    return (odds / total).to(v.dtype) @ v, lse[..., 0]


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    mask: AttentionMask,
) -> Tensor:
    """Run torch's fused attention. A plain causal mask needs no ``[S, S]`` matrix; other masks need
    a mask of this size. Raises UserError for a soft-cap and for sinks: the kernels have neither."""
    if mask.softcap is not None or sinks_N is not None:
        raise UserError(
            f"softcap={mask.softcap}, sinks={sinks_N is not None}: sdpa has neither; use "
            "--attention-kernel auto"
        )

    def repeat(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return repeated(k, q), repeated(v, q)

    if q.shape[1] != k.shape[1]:
        k, v = recompute_in_backward(repeat, k, v)
    plain = mask.plain and documents_BS is None
    bias = None if plain else allowed(mask, documents_BS, q.device)
    if q.is_cuda:
        kernels = sdpa_kernel(_FASTEST, set_priority=True)
    elif _LSE_IS_FLOAT32 and q.dtype == torch.float64 and tracing():
        kernels = sdpa_kernel(SDPBackend.MATH)
    else:
        kernels = nullcontext()
    with kernels:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=plain, scale=mask.scale
        )


# The compiler of torch 2.11 takes the CPU kernel's logsumexp for float32, in float64 too, and
# backward then refuses it.
_LSE_IS_FLOAT32 = torch.__version__ < "2.13"

# On an H200 (head_dim 128, sequence 4096, bf16) cuDNN reaches 545 TFLOP/s forward and 439
# backward, flash 271 and 226.
_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def repeated(k: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values, once for every query head that shares them."""
    if q.shape[1] == k.shape[1]:
        return k
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    mask: AttentionMask,
) -> Tensor:
    """Run flex_attention, for every mask. Inside a compiled stage, flex_attention is compiled with
    the stage. Elsewhere on a GPU it is compiled by itself: uncompiled it would make the ``[S, S]``
    matrix that it is meant to avoid."""
    if mask.blocks is None:
        mask = with_blocks(mask, documents_BS, q.device)
    o, lse = by_itself(run_flex, q.device)(q, k, v, mask, sinks_N is not None)
    return o if sinks_N is None else with_sinks(o, lse, sinks_N)


def with_sinks(o: Tensor, lse: Tensor, sinks_N: Tensor) -> Tensor:
    """Add sinks to a plain softmax's result. A softmax with one more term e^sink in its denominator
    is the plain softmax times e^lse / (e^lse + e^sink). Gradients flow through lse too."""
    share = torch.sigmoid(lse - sinks_N.to(lse.dtype)[:, None])
    return o * share[..., None].to(o.dtype)


def with_blocks(
    mask: AttentionMask, documents_BS: Tensor | None, device: torch.device
) -> AttentionMask:
    """Return the mask with flex's block mask: for each block of 128 queries by 128 keys, whether
    the block is empty, full or partial. All layers share the block mask. A stage makes it once,
    before its transformer blocks, because torch does not compile this construction inside a
    recomputed region."""
    if mask.selected is not None:
        return replace(mask, blocks=FlexBlocks.of_selected(mask))
    rows = None if documents_BS is None else len(documents_BS)
    queries = None if mask.queries is None else mask.queries.expand(rows or 1, -1)
    sizes = (mask.seq_len if x is None else x.shape[-1] for x in (queries, mask.keys))

    rule = MaskRule(mask, documents_BS, queries)
    make = by_itself(_blocks, device)
    return replace(mask, blocks=FlexBlocks.of(make(rule, rows, *sizes, device), rule))


def _blocks(rule: MaskRule, rows: int | None, q: int, kv: int, device: torch.device) -> BlockMask:
    def seen(b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rule(b, n, i, j)

    return create_block_mask(seen, rows, None, q, kv, device)


def run_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    lse: bool = True,
    kernel: Literal["AUTO", "TRITON"] = "TRITON",
) -> tuple[Tensor, Tensor | None]:
    """Run flex_attention.

    ``lse``: whether the log-sum-exp is returned too.
    ``kernel``: ``TRITON`` has a differentiable log-sum-exp. ``AUTO`` takes a kernel for decoding
        where there are less than 128 queries."""
    if (plan := planned()) is not None:
        return plan.attention(q, k, v, mask)

    def capped(score: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask.softcap is not None
        return mask.softcap * torch.tanh(score / mask.softcap)

    with flex_in_trace():
        o, aux = flex_attention(
            q,
            k,
            v,
            score_mod=None if mask.softcap is None else capped,
            block_mask=None if mask.blocks is None else mask.blocks.block_mask(),
            scale=mask.scale,
            enable_gqa=True,
            kernel_options={"BACKEND": kernel},
            return_aux=AuxRequest(lse=lse),
        )
    return o, aux.lse


def by_itself(fn: Callable, device: torch.device) -> Callable:
    """Return fn, compiled if it runs on a GPU and no enclosing stage is being compiled."""
    if tracing():
        return fn
    if (plan := planned()) is not None:
        return plan.as_kernel(fn)
    return fn if device.type != "cuda" else _compiled(fn)


@cache
def _compiled(fn: Callable) -> Callable:
    return jit(fn)


LEAST_HEAD_DIM = 16  # flex's minimum on a GPU: the smallest size of a tensor core


def choose(
    path: AttentionPath,
    mask: AttentionMask,
    documents: bool,
    sinks: bool,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPath:
    """Resolve ``auto``; return any other path as it is.

    A plain causal mask takes sdpa. Any other mask takes flex, on a GPU where flex's kernels support
    the arguments. Otherwise the mask takes sdpa with a bias if a bias can express it, else the
    reference. flex's kernels round head_dim up to a power of two, but have a minimum. They
    accumulate in float32, so they are not used for float64.

    ``documents``: whether documents are given.
    ``sinks``: whether the layer has sinks.
    ``head_dim``: the smallest width of a head."""
    if path != "auto":
        return path
    slow = with_bias(mask.softcap, sinks)
    if slow == "sdpa" and not documents and mask.plain:
        return "sdpa"
    if kernel_device(device) == "cuda" and head_dim >= LEAST_HEAD_DIM and dtype != torch.float64:
        return "flex"
    return slow


def with_bias(softcap: float | None, sinks: bool) -> AttentionPath:
    """Return the path for a mask that is an explicit matrix: sdpa if a bias can express all of
    attention, else the reference."""
    return "sdpa" if softcap is None and not sinks else "reference"


CORES = {"reference": attention_reference, "sdpa": attention_sdpa, "flex": attention_flex}
