"""Estimate of activation memory on one rank for long sequences, from the model config alone.

The activations that a block keeps from forward to backward grow with the sequence. A rank has
u = rows * S / cp tokens, of which t = u / tp under sequence parallelism. An element has e bytes:

    block, kept whole   e (2 t D + 2 u D + u (2 heads + 2 kv) H / tp + g u F / tp) + 4 u heads / tp
    selective           e (t D + 2 u D + u (2 heads + 2 kv) H / tp + (g - 1) u F / tp) + 4 u heads / tp
    full                e t D

The terms are: two residuals and two matmul inputs; query, key, value and output of attention, and
its log-sum-exps; inputs and outputs of the MLP matmuls, g = 3 with a gate and 2 without. Under
``full``, one block at a time is recomputed and held whole. Where u F / tp is large, its MLP runs in
chunks of c tokens, and c replaces u there (see ``recompute.mlp_chunk_tokens``). A block in backward
also holds the gradients of all these tensors: as many bytes again. Attention over cp also holds
messages. The ring holds two of keys and values and two of their gradients; allgather holds keys and
values of whole rows and their gradients; ulysses holds its send and receive buffers. The loss holds
a chunk of logits, and the gradients of its input and of the head.

The terms of attention, and its messages, are those of its mixer (layers/attention.py). A layer with
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
from dtron.model.config import ModelConfig

RECOMPUTE = ("none", "selective", "full")


def block_bytes(
    m: ModelConfig,
    shape: MeshShape,
    tokens: int,
    recompute: str,
    element: int = 2,
    chunk: int | None = None,
    layer: int = 0,
) -> int:
    """Return the bytes that one block keeps for backward.

    ``tokens``: tokens of all cp and tp ranks together.
    ``chunk``: tokens of a rank that its MLP processes at once (None: all).
    ``layer``: the index of the block, which chooses its mixer.
    """
    u = tokens // shape.cp
    t = u // shape.tp
    if recompute == "full":
        return element * t * m.embed
    mixer = m.mixer(m.letter(layer)).activation_bytes(shape, tokens, element)
    products = (3 if m.activation in ("swiglu", "geglu") else 2) - (recompute == "selective")
    residuals = (1 if recompute == "selective" else 2) * t * m.embed
    c = m.moe
    if c.experts:
        mlp = products * u * (c.top_k * c.mlp + c.shared) // shape.tp + t * c.top_k * m.embed
    else:
        mlp = products * (u if chunk is None else min(u, chunk)) * m.mlp // shape.tp
    return element * (residuals + 2 * u * m.embed + mlp) + mixer


def loss_bytes(m: ModelConfig, shape: MeshShape, tokens: int, element: int = 2) -> int:
    """A chunk's logits and their exponentials in float32, and gradients computed in forward."""
    u, words = tokens // shape.cp, -(-m.padded_vocab // shape.tp)
    chunk = max(1, min(2**27 // words, (u + 1) // 2))
    return 2 * 4 * chunk * words + 2 * element * u * m.embed + 4 * words * m.embed


def activation_bytes(
    m: ModelConfig, shape: MeshShape, tokens: int, recompute: str, cp: Method, layers: Sequence[int]
) -> int:
    """Return the peak activation bytes of a rank; see the module docstring.

    ``layers``: number of layers of each stage.
    """
    ones = [block_bytes(m, shape, tokens, recompute, layer=i) for i in range(m.layers)]
    starts = [sum(layers[:s]) for s in range(len(layers))]
    kept = max(
        sum(ones[start : start + n]) * (shape.pp - s)
        for s, (start, n) in enumerate(zip(starts, layers, strict=True))
    )
    chunk = mlp_chunk_tokens(recompute, tokens // shape.cp, m.mlp // shape.tp)
    gradients = max(
        block_bytes(m, shape, tokens, "none", chunk=chunk, layer=i) for i in range(m.layers)
    )
    again = gradients if recompute == "full" else 0
    messages = max(mixer.message_bytes(shape, tokens, cp, element=2) for mixer in m.mixers)
    return kept + max(again + gradients + messages, loss_bytes(m, shape, tokens))


def table(
    m: ModelConfig,
    shape: MeshShape,
    cp: Method,
    layers: Sequence[int],
    weights: int,
    sequences: Sequence[int],
) -> Table:
    """Build a row for each sequence length. ``weights``: bytes of everything but activations."""
    out = Table(
        title=f"one row of a sequence on each data rank, bf16: {size(weights)} and activations"
    )
    for name in ("sequence", "tokens on a rank", *(f"--recompute {r}" for r in RECOMPUTE)):
        out.add_column(name, justify="right", no_wrap=True)
    for sequence in sequences:
        needs = [activation_bytes(m, shape, sequence, r, cp, layers) for r in RECOMPUTE]
        cells = (f"{size(n)}, all {size(n + weights)}" for n in needs)
        out.add_row(f"{sequence:,}", f"{sequence // shape.cp // shape.tp:,}", *cells)
    return out


def sequences(unit: int) -> list[int]:
    """Powers of 2 from 4096 to 1048576, rounded up to a multiple of ``unit``."""
    return [-(-(2**n) // unit) * unit for n in range(12, 21)]


def size(n: float) -> str:
    """Format bytes with a binary unit: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
