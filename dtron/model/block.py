"""A transformer block, and the running of a stage's blocks.

Blocks are pre-norm, x + f(norm(x)), as in Llama; or post-norm, x + norm(f(x)), as in OLMo 2
(arXiv:2501.00656, equation 2); or both, as in Gemma 2 (arXiv:2408.00118). f is a mixer, then a
feed-forward layer; a block of Nemotron-H has only one of the two (arXiv:2504.03624). Dropout is
left out on purpose: current models train without dropout, and recompute then needs no random state.

activation_checkpoint.py alone decides where a block's weights are all-gathered and which of its
activations are recomputed. Both may vary between runs without changing the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.host_memory import HostMemory
from dtron.fp8.recipe import Recipe
from dtron.layers.cross_entropy import IGNORE
from dtron.layers.dora import with_factors
from dtron.layers.mixer import Mixer, MixerInputs, StageInputs
from dtron.layers.mlp import MLP, mlp
from dtron.layers.norm import Norm, norm_if
from dtron.layers.recompute import mlp_chunk_tokens
from dtron.layers.token_order import as_tokens
from dtron.mesh import Layout
from dtron.model.activation_checkpoint import BlockFunction, BlockPolicy, run_block
from dtron.model.activation_offload import StageActivations
from dtron.model.batch import Batch
from dtron.model.block_outputs import output_names
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.moe.dispatch import Dispatch
from dtron.moe.layer import MoELayer, moe, shared_expert
from dtron.moe.router import TokenInfo
from dtron.params import Fp8GatherRule, part, value
from dtron.torch_compile import DIRECT, Units


@dataclass(frozen=True)
class Block:
    """The weights of a block. ``mlp`` is the dense feed-forward layer; ``moe`` takes its place in a
    block with experts. A block may lack its mixer or its feed-forward layer. ``norm_1`` and
    ``norm_2`` are before these sub-layers, ``post_norm_1`` and ``post_norm_2`` on their outputs.

    ``letter``: the block's mixer, a key of ``ModelConfig.kinds``.
    ``window``: the attention window (None: no window)."""

    norm_1: Norm | None = part(when="pre_norm_1")
    mixer: Any = part(choose="mixer", when="mixes")
    post_norm_1: Norm | None = part(when="post_norm_1")
    norm_2: Norm | None = part(when="pre_norm_2")
    mlp: MLP | None = part(when="dense")
    moe: MoELayer | None = part(when="sparse")
    post_norm_2: Norm | None = part(when="post_norm_2")
    letter: str = value("letter")
    window: int | None = value("window")


@dataclass(frozen=True)
class BlockInputs:
    """The inputs of a block besides weights, activations, model and layout.

    ``mixer``, ``mixer_inputs``: the block's mixer and its inputs.
    ``token_info``: for experts, see ``moe``.
    ``dispatch``: the dispatcher of tokens to experts.
    ``recipe``: the recipe for FP8 matmuls, or None.
    ``chunk``: chunk size of the MLP, see ``mlp``.
    ``logits``: whether the block returns its largest attention logits."""

    mixer: Mixer
    mixer_inputs: MixerInputs
    token_info: TokenInfo | None = None
    dispatch: Dispatch = "auto"
    recipe: Recipe | None = None
    chunk: int | None = None
    logits: bool = False


def block(
    p: Block,
    x_TD: Tensor,
    before_E: Tensor | None,
    inputs: BlockInputs,
    m: ModelConfig,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Apply a block: ``x_TD [T@tokens_sp, D]`` -> ``(x_TD, *more)``; ``output_names`` names the
    other outputs.

    ``before_E``: for experts, see ``route``."""
    others: list[Tensor] = []
    p = with_factors(p)
    if p.mixer is not None:
        h_TD = norm_if(p.norm_1, x_TD, m.norm_eps)
        mixer, more = inputs.mixer, inputs.mixer_inputs
        if more.valid_T is not None:
            mixed_TD, *others = mixer.apply_with_loss(p.mixer, h_TD, more, layout, inputs.logits)
        elif inputs.logits:
            mixed_TD, *others = mixer.apply_with_logits(p.mixer, h_TD, more, layout)
        else:
            mixed_TD = mixer.apply(p.mixer, h_TD, more, layout)
        x_TD = _add(x_TD, mixed_TD, p.post_norm_1, m)
    if p.mlp is None and p.moe is None:
        return x_TD, *others
    h_TD = norm_if(p.norm_2, x_TD, m.norm_eps)
    if p.moe is None:
        assert p.mlp is not None
        y_TD = mlp(p.mlp, h_TD, layout, m.activation, inputs.recipe, inputs.chunk)
        return _add(x_TD, y_TD, p.post_norm_2, m), *others
    assert inputs.token_info is not None
    y_TD, aux, stats = moe(
        p.moe, h_TD, inputs.token_info, m.moe, layout, before_E, inputs.dispatch, inputs.recipe
    )
    if p.moe.shared is not None:
        y_TD = y_TD + shared_expert(p.moe, h_TD, layout, m.activation, inputs.recipe)
    return _add(x_TD, y_TD, p.post_norm_2, m), *others, aux, *stats


