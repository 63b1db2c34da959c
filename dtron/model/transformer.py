"""The transformer: embedding, blocks, norm, head. Like every layer, it is a params dataclass and
pure functions.

Blocks are pre-norm, x + f(norm(x)), as in Llama, Qwen and GPT-2. ``embed``, followed by
``stage`` once per pipeline stage, is the whole model from a batch to the summed loss.
activation_checkpoint.py alone decides where weights are all-gathered and which activations are
recomputed; both may vary between runs without changing the result. Dropout is left out on
purpose: current models train without it, and recompute then needs no random state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtron.fp8.recipe import Recipe
from dtron.layers.cross_entropy import IGNORE, Loss, cross_entropy, logits, over_all
from dtron.layers.embedding import Embedding, embedding
from dtron.layers.mixer import Mixer, MixerInputs, StageInputs
from dtron.layers.mlp import MLP, mlp
from dtron.layers.norm import Norm, norm
from dtron.layers.recompute import mlp_chunk_tokens
from dtron.layers.token_order import as_tokens
from dtron.mesh import Layout
from dtron.model.activation_checkpoint import (
    NONE,
    ActivationPolicy,
    BlockFunction,
    run_block,
    run_end,
)
from dtron.model.batch import Batch
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.mtp import module
from dtron.moe.dispatch import Dispatch
from dtron.moe.layer import MoELayer, TokenInfo, moe
from dtron.params import declare, gather, part, value, weight
from dtron.schedules.runner import StageOutput


@dataclass(frozen=True)
class Block:
    norm_1: Norm = part()
    mixer: Any = part(choose="mixer")
    norm_2: Norm = part()
    mlp: MLP | None = part(when="dense")
    moe: MoELayer | None = part(when="sparse")
    letter: str = value("letter")
    window: int | None = value("window")


@dataclass(frozen=True)
class Module:
    """One module of multi-token prediction; see model/mtp.py."""

    norm_h: Norm = part()
    norm_token: Norm = part()
    w_h: Tensor = weight("embed", "act_embed")
    w_token: Tensor = weight("embed", "act_embed")
    block: Block = part()
    norm: Norm = part()


@dataclass(frozen=True)
class Transformer:
    """The model, or one stage of it with the other params missing; see training/pipeline.py."""

    embedding: Embedding | None = part()
    blocks: tuple[Block, ...] = part(count="layers", each="blocks")
    norm: Norm | None = part()
    w_head: Tensor | None = weight("vocab", "embed", when="untied")
    mtp: tuple[Module, ...] = part(count="mtp_depth", each="mtp")

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """All blocks; the blocks of multi-token prediction come last."""
        return (*self.blocks, *(module.block for module in self.mtp))


def declare_model(model: ModelConfig) -> Transformer:
    return declare(Transformer, model.dims())


@dataclass(frozen=True)
class BlockInputs:
    """The inputs of a block besides weights, activations, model and layout.

    ``mixer``, ``mixer_inputs``: the block's mixer and its inputs.
    ``seen``: for experts, see ``moe``.
    ``dispatch``: the dispatcher of tokens to experts.
    ``recipe``: matmuls in FP8, or None.
    ``chunk``: chunk size of the MLP, see ``mlp``."""

    mixer: Mixer
    mixer_inputs: MixerInputs
    seen: TokenInfo | None = None
    dispatch: Dispatch = "auto"
    recipe: Recipe | None = None
    chunk: int | None = None


def block(
    p: Block,
    x_TD: Tensor,
    before_E: Tensor | None,
    inputs: BlockInputs,
    m: ModelConfig,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Apply a block: ``x_TD [T@tokens_sp, D]`` -> ``(x_TD,)``. A block with experts also returns
    its term of the loss and the fields of its ``LayerStats``. ``before_E``: for experts, see
    ``moe``."""
    h_TD = norm(p.norm_1, x_TD, m.norm_eps)
    x_TD = x_TD + inputs.mixer.apply(p.mixer, h_TD, inputs.mixer_inputs, layout)
    h_TD = norm(p.norm_2, x_TD, m.norm_eps)
    if p.moe is None:
        return (x_TD + mlp(p.mlp, h_TD, layout, m.activation, inputs.recipe, inputs.chunk),)
    y_TD, aux, report = moe(
        p.moe, h_TD, inputs.seen, m.moe, layout, before_E, inputs.dispatch, inputs.recipe
    )
    return x_TD + y_TD, aux, *report


