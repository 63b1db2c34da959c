"""Activation policies: the activations that each block keeps from forward to backward, and the
activations that backward recomputes.

Recompute (Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198,
section 5) trades compute for memory. ``full`` keeps a block's input and runs the block again in
backward. ``selective`` keeps the outputs of matmuls and attention and recomputes the cheap rest.
``budget`` lets the compiler's partitioner choose the activations to keep. ``offload`` recomputes
nothing: the activations of all blocks but the last of a stage move to the host
(activation_offload.py).

No policy recomputes a choice of experts, or of keys in sparse attention. A second run may round a
score differently, and then a token would have its loss from one expert and its gradient from
another. The choice is a few numbers a token, so it is kept; the scores are recomputed.

Under ZeRO-3 a block all-gathers its weights inside, and no gathered weight may stay in memory until
backward. So under ZeRO-3 a block is always a recomputed region. ``none`` then means: keep
everything but the gathered weights. (The blocks of a compiled stage get gathered weights, and do
not keep them either: see training/zero3_prefetch.py. A compiled block keeps no copies that only a
kernel needs: see ``recompute_in_backward``.)

A ``BlockPolicy`` is the choice for one block. An ``ActivationPolicy`` gives a block policy to every
block of a stage. ``POLICIES`` lists the policies by the names that ``--recompute`` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from dtron.distributed.saved_tensors import saved_by
from dtron.errors import UserError
from dtron.layers.recompute import checkpointed
from dtron.mesh import Layout
from dtron.model.activation_offload import GatheredAgain
from dtron.model.kept_operators import AllKept, choices, matmuls
from dtron.params import Fp8GatherRule, unshard
from dtron.torch_compile import tracing
from dtron.tree import declared, flat


@dataclass(frozen=True)
class BlockFunction:
    """One block as a function of its weights and its input. The inputs are no fields, so that a
    recomputed region alone decides how long they live.

    ``block``: the block with gathered weights, called as ``block(p, x_TD, load_E)``.
    ``load_E``: for experts, see ``moe``.
    ``chooses``: whether the block chooses experts or keys.
    ``fp8_gather``: the rule that selects weights to all-gather in 8 bits."""

    block: Callable[..., tuple[Tensor, ...]]
    load_E: Tensor | None
    layout: Layout
    chooses: bool = False
    fp8_gather: Fp8GatherRule | None = None

    def run(self, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        """All-gather the weights ``p`` and run the block on ``x_TD [T@tokens_sp, D]``."""
        return self.block(self.unshard(p), x_TD, self.load_E)

    def unshard(self, p: Any) -> Any:
        """All-gather the weights: under ZeRO-3 over dp and cp. Otherwise the weights are whole
        already."""
        return unshard(p, self.layout, fp8=self.fp8_gather)

    def needs_unshard(self, p: Any) -> bool:
        """Return whether ``unshard`` would communicate."""
        pairs = zip(flat(p), declared(p), strict=True)
        return any(self.layout.needs_unshard(w, *d.axes) for w, d in pairs)


class BlockBytes(NamedTuple):
    """Bytes of one block's activations, for the memory estimate.

    ``input``: the block's input.
    ``matmuls``: the input, and the outputs of matmuls and attention.
    ``all``: every tensor that backward reads."""

    input: int
    matmuls: int
    all: int


RunBlock = Callable[[BlockFunction, Any, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class BlockPolicy:
    """The activations that one block keeps for backward.

    ``run``: runs the block on its weights and its input, where gradients are needed.
    ``kept_bytes``: the bytes that the block keeps on the device.
    ``reruns``: whether backward runs the whole block again from its input. Only such a block runs a
        long MLP in chunks (layers/recompute.py).
    ``offload_bytes``: the smallest storage that moves to the host (None: nothing moves)."""

    run: RunBlock
    kept_bytes: Callable[[BlockBytes], int]
    reruns: bool = False
    offload_bytes: int | None = None


@dataclass(frozen=True)
class ActivationPolicy:
    """The activations that the blocks of a stage keep for backward.

    ``name``: the policy's key in ``POLICIES``, which is the value of ``--recompute``.
    ``block``: gives the policy of a block from its index in its stage. Blocks of multi-token
        prediction come last.
    ``splits``: whether a backward can run in two halves (schedules/split_backward.py). A recomputed
        region cannot.
    ``recomputes_attention``: whether some block may recompute its attention in backward. One of
        the compiler's passes is then off (training/compiled_stage.py).
    ``budget``: the share of activation memory that the compiler's partitioner may use. None: no
        limit. A policy with a budget needs a compiler."""

    name: str
    block: Callable[[int], BlockPolicy]
    splits: bool = False
    recomputes_attention: bool = True
    budget: float | None = None

    def of_stage(self, blocks: int) -> list[BlockPolicy]:
        """Return the policies of a stage's blocks. Backward begins with the last block, so nothing
        of this block moves to the host."""
        each = [self.block(i) for i in range(blocks)]
        if each and each[-1].offload_bytes is not None:
            each[-1] = STAY
        return each


def run_block(fn: BlockFunction, p: Any, x_TD: Tensor, run: RunBlock) -> tuple[Tensor, ...]:
    """Run one block by the ``run`` of its policy. Blocks of policies that share it are compiled
    once."""
    return run(fn, p, x_TD) if torch.is_grad_enabled() else fn.run(p, x_TD)


def run_end(fn: Callable, p: Any, x_TD: Tensor, last: BlockPolicy) -> Tensor:
    """Run ``fn(p, x_TD)``, the layer after the last block. If backward reruns the last block, this
    layer is a recomputed region of its own. So the last block's output is kept as the input of this
    region, as the output of every other block is kept as the input of the next block. Otherwise
    a compiler would recompute this output, and so the whole last matmul of the block, before the
    rest of the block's backward.

    ``last``: the policy of the last block."""
    region = last.reruns and torch.is_grad_enabled()
    return checkpointed(fn, p, x_TD) if region else fn(p, x_TD)


def keep_all(fn: BlockFunction, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """Run a block and keep everything but its gathered weights."""
    if not fn.needs_unshard(p):
        return fn.run(p, x_TD)
    kept = AllKept()

    def run(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        kept.gathering = True
        p = fn.unshard(p)
        kept.gathering = False
        return fn.block(p, x_TD, fn.load_E)

    contexts = partial(create_selective_checkpoint_contexts, kept)
    return checkpointed(run, p, x_TD, context_fn=contexts)


def keep_matmuls(fn: BlockFunction, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """Run a block and keep its input and the outputs of matmuls and attention."""
    contexts = partial(create_selective_checkpoint_contexts, matmuls)
    return checkpointed(fn.run, p, x_TD, context_fn=contexts)


def keep_input(fn: BlockFunction, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """Run a block and keep its input alone, and its choices."""
    if not fn.chooses:
        return checkpointed(fn.run, p, x_TD)
    contexts = partial(create_selective_checkpoint_contexts, choices)
    return checkpointed(fn.run, p, x_TD, context_fn=contexts)


def gather_again(fn: BlockFunction, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """Run a block and keep everything but its gathered weights, as ``keep_all`` does. Here the
    hooks around the block get all other tensors. A recomputed region would hide these tensors."""
    if tracing() or not fn.needs_unshard(p):
        return keep_all(fn, p, x_TD)
    weights = GatheredAgain(partial(fn.unshard, p), p)
    with saved_by(weights.pack, weights.unpack):
        return fn.block(weights.gather(), x_TD, fn.load_E)


def _nothing(block: BlockBytes) -> int:
    return 0


KEEP_ALL = BlockPolicy(keep_all, attrgetter("all"))
KEEP_MATMULS = BlockPolicy(keep_matmuls, attrgetter("matmuls"))
KEEP_INPUT = BlockPolicy(keep_input, attrgetter("input"), reruns=True)
STAY = BlockPolicy(gather_again, attrgetter("all"))  # beside blocks that move
MOVE = BlockPolicy(gather_again, _nothing, offload_bytes=2**20)  # a smaller copy costs its launch


def every_block(policy: BlockPolicy) -> Callable[[int], BlockPolicy]:
    """Give every block the same policy."""

    def block(index: int) -> BlockPolicy:
        return policy

    return block


def budget(share: float) -> ActivationPolicy:
    """Make the policy under which the partitioner keeps a share of the activations of ``none``."""

    def kept_bytes(block: BlockBytes) -> int:
        return int(share * block.all)

    each = BlockPolicy(keep_all, kept_bytes)
    return ActivationPolicy("budget", every_block(each), budget=share)


def offload(share: float = 0.0) -> ActivationPolicy:
    """Make the policy under which a share of the blocks keeps its activations on the device. These
    blocks are spread evenly, so that the copies of one block have the time of several."""

    def block(index: int) -> BlockPolicy:
        return STAY if int((index + 1) * share) > int(index * share) else MOVE

    return ActivationPolicy("offload", block, recomputes_attention=False)


NONE = ActivationPolicy("none", every_block(KEEP_ALL), splits=True, recomputes_attention=False)

POLICIES: dict[str, ActivationPolicy] = {
    policy.name: policy
    for policy in (
        NONE,
        ActivationPolicy("selective", every_block(KEEP_MATMULS), recomputes_attention=False),
        ActivationPolicy("full", every_block(KEEP_INPUT)),
        offload(),
    )
}


BY_SHARE: dict[str, Callable[[float], ActivationPolicy]] = {"budget": budget, "offload": offload}


def policy_for(recompute: str, share: float | None = None) -> ActivationPolicy:
    """Return the policy of ``--recompute``. Raises UserError for an unknown name, and for a share
    that is missing, out of range or without effect.

    ``share``: the value of ``--recompute-budget``, for the policies of ``BY_SHARE`` alone."""
    if recompute not in (*POLICIES, *BY_SHARE):
        raise UserError(
            f"--recompute {recompute}: must be one of {', '.join(POLICIES)}, budget; use "
            "--recompute full"
        )
    if share is None:
        if recompute not in POLICIES:
            raise UserError(
                f"--recompute {recompute}: needs the share of activations to keep; use "
                "--recompute-budget 0.5"
            )
        return POLICIES[recompute]
    if recompute not in BY_SHARE:
        raise UserError(
            f"--recompute-budget {share}: is for the policies {' and '.join(BY_SHARE)}; use "
            "--recompute budget too"
        )
    if not 0 <= share <= 1:
        raise UserError(
            f"--recompute-budget {share}: a share from 0 to 1; use --recompute-budget 0.5"
        )
    return BY_SHARE[recompute](share)