def _add(x_TD: Tensor, y_TD: Tensor, p: Norm | None, m: ModelConfig) -> Tensor:
    """Add the output of a mixer or feed-forward layer, after its norm ``p``. Rank-local."""
    y_TD = norm_if(p, y_TD, m.norm_eps)
    return x_TD + (y_TD if m.residual_scale == 1 else m.residual_scale * y_TD)


@dataclass(frozen=True)
class Decoding:
    """The state of generation.

    ``caches``: one decoding cache per block.
    ``last_B``: the index of the last token of each row, see ``StageInputs``."""

    caches: Sequence[Any] | None = None
    last_B: Tensor | None = None


@dataclass(frozen=True)
class BlockRunner:
    """Runs the blocks of a stage on one microbatch. ``block_runner`` makes it.

    ``blocks``: the blocks' weights. The blocks of multi-token prediction come last.
    ``prepared``: by letter and window, the inputs of mixers that blocks share.
    ``before``: the summed reports of the step so far, where blocks need them.
    ``chunk``: chunk size of the MLP in a block that backward runs again.
    ``call``: calls each block.
    ``tokens``: the number of a rank's tokens.
    ``offload``: moves activations to the host (None: no block does so)."""

    blocks: Sequence[Block]
    batch: Batch
    prepared: Mapping[str, Mapping[int | None, MixerInputs]]
    m: ModelConfig
    layout: Layout
    how: ComputeConfig
    before: Mapping[str, Tensor] | None
    caches: Sequence[Any] | None
    chunk: int | None
    call: Units
    tokens: float
    offload: StageActivations | None = None

    def run(
        self,
        p: Any,
        x_TD: Tensor,
        i: int,
        end: bool,
        wrap: Callable[[Callable], Callable] | None = None,
        targets_T: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run block i. Return x_TD, and the block's other outputs by name; see ``output_names``.

        ``p``: the params of the block, or of the function that ``wrap`` returns.
        ``end``: whether the block is the first or the last of the model.
        ``wrap``: turns the block's function into a function of ``p``.
        ``targets_T``: decides which tokens count (None: the batch's targets)."""
        policy, recipe = self.policies[i], self.how.recipe(end)
        mixer = self.m.mixer(self.blocks[i].letter)
        trains = torch.is_grad_enabled()
        logits = self.how.attention_logits and mixer.has_logits and trains
        learns = mixer.loss_name is not None and trains
        sparse = self.blocks[i].moe is not None
        targets_T = self.batch.targets_T if targets_T is None else targets_T
        inputs = BlockInputs(
            mixer=mixer,
            mixer_inputs=self._mixer_inputs(i, recipe, targets_T if learns else None),
            token_info=self._token_info(targets_T) if sparse else None,
            dispatch=self.how.moe_dispatch,
            recipe=recipe,
            chunk=self.chunk if policy.reruns else None,
            logits=logits,
        )
        run_it = partial(block, inputs=inputs, m=self.m, layout=self.layout)
        run_it = run_it if wrap is None else wrap(run_it)
        load_E = self._load(i) if self.before and sparse else None
        chooses = sparse or mixer.chooses
        fn = BlockFunction(run_it, load_E, self.layout, chooses, self.fp8_gather(end))
        call = partial(self.call, run_block, fn, p, x_TD, policy.run)
        if self.offload is None:
            x_TD, *more = call()
        else:
            x_TD, *more = self.offload.run(call, (fn, p), x_TD, policy.offload_bytes)
        return x_TD, dict(zip(output_names(logits, learns, sparse), more, strict=True))

    def fp8_gather(self, end: bool) -> Fp8GatherRule | None:
        """Return the rule that selects weights of a block to all-gather in 8 bits.

        ``end``: whether the block is the first or the last of the model."""
        return self.how.fp8_gather_rule(end, self.tokens)

    def _mixer_inputs(self, i: int, recipe: Recipe | None, targets_T: Tensor | None) -> MixerInputs:
        valid_T = None
        if targets_T is not None:
            valid_T = self.layout.constrain(targets_T != IGNORE, "tokens_sp")  # local
        return replace(
            self.prepared[self.blocks[i].letter][self.blocks[i].window],
            eps=self.m.mixer(self.blocks[i].letter).norm_eps,
            recipe=recipe,
            cache=None if self.caches is None else self.caches[i],
            valid_T=valid_T,
        )

    def _token_info(self, targets_T: Tensor) -> TokenInfo:
        """Make the ``TokenInfo``. Each rank keeps its shard; no communication."""
        layout, batch = self.layout, self.batch
        valid_T = layout.constrain(targets_T != IGNORE, "tokens_sp")
        rows = batch.tokens_T.shape[0] // batch.seq_len
        place_T = None
        if self.m.moe.balanced:
            place_BS = torch.arange(len(targets_T), device=targets_T.device).view(rows, -1)
            place_T = layout.shard(as_tokens(place_BS, layout, batch.zigzag), "tokens_sp")
        needed_T = batch.needed_T
        needed_T = None if needed_T is None else layout.constrain(needed_T, "tokens_sp")
        rows_T = layout.constrain(batch.rows_T, "tokens_sp")
        return TokenInfo(valid_T, rows_T, rows, place_T, needed_T)

    def _load(self, i: int) -> Tensor:
        """Return the load of block i in the step so far: one row of a pending sum."""
        assert self.before is not None
        row = sum(p_block.moe is not None for p_block in self.blocks[:i])
        pick = partial(torch.select, dim=0, index=row)
        return self.layout.local_map(pick, [("+tokens_sp",)], ("+tokens_sp",))(self.before["load"])

    @cached_property
    def policies(self) -> list[BlockPolicy]:
        """The activation policies of the blocks."""
        return self.how.policy.of_stage(len(self.blocks))

    def offloading(self, host: HostMemory) -> BlockRunner:
        """Return the same runner, which moves activations to ``host`` if the policy does so."""
        moves = any(policy.offload_bytes is not None for policy in self.policies)
        needed = moves and torch.is_grad_enabled()
        return replace(self, offload=StageActivations(host)) if needed else self


def block_runner(
    blocks: Sequence[Block],
    x_TD: Tensor,
    batch: Batch,
    m: ModelConfig,
    layout: Layout,
    how: ComputeConfig,
    before: Mapping[str, Tensor] | None = None,
    decoding: Decoding = Decoding(),
    call: Units = DIRECT,
) -> BlockRunner:
    """Prepare once the data that the blocks of a stage share on one microbatch.

    ``blocks``: the weights of all blocks of the stage.
    ``x_TD``: the stage's input. Only its shape, dtype and device matter.
    ``before``: the summed reports of the step so far, where they are needed.
    ``call``: calls each block, see ``Units``."""
    prepared = {}
    for letter in {p_block.letter: None for p_block in blocks}:  # in order, each once
        windows = {p_block.window: None for p_block in blocks if p_block.letter == letter}
        shared = StageInputs(
            batch, x_TD, tuple(windows), how.attention_kernel, how.cp_method, decoding.last_B
        )
        prepared[letter] = m.mixer(letter).prepare(shared, layout)
    tokens, width = x_TD.shape[0] // layout.parts("tokens"), m.mlp // layout.parts("mlp")
    chunk = mlp_chunk_tokens(tokens, width)
    return BlockRunner(
        blocks,
        batch,
        prepared,
        m,
        layout,
        how,
        before,
        decoding.caches,
        chunk,
        call,
        x_TD.shape[0] / layout.parts("tokens_sp"),
    )
