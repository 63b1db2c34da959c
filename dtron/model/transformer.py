"""The transformer: embedding, blocks, norm, head. Like every layer, it is a params dataclass and
pure functions.

``embed``, followed by ``stage`` once per pipeline stage, is the whole model from a batch to the
summed loss. block.py has the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.host_memory import HostMemory
from dtron.layers.cross_entropy import IGNORE, logits
from dtron.layers.embedding import Embedding, embedding
from dtron.layers.norm import Norm
from dtron.losses.objective import CROSS_ENTROPY, LossInputs, Objective
from dtron.mesh import Layout
from dtron.model import head
from dtron.model.batch import Batch
from dtron.model.block import (
    Block,
    BlockRunner,
    Decoding,
    block_runner,
)
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.head import end_params, head_input, head_weight, last_norm, unshard_head
from dtron.model.mtp import module
from dtron.model.stage_output import MTPLosses, stage_output
from dtron.params import declare, part, unshard, weight
from dtron.schedules.runner import StageOutput
from dtron.torch_compile import DIRECT, Units


@dataclass(frozen=True)
class MTPModule:
    """The weights of one module of multi-token prediction; see mtp.py."""

    norm_h: Norm = part()
    norm_token: Norm = part()
    w_h: Tensor = weight("embed", "act_embed", fan_in=1)
    w_token: Tensor = weight("embed", "act_embed", fan_in=1)
    block: Block = part()
    norm: Norm = part()


@dataclass(frozen=True)
class Transformer:
    """The weights of the model, or of one pipeline stage; see stages.py.

    ``w_head``: the output head; None if the head is the embedding. It declares no fan-in: muP
        divides the logits (``head_input``), as it must where the head is the embedding."""

    embedding: Embedding | None = part()
    blocks: tuple[Block, ...] = part(count="layers", each="blocks")
    norm: Norm | None = part()
    w_head: Tensor | None = weight("vocab", "embed", when="untied")
    mtp: tuple[MTPModule, ...] = part(count="mtp_depth", each="mtp")

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """All blocks; the blocks of multi-token prediction come last."""
        return (*self.blocks, *(module.block for module in self.mtp))


def declare_model(model: ModelConfig) -> Transformer:
    """Declare the weights of a model."""
    return declare(Transformer, model.dims())


def embed(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """Compute the first stage's input: ``x_TD [T@tokens_sp, D]``."""
    p_own, scale = unshard(p.embedding, layout), m.embedding_scale
    return embedding(p_own, batch.tokens_T, batch.positions_T, layout, scale)


def embed_params(p: Any) -> Any:
    """Return the params that ``embed`` uses: the embedding alone."""
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
    call: Units = DIRECT,
    host: HostMemory | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> tuple[Tensor, StageOutput | None]:
    """Run the blocks of a stage, and in the last stage the head.

    Returns x_TD, or in the last stage the loss summed over the batch's valid tokens, or pairs. The
    loss's sum over data ranks is still pending. Also returns the stage's terms of the loss and its
    report.

    ``x_TD``: ``[T@tokens_sp, D]``.
    ``before``: the summed reports of the step so far, where they are needed.
    ``call``: calls the units that are compiled: each block, and the loss.
    ``host``: buffers of earlier steps for activations that move to the host (None: new ones).
    ``objective``: the loss."""
    runner = block_runner(p.all_blocks, x_TD, batch, m, layout, how, before, call=call)
    runner = runner.offloading(host or HostMemory())
    order = [(p.blocks[i], runner.fp8_gather(end)) for i, end in enumerate(_ends(p, m))]
    if p.norm is not None:
        order.append((end_params(p), None))
    weights = call.gathered(order, to_loss=p.norm is not None)
    x_TD, outputs = _blocks(p, weights, x_TD, runner)
    if p.norm is None:
        return x_TD, stage_output(outputs, None, m, layout)
    mtp, last, rest = None, how.policy.block(len(p.blocks) - 1), (objective, m, layout)
    inputs = batch.loss_inputs(layout)
    if batch.targets_TA is None:
        loss, *stats = call(head.norm_and_loss, next(weights), x_TD, inputs, *rest, last)
    else:
        end = next(weights)
        (x_TD,) = call(last_norm, end.norm, x_TD, m, layout, last)
        loss, *stats = call(head.loss, x_TD, head_weight(end), inputs, *rest)
        mtp, more = _mtp(p, end, x_TD, batch, runner)
        outputs = [*outputs, *more]
    named = dict(zip(objective.stats(head.loss_options(m)), stats, strict=True))
    return loss, stage_output(outputs, mtp, m, layout, named)


def stage_then(
    p: Transformer,
    x_TD: Tensor,
    batch: Batch,
    end: Callable[[Tensor, Tensor], Any],
    m: ModelConfig,
    layout: Layout,
    how: ComputeConfig = PLAIN,
) -> tuple[Any, None]:
    """Run a stage like ``stage``, but the last stage returns ``end(x_TD, w_head)``.

    ``end``: gets the input of the head, ``[T@tokens_sp, D]``, and the head, ``[V@vocab, D]``."""
    runner = block_runner(p.all_blocks, x_TD, batch, m, layout, how)
    return _then(p, x_TD, runner, end), None


def _then(
    p: Transformer, x_TD: Tensor, runner: BlockRunner, end: Callable[[Tensor, Tensor], Any]
) -> Any:
    m, layout = runner.m, runner.layout
    x_TD, _ = _blocks(p, iter(p.blocks), x_TD, runner)
    if p.norm is None:
        return x_TD
    policy = runner.how.policy.block(len(p.blocks) - 1)
    (x_TD,) = runner.call(last_norm, p.norm, x_TD, m, layout, policy)
    (w_head,) = unshard_head(head_weight(p), layout)
    return end(head_input(x_TD, m), w_head)