def embed(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """Compute the first stage's input: ``x_TD [T@tokens_sp, D]``."""
    return embedding(gather(p.embedding, layout), batch.tokens_T, batch.positions_T, layout)


def embed_params(p: Any) -> Any:
    """Return the params that ``embed`` uses: those of the embedding alone."""
    return replace(p, blocks=(), norm=None, w_head=None, mtp=())


def stage(
    p: Transformer,
    x_TD: Tensor,
    batch: Batch,
    before: dict[str, Tensor] | None = None,
    *,
    m: ModelConfig,
    layout: Layout,
    how: ComputeConfig = PLAIN,
) -> tuple[Tensor, StageOutput | None]:
    """Run the blocks of a stage, and in the last stage the head.

    ``x_TD``: ``[T@tokens_sp, D]``.
    ``before``: the summed reports of the step so far, where they are needed.
    Returns x_TD again, or in the last stage the loss summed over the batch's valid tokens. The
    loss's sum over data ranks is still pending. Also returns the stage's terms of the loss and
    its report."""
    run = _runner(p, batch, x_TD, m, layout, how, before)
    x_TD, extras = _trunk(p, x_TD, run, m, layout, how.policy)
    if p.norm is None:
        return x_TD, _extra(extras, None, m, layout)
    w_head, mtp_losses = _head(p, layout), None
    loss = cross_entropy(x_TD, w_head, batch.targets_T, Loss(m.vocab, z=m.z_loss), layout)
    if batch.targets_TA is not None:
        mtp_losses, more = _mtp(p, x_TD, w_head, batch, run, m, layout)
        extras = [*extras, *more]
    return loss, _extra(extras, mtp_losses, m, layout)


def stage_logits(
    p: Transformer,
    x_TD: Tensor,
    batch: Batch,
    m: ModelConfig,
    layout: Layout,
    caches: Sequence[Any] | None = None,
    last_B: Tensor | None = None,
) -> tuple[Tensor, None]:
    """``stage``, but the last stage returns logits ``[T@tokens, vocab]``, in float32 at least.

    ``caches``: one decoding cache per block. The batch continues the cached tokens at its positions
        and is appended to the caches.
    ``last_B``: ``[B@tokens]``, the one token of each row whose logits are returned: ``[B@tokens,
        vocab]``. Later tokens are padding."""
    # With a cache the mask is an explicit matrix: no kernel needs anything prepared for it.
    how = PLAIN if caches is None else replace(PLAIN, attention_kernel="reference")
    decoding = Decoding(caches, last_B)
    x_TD, _ = _trunk(p, x_TD, _runner(p, batch, x_TD, m, layout, how, decoding=decoding), m, layout)
    if p.norm is None:
        return x_TD, None
    if last_B is not None:
        x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
        ins = (("tokens", "act_embed"), ("tokens",))
        x_TD = layout.local(partial(_pick_rows, seq_len=batch.seq_len), ins, ins[0])(x_TD, last_B)
    return logits(x_TD, _head(p, layout), m.vocab, layout), None


def _pick_rows(x_TD: Tensor, places_B: Tensor, seq_len: int) -> Tensor:
    return x_TD.unflatten(0, (-1, seq_len))[
        torch.arange(len(places_B), device=x_TD.device), places_B
    ]


def forward(
    p: Transformer, batch: Batch, m: ModelConfig, layout: Layout, how: ComputeConfig = PLAIN
) -> Tensor:
    """Run the whole model as one stage and return the summed loss."""
    return stage(p, embed(p, batch, m, layout), batch, m=m, layout=layout, how=how)[0]


def predict(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """Run the whole model as one stage and return the logits."""
    return stage_logits(p, embed(p, batch, m, layout), batch, m, layout)[0]


def _head(p: Transformer, layout: Layout) -> Tensor:
    return layout.gather(p.embedding.w_tokens if p.w_head is None else p.w_head, "vocab", "embed")


@dataclass(frozen=True)
class Decoding:
    """The state of generation; see ``stage_logits``."""

    caches: Sequence[Any] | None = None
    last_B: Tensor | None = None


Run = Callable[..., tuple[Tensor, list[list[Tensor]]]]


def _runner(
    p: Transformer,
    batch: Batch,
    x_TD: Tensor,
    m: ModelConfig,
    layout: Layout,
    how: ComputeConfig,
    before: dict[str, Tensor] | None = None,
    decoding: Decoding = Decoding(),
) -> Run:
    """Return ``run(p_i, x_TD, i, end)``, which runs block i of ``p.all_blocks``. Everything that
    the blocks of a stage share is prepared here once. ``run`` returns x_TD and a list of the
    block's other outputs, which is empty without experts.

    ``end``: whether the block is the first or the last of the model.
    ``around``: wraps the block; the block's weights are then a field of ``p_i``.
    ``targets_T``: decides which tokens count (None: the batch's targets)."""
    prepared = {}
    for letter in {p_block.letter: None for p_block in p.all_blocks}:  # in order, each once
        windows = {p_block.window: None for p_block in p.all_blocks if p_block.letter == letter}
        shared = StageInputs(
            batch, x_TD, tuple(windows), how.attention_kernel, how.cp_method, decoding.last_B
        )
        prepared[letter] = m.mixer(letter).prepare(shared, layout)
    sparse = [p_block.moe is not None for p_block in p.all_blocks]
    tokens, width = x_TD.shape[0] // layout.parts("tokens"), m.mlp // layout.parts("mlp")
    chunk, policy = mlp_chunk_tokens(tokens, width), how.policy

    def run(p_i, x_TD, i, end, around=lambda block: block, targets_T=None):
        letter, recipe = p.all_blocks[i].letter, how.recipe(end)
        keep = policy.block(i)
        targets_T = batch.targets_T if targets_T is None else targets_T
        inputs = BlockInputs(
            mixer=m.mixer(letter),
            mixer_inputs=replace(
                prepared[letter][p.all_blocks[i].window],
                eps=m.norm_eps,
                recipe=recipe,
                cache=None if decoding.caches is None else decoding.caches[i],
            ),
            seen=_seen(targets_T, batch, m.moe.balanced, layout) if sparse[i] else None,
            dispatch=how.moe_dispatch,
            recipe=recipe,
            chunk=chunk if keep.reruns else None,
        )
        run_it = around(partial(block, inputs=inputs, m=m, layout=layout))
        load_E = _row(before["load"], sum(sparse[:i]), layout) if before and sparse[i] else None
        narrow = how.narrow(end, x_TD.shape[0] / layout.parts("tokens_sp"))
        fn = BlockFunction(run_it, load_E, layout, narrow)
        x_TD, *more = run_block(fn, p_i, x_TD, keep)
        return x_TD, [more] if more else []

    return run


def _trunk(
    p: Transformer,
    x_TD: Tensor,
    run: Run,
    m: ModelConfig,
    layout: Layout,
    policy: ActivationPolicy = NONE,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Run the blocks, and in the last stage the norm before the head."""
    # With a tied head or multi-token prediction the last stage has an embedding too.
    first = p.embedding is not None and (p.norm is None or len(p.blocks) == m.layers)
    extras = []
    for i, p_block in enumerate(p.blocks):
        end = (first and i == 0) or (p.norm is not None and i == len(p.blocks) - 1)
        x_TD, more = run(p_block, x_TD, i, end)
        extras += more
    if p.norm is not None:
        last, p_norm = policy.block(len(p.blocks) - 1), gather(p.norm, layout)
        x_TD = run_end(partial(norm, eps=m.norm_eps), p_norm, x_TD, last)
    return x_TD, extras


def _mtp(
    p: Transformer,
    h_TD: Tensor,
    w_head: Tensor,
    batch: Batch,
    run: Run,
    m: ModelConfig,
    layout: Layout,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Run multi-token prediction. Return each module's loss, a sum over tokens like the main
    loss, and the other outputs of the modules' blocks."""
    w_tokens = Embedding(layout.gather(p.embedding.w_tokens, "vocab", "embed"), None)
    losses, extras = [], []
    for k, p_k in enumerate(p.mtp):
        tokens_T, targets_T = batch.tokens_TA[:, k], batch.targets_TA[:, k]
        e_TD = embedding(w_tokens, tokens_T, batch.positions_T, layout)
        around = lambda block, e_TD=e_TD: partial(module, e_TD=e_TD, block=block, eps=m.norm_eps)
        h_TD, more = run(p_k, h_TD, len(p.blocks) + k, True, around, targets_T)
        losses.append(cross_entropy(h_TD, w_head, targets_T, Loss(m.vocab), layout))
        extras += more
    return losses, extras


def _seen(targets_T: Tensor, batch: Batch, balanced: bool, layout: Layout) -> TokenInfo:
    """Make the ``TokenInfo``. Each rank keeps its shard; no communication."""
    valid_T = layout.constrain(targets_T != IGNORE, "tokens_sp")
    rows = batch.tokens_T.shape[0] // batch.seq_len
    place_T = None
    if balanced:
        place_BS = torch.arange(len(targets_T), device=targets_T.device).view(rows, -1)
        place_T = layout.shard(as_tokens(place_BS, layout, batch.zigzag), "tokens_sp")
    return TokenInfo(valid_T, layout.constrain(batch.rows_T, "tokens_sp"), rows, place_T)


def _extra(
    extras: Sequence[Sequence[Tensor]],
    mtp_losses: list[Tensor] | None,
    m: ModelConfig,
    layout: Layout,
) -> StageOutput | None:
    """Collect a stage's terms of the loss and its reports. A report has one row per layer with
    experts, or per module of multi-token prediction."""
    pending = ("+tokens_sp",)
    stack = lambda xs: layout.local(lambda *rows: torch.stack(rows), [pending] * len(xs), pending)(
        *(x.detach() for x in xs)
    )
    added, report = [], {}
    if extras:
        auxes, *rows = zip(*extras, strict=True)
        report = {
            name: stack(xs) for name, xs in zip(("load", "router", "dropped"), rows, strict=True)
        }
        added += auxes if m.moe.aux_loss or m.moe.z_loss else ()
    if mtp_losses:
        losses = [over_all(loss, layout) for loss in mtp_losses]
        report["mtp"] = stack(losses)
        added += [loss * (m.mtp.weight / len(losses)) for loss in losses]
    aux = (
        sum(added[1:], added[0]) if added else None
    )  # sum() starts with 0, and 0 is not a pending sum
    return StageOutput(aux, report) if report else None


def _row(x: Tensor, i: int, layout: Layout) -> Tensor:
    """Select row i of a pending sum."""
    return layout.local(lambda x: x[i], [("+tokens_sp",)], ("+tokens_sp",))(x)
