"""The transformer: embedding, blocks, norm, head; as a params dataclass and pure functions like every layer.

Pre-norm blocks (x + f(norm(x))), as Llama, Qwen and GPT-2 have them. ``embed`` and then ``stage``, once per
pipeline stage, are the whole model from a batch to the summed loss. What may vary between runs without
changing the result, where weights are gathered and what is recomputed, is decided in ``_run_block`` alone.

Recompute (Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section
5): ``full`` keeps a block's input and runs it again in backward; ``selective`` keeps the outputs of matrix
products and attention and redoes the cheap rest. Under ZeRO-3 a block gathers its weights inside, and no
gathered weight may wait for backward: so a block is always a recomputed region there, and ``none`` then means
that everything but the gathers is kept. Dropout is absent by choice: models of today train without it, and
recomputation needs no random state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dtron.config import ModelConfig
from dtron.fp8 import Recipe
from dtron.how import PLAIN, How
from dtron.layers.attention import Attention, attention
from dtron.layers.context import Context, prepare
from dtron.layers.cores import AttentionPath, Mask
from dtron.layers.embedding import Embedding, embedding
from dtron.layers.loss import IGNORE, Loss, cross_entropy, logits
from dtron.layers.mlp import MLP, mlp
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import rope_tables
from dtron.mesh import Layout
from dtron.order import as_tokens
from dtron.params import declare, flat, gather, part, unflatten, weight


@dataclass(frozen=True)
class Block:
    norm_1: Norm = part()
    attention: Attention = part()
    norm_2: Norm = part()
    mlp: MLP = part()


@dataclass(frozen=True)
class Transformer:
    """The model, or a stage of it with the rest missing; see pipeline.py."""

    embedding: Embedding | None = part()
    blocks: tuple[Block, ...] = part(count="layers")
    norm: Norm | None = part()
    w_head: Tensor | None = weight("vocab", "embed", when="untied")


@dataclass(frozen=True)
class Batch:
    """A microbatch, token-major: rows of ``sequence`` tokens, ``[T@tokens]`` each, one after the other unless
    cp cuts them (see order.py). A target is the next token, or IGNORE. ``documents_T [T@rows]`` are whole
    rows, always one after the other, or None where a row is one document."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    documents_T: Tensor | None
    sequence: int
    zigzag: bool = False


def make_batch(
    rows_BS: Tensor,
    layout: Layout,
    documents_BS: Tensor | None = None,
    positions_BS: Tensor | None = None,
    zigzag: bool = True,
) -> Batch:
    """From rows of sequence + 1 tokens (or targets already IGNOREd in the last ``sequence``): inputs and,
    shifted by one, targets. Every rank passes the same rows and keeps its own: over cp, parts of them, in
    ``zigzag`` order or contiguous."""
    tokens, targets = rows_BS[:, :-1].clamp(min=0), rows_BS[:, 1:]
    b, s = tokens.shape
    if positions_BS is None:
        positions_BS = torch.arange(s, device=rows_BS.device).repeat(b, 1)
    place = lambda t: layout.shard(as_tokens(t, layout, zigzag), "tokens")
    documents = None if documents_BS is None else layout.shard(documents_BS.flatten(), "rows")
    return Batch(place(tokens), place(targets), place(positions_BS), documents, s, zigzag)


def valid_tokens(rows_BS: Tensor) -> int:
    """How many targets of these rows count."""
    return int((rows_BS[:, 1:] != IGNORE).sum())


def declare_model(model: ModelConfig) -> Transformer:
    return declare(Transformer, model.dims())


def block(
    p: Block,
    x_TD: Tensor,
    table_TH: Tensor | None,
    documents_T: Tensor | None,
    mask: Mask | Context,
    m: ModelConfig,
    layout: Layout,
    path: AttentionPath = "auto",
    recipe: Recipe | None = None,
) -> Tensor:
    """``x_TD [T@tokens_sp, D]`` -> the same. ``recipe``: matrix products in FP8, or None."""
    h_TD = norm(p.norm_1, x_TD, m.norm_eps)
    x_TD = x_TD + attention(p.attention, h_TD, table_TH, documents_T, mask, layout, m.norm_eps, path, recipe)
    return x_TD + mlp(p.mlp, norm(p.norm_2, x_TD, m.norm_eps), layout, m.activation, recipe)