def stage_logits(
    p: Transformer,
    x_TD: Tensor,
    batch: Batch,
    m: ModelConfig,
    layout: Layout,
    caches: Sequence[Any] | None = None,
    last_B: Tensor | None = None,
    call: Units = DIRECT,
) -> tuple[Tensor, None]:
    """Run a stage like ``stage``, but the last stage returns logits ``[T@tokens, vocab]``, in
    float32 at least.

    ``caches``: one decoding cache per block. The batch continues the cached tokens at its positions
        and is appended to the caches.
    ``last_B [B@tokens]``: the index of each row's last token; later tokens are padding. Only this
        token's logits are returned: ``[B@tokens, vocab]``.
    ``call``: calls each block, the last norm, and the head."""
    # With a cache the mask is an explicit matrix: no kernel needs anything prepared for it.
    how = PLAIN if caches is None else replace(PLAIN, attention_kernel="reference")
    runner = block_runner(
        p.all_blocks, x_TD, batch, m, layout, how, decoding=Decoding(caches, last_B), call=call
    )

    def end(x_TD: Tensor, w_head: Tensor) -> Tensor:
        return call(_logits, x_TD, w_head, last_B, batch.seq_len, m, layout)[0]

    return _then(p, x_TD, runner, end), None


def _logits(
    x_TD: Tensor,
    w_head: Tensor,
    last_B: Tensor | None,
    seq_len: int,
    m: ModelConfig,
    layout: Layout,
) -> tuple[Tensor]:
    if last_B is not None:
        x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
        ins = (("tokens", "act_embed"), ("tokens",))
        x_TD = layout.local_map(partial(_pick_rows, seq_len=seq_len), ins, ins[0])(x_TD, last_B)
    return (logits(x_TD, w_head, m.vocab, layout, m.final_softcap),)


def _pick_rows(x_TD: Tensor, places_B: Tensor, seq_len: int) -> Tensor:
    rows_B = torch.arange(len(places_B), device=x_TD.device)
    return x_TD.unflatten(0, (-1, seq_len))[rows_B, places_B]


def forward(
    p: Transformer, batch: Batch, m: ModelConfig, layout: Layout, how: ComputeConfig = PLAIN
) -> Tensor:
    """Run the whole model as one stage and return the summed loss."""
    return stage(p, embed(p, batch, m, layout), batch, m=m, layout=layout, how=how)[0]


def predict(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> Tensor:
    """Run the whole model as one stage and return the logits."""
    return stage_logits(p, embed(p, batch, m, layout), batch, m, layout)[0]


def _ends(p: Transformer, m: ModelConfig) -> list[bool]:
    """Return for each block whether it is the first or the last of the model."""
    # With a tied head or multi-token prediction the last stage has an embedding too.
    first = p.embedding is not None and (p.norm is None or len(p.blocks) == m.layers)
    last = len(p.blocks) - 1
    return [(first and i == 0) or (p.norm is not None and i == last) for i in range(last + 1)]


def _blocks(
    p: Transformer, weights: Iterator[Any], x_TD: Tensor, runner: BlockRunner
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Run the blocks. Return x_TD and the other outputs of each block.

    ``weights``: the blocks' weights, see ``Units.gathered``."""
    outputs = []
    for i, end in enumerate(_ends(p, runner.m)):
        x_TD, more = runner.run(next(weights), x_TD, i, end)
        outputs.append(more)
    return x_TD, outputs


def _mtp(
    p: Transformer, end: Transformer, h_TD: Tensor, batch: Batch, runner: BlockRunner
) -> tuple[MTPLosses, list[dict[str, Tensor]]]:
    """Run multi-token prediction. Return each module's loss, a sum over tokens like the main
    loss, with its number of targets, and the other outputs of the modules' blocks.

    ``end``: the head and the embedding, see ``end_params``."""
    m, layout = runner.m, runner.layout
    assert end.embedding is not None
    assert batch.tokens_TA is not None and batch.targets_TA is not None
    w_tokens, w_head = end.embedding.w_tokens, head_weight(end)
    ahead = replace(m, z_loss=0.0)
    losses, counts, outputs = [], [], []
    count = layout.local_map(_count_targets, [("tokens",)], ("+tokens",))
    order = [(p_k, runner.fp8_gather(True)) for p_k in p.mtp]
    for k, p_k in enumerate(runner.call.gathered(order)):
        tokens_T, targets_T = batch.tokens_TA[:, k], batch.targets_TA[:, k]
        (e_TD,) = runner.call(_embed_ahead, w_tokens, tokens_T, batch.positions_T, m, layout)
        wrap = partial(_in_module, e_TD=e_TD, eps=m.norm_eps)
        h_TD, more = runner.run(p_k, h_TD, len(p.blocks) + k, True, wrap, targets_T)
        rest = LossInputs(targets_T), CROSS_ENTROPY, ahead, layout
        losses.append(runner.call(head.loss, h_TD, w_head, *rest)[0])
        counts.append(count(targets_T))
        outputs.append(more)
    return (losses, counts), outputs


def _embed_ahead(
    w_tokens: Tensor, tokens_T: Tensor, positions_T: Tensor, m: ModelConfig, layout: Layout
) -> tuple[Tensor]:
    p = Embedding(*unshard_head(w_tokens, layout), None)
    return (embedding(p, tokens_T, positions_T, layout, m.embedding_scale),)


def _count_targets(targets_T: Tensor) -> Tensor:
    return (targets_T != IGNORE).sum(dtype=torch.float32)


def _in_module(block: Callable, e_TD: Tensor, eps: float) -> Callable:
    """Return the module of multi-token prediction that contains this block."""
    return partial(module, e_TD=e_TD, block=block, eps=eps)
