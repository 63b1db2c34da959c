"""Estimate of activation memory on one rank for long sequences, from the model config alone.

The activations that a block keeps from forward to backward grow with the sequence. A rank has
u = rows * S / cp tokens, of which t = u / tp under sequence parallelism. An element has e bytes:

    block, kept whole   e (2 t D + 2 u D + u (2 heads + 2 kv) H / tp + g u F / tp) + 4 u heads / tp
    selective           e (t D + 2 u D + u (2 heads + 2 kv) H / tp + (g - 1) u F / tp) + 4 u heads /
    tp
    full                e t D
    offload             0; the last block of a stage is kept whole

The terms are: two residuals and two matmul inputs; query, key, value and output of attention, and
its log-sum-exps; inputs and outputs of the MLP matmuls, g = 3 with a gate and 2 without. Under
``full``, one block at a time is recomputed and held whole. Where u F / tp is large, its MLP runs in
chunks of c tokens, and c replaces u there (see ``recompute.mlp_chunk_tokens``). Under ``offload``,
two blocks at a time are on the device, and all but the last block of a stage on the host. A block
in backward also holds the gradients of all these tensors: as many bytes again. Attention over cp
also holds messages. The ring holds two of keys and values and two of their gradients; allgather
holds keys and values of whole rows and their gradients; ulysses holds its send and receive buffers.
The loss holds a chunk of logits, and the gradients of its input and of the head.

The mixer gives the terms of attention and of its messages (layers/attention.py). A layer with
another mixer has the terms of that mixer instead. In latent attention every head has its own keys,
and values of another width. In an MoE layer F is the width of the token's routed experts plus the
shared expert, and each routed expert holds one more copy of the token. If the model has experts,
every layer counts as MoE. Routing is not counted.

The estimate is the minimum that backward needs. A compiler may recompute a little more, and the
eager program keeps more under ``none``. Pipeline stage s has pp - s microbatches in flight.
(bench-1.3b, compiled, on one GPU, full recompute, one row of 524,288 tokens: the estimate plus the
memory of weights is 101.4 GiB; 102.4 GiB were measured.)
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.context_parallel import Method
from dtron.layers.recompute import mlp_chunk_tokens
from dtron.model.activation_bytes import block_bytes, host_bytes
from dtron.model.activation_checkpoint import POLICIES, ActivationPolicy
from dtron.model.config import ModelConfig


def loss_bytes(m: ModelConfig, shape: MeshShape, tokens: int, element: int = 2) -> int:
    """A chunk's logits and their exponentials in float32, and gradients computed in forward."""
    u, words = tokens // shape.cp, -(-m.padded_vocab // shape.tp)
    chunk = max(1, min(2**27 // words, (u + 1) // 2))
    return 2 * 4 * chunk * words + 2 * element * u * m.embed + 4 * words * m.embed


def activation_bytes(
    m: ModelConfig,
    shape: MeshShape,
    tokens: int,
    policy: ActivationPolicy,
    cp_method: Method,
    layers: Sequence[int],
) -> int:
    """Return the peak activation bytes of a rank; see the module docstring.

    ``layers``: number of layers of each stage.
    """
    chunk = mlp_chunk_tokens(tokens // shape.cp, m.mlp // shape.tp)
    kept, work = 0, 0
    for stage, n in enumerate(layers):
        start, stage_kept = sum(layers[:stage]), 0
        for i, block in enumerate(policy.of_stage(n)):
            one = block_bytes(m, shape, tokens, layer=start + i)
            stage_kept += block.kept_bytes(one)
            in_chunks = block_bytes(m, shape, tokens, chunk=chunk, layer=start + i).all
            # A block's gradients, and its activations again where they are recomputed. Where they
            # come back from the host, those of the block before are on their way too.
            moved = 0 if block.offload_bytes is None else 2 * one.all
            work = max(work, 2 * in_chunks if block.reruns else one.all + moved)
        kept = max(kept, stage_kept * (shape.pp - stage))
    messages = max(mixer.message_bytes(shape, tokens, cp_method, element=2) for mixer in m.mixers)
    return kept + max(work + messages, loss_bytes(m, shape, tokens))


def most_on_host(
    m: ModelConfig, shape: MeshShape, tokens: int, policy: ActivationPolicy, layers: Sequence[int]
) -> int:
    """Return the bytes of activations that a rank moves to the host, on the rank with the most."""
    start, most = 0, 0
    for stage, n in enumerate(layers):
        blocks = range(start, start := start + n)
        most = max(most, host_bytes(m, shape, tokens, policy, blocks) * (shape.pp - stage))
    return most


def table(
    m: ModelConfig,
    shape: MeshShape,
    cp_method: Method,
    layers: Sequence[int],
    weights: int,
    seq_lens: Sequence[int],
) -> Table:
    """Build a row for each sequence length. ``weights``: bytes of everything but activations."""
    out = Table(
        title=f"one row of a sequence on each data rank, bf16: {size(weights)} and activations"
    )
    for name in ("sequence", "tokens on a rank", *(f"--recompute {r}" for r in POLICIES)):
        out.add_column(name, justify="right", no_wrap=True)
    for seq_len in seq_lens:
        cells = []
        for policy in POLICIES.values():
            needed = activation_bytes(m, shape, seq_len, policy, cp_method, layers)
            moved = most_on_host(m, shape, seq_len, policy, layers)
            on_host = f", host {size(moved)}" if moved else ""
            cells.append(f"{size(needed)}, all {size(needed + weights)}{on_host}")
        out.add_row(f"{seq_len:,}", f"{seq_len // shape.cp // shape.tp:,}", *cells)
    return out


def seq_lens(unit: int) -> list[int]:
    """Powers of 2 from 4096 to 1048576, rounded up to a multiple of ``unit``."""
    return [-(-(2**n) // unit) * unit for n in range(12, 21)]


def size(n: float) -> str:
    """Format bytes with a binary unit: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