def embed(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """What the first stage takes: ``x_TD [T@tokens_sp, D]``."""
    return embedding(gather(p.embedding, layout), batch.tokens_T, batch.positions_T, layout)


def stage(
    p: Transformer, x_TD: Tensor, batch: Batch, m: ModelConfig, layout: Layout, how: How = PLAIN
) -> Tensor:
    """The blocks of a stage, and in the last one the head. ``x_TD [T@tokens_sp, D]`` -> the same, or the
    summed loss over the batch's valid tokens, its sum over data ranks still pending."""
    x_TD = _trunk(p, x_TD, batch, m, layout, how)
    if p.norm is None:
        return x_TD
    return cross_entropy(x_TD, _head(p, layout), batch.targets_T, Loss(m.vocab, z=m.z_loss), layout)


def stage_logits(p: Transformer, x_TD: Tensor, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """``stage``, but the last one gives logits ``[T@tokens, vocab]``, in float32 at least."""
    x_TD = _trunk(p, x_TD, batch, m, layout, PLAIN)
    return x_TD if p.norm is None else logits(x_TD, _head(p, layout), m.vocab, layout)


def forward(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout, how: How = PLAIN) -> Tensor:
    """The whole model as one stage: the summed loss."""
    return stage(p, embed(p, batch, m, layout), batch, m, layout, how)


def predict(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """The whole model as one stage: the logits."""
    return stage_logits(p, embed(p, batch, m, layout), batch, m, layout)


def _head(p: Transformer, layout: Layout) -> Tensor:
    return layout.gather(p.embedding.w_tokens if p.w_head is None else p.w_head)


def _trunk(p: Transformer, x_TD: Tensor, batch: Batch, m: ModelConfig, layout: Layout, how: How) -> Tensor:
    """The blocks, and in the last stage the norm before the head."""
    table_TH = None
    if m.positions == "rotary":
        make = partial(rope_tables, m.rope, head_dim=m.head_dim, dtype=x_TD.dtype)
        table_TH = layout.local(make, (("tokens",),), ("tokens", None))(batch.positions_T)
    mask = Mask(batch.sequence, m.window, m.softcap)
    mask, path = prepare(
        mask, batch.documents_T, m.sinks, m.head_dim, x_TD, layout, how.attention, how.cp, batch.zigzag
    )
    # With a tied head the last stage has an embedding too.
    first = p.embedding is not None and (p.norm is None or len(p.blocks) == m.layers)
    for i, p_block in enumerate(p.blocks):
        end = (first and i == 0) or (p.norm is not None and i == len(p.blocks) - 1)
        run = partial(block, mask=mask, m=m, layout=layout, path=path, recipe=how.recipe(end))
        x_TD = _run_block(run, p_block, x_TD, table_TH, batch.documents_T, layout, how.recompute)
    return x_TD if p.norm is None else norm(gather(p.norm, layout), x_TD, m.norm_eps)


def _run_block(
    block: Callable, p: Block, x_TD: Tensor, table_TH, documents_T, layout: Layout, recompute: str
) -> Tensor:
    def run(p: Block, x_TD: Tensor) -> Tensor:
        # ZeRO-3: an all-gather over dp; otherwise nothing is left to do.
        return block(gather(p, layout), x_TD, table_TH, documents_T)

    def run_all_kept(p: Block, x_TD: Tensor) -> Tensor:
        kept.gathering = True
        p = gather(p, layout)
        kept.gathering = False
        return block(p, x_TD, table_TH, documents_T)

    def run_gathered(p: Block, x_TD: Tensor) -> Tensor:
        gathered = region(lambda *ws: tuple(layout.gather(w) for w in ws), *flat(p))
        return block(unflatten(p, list(gathered)), x_TD, table_TH, documents_T)

    region = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if not torch.is_grad_enabled():
        return run(p, x_TD)
    if recompute == "full":
        return region(run, p, x_TD)
    if recompute == "selective":
        return region(run, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, _matmuls))
    if not any(layout.gathers(w) for w in flat(p)):
        return run(p, x_TD)
    if torch.compiler.is_compiling():
        return run_gathered(p, x_TD)  # what else to keep, a compiler decides by itself
    kept = _AllKept()
    return region(run_all_kept, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, kept))


_MATMULS = ("mm", "addmm", "bmm", "_scaled_mm", "_scaled_dot_product", "flex_attention")


def _is_view(op) -> bool:
    schema = getattr(op, "_schema", None)  # flex_attention, an operator that takes functions, has none
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _matmuls(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective: keep the outputs of matrix products and attention."""
    keep = getattr(op, "overloadpacket", op).__name__.startswith(_MATMULS) and not _is_view(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _AllKept:
    """Keep everything but gathered weights and views (of them, it may be)."""

    def __init__(self):
        self.gathering = False

    def __call__(self, ctx, op, *args, **kwargs) -> CheckpointPolicy:
        keep = not self.gathering and not _is_view(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def parameter_count(m: ModelConfig) -> int:
    return sum(w.numel for w in flat(declare_model(m)))


def flops_per_token(m: ModelConfig, sequence: int) -> float:
    """Of forward and backward, without recomputation: 6 per weight that multiplies (all but embeddings that
    are looked up), and 6 * layers * heads * head_dim * sequence for causal attention, half of the full square
    (PaLM, arXiv:2204.02311, appendix B, halved)."""
    spec = declare_model(m)
    looked_up = sum(w.numel for w in flat(spec.embedding)) - (spec.embedding.w_tokens.numel if m.tied else 0)
    w = min(m.window or sequence, sequence)
    attended = w - w * w / (2 * sequence)  # tokens, on average: half the sequence without a window
    return 6.0 * (parameter_count(m) - looked_up) + 12.0 * m.layers * m.heads * m.head_dim * attended
