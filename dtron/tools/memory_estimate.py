"""How much memory the activations of a long sequence take on one rank: an estimate from the model
alone.

What grows with the sequence is what a block keeps between its forward and its backward. With u
tokens of whole rows on a rank (rows * S / cp), t = u / tp of them between the collectives of tensor
parallelism, and e bytes an element:

    block, kept whole   e (2 t D + 2 u D + u (2 heads + 2 kv) H / tp + g u F / tp) + 4 u heads / tp
    selective           e (t D + 2 u D + u (2 heads + 2 kv) H / tp + (g - 1) u F / tp) + 4 u heads / tp
    full                e t D

two residuals and two inputs of matrix products; queries, keys, values and results of attention, and
its log-sum-exps; and of the feed-forward layer what its products take and give, g = 3 with a gate
and 2 without. Under ``full`` the block that is at work is there whole, once; of its feed-forward
layer only a chunk of c tokens, where u F / tp is large: c for u there (see
``recompute.mlp_chunk_tokens``). A block whose backward runs has the gradients of all that beside it,
as many bytes again. Attention over cp has messages beside it: the ring two of keys and values and
two of their gradients, allgather those of whole rows, ulysses what it sends and what it gets. The
loss has a chunk of logits, and the gradients of its input and of the head.

In latent attention every head has keys of its own, and values of another width. A layer of experts
has for F the width of the experts that a token goes to and of the shared one, and for each of the
former the token once more; every layer is taken for one, and what routing adds is not counted.

These are what the mathematics of backward needs; a compiler may recompute a little more, and the
eager program keeps more under ``none``. With pipeline stages, stage s has pp - s microbatches under
way. (Of bench-1.3b, compiled, on one GPU, with full recomputation and one row of 524,288 tokens,
the estimate and the memory of weights come to 101.4 GiB; 102.4 were measured.)
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
) -> int:
    """What one block keeps for backward. ``tokens``: of all cp and tp ranks together; ``chunk``: of
    a rank's tokens, those that its MLP has at work, None: all."""
    u = tokens // shape.cp
    t = u // shape.tp
    if recompute == "full":
        return element * t * m.embed
    heads = u * (m.heads + _kv_heads(m)) * sum(m.head_dims) // shape.tp
    products = (3 if m.activation in ("swiglu", "geglu") else 2) - (recompute == "selective")
    residuals = (1 if recompute == "selective" else 2) * t * m.embed
    c = m.moe
    if c.experts:
        mlp = products * u * (c.top_k * c.mlp + c.shared) // shape.tp + t * c.top_k * m.embed
    else:
        mlp = products * (u if chunk is None else min(u, chunk)) * m.mlp // shape.tp
    return element * (residuals + 2 * u * m.embed + heads + mlp) + 4 * u * m.heads // shape.tp


def message_bytes(
    m: ModelConfig, shape: MeshShape, tokens: int, cp: Method, element: int = 2
) -> int:
    """What attention over cp has of other ranks' at once."""
    if shape.cp == 1:
        return 0
    u = tokens // shape.cp
    kv = element * u * _kv_heads(m) * sum(m.head_dims) // shape.tp
    q = element * u * m.heads * sum(m.head_dims) // shape.tp  # and results
    return {"ring": 4 * kv, "allgather": 2 * shape.cp * kv, "ulysses": 2 * (q + kv)}[cp]


def _kv_heads(m: ModelConfig) -> int:
    return m.heads if m.latent else m.kv_heads


def loss_bytes(m: ModelConfig, shape: MeshShape, tokens: int, element: int = 2) -> int:
    """A chunk's logits and their exponentials in float32, and the gradients that forward makes."""
    u, words = tokens // shape.cp, -(-m.padded_vocab // shape.tp)
    chunk = max(1, min(2**27 // words, (u + 1) // 2))
    return 2 * 4 * chunk * words + 2 * element * u * m.embed + 4 * words * m.embed


def activation_bytes(
    m: ModelConfig, shape: MeshShape, tokens: int, recompute: str, cp: Method, layers: Sequence[int]
) -> int:
    """The most that a rank has at once, of a stage with its share of ``layers``; see the top of the
    file."""
    one = block_bytes(m, shape, tokens, recompute)
    kept = max(n * one * (shape.pp - s) for s, n in enumerate(layers))
    chunk = mlp_chunk_tokens(recompute, tokens // shape.cp, m.mlp // shape.tp)
    gradients = block_bytes(m, shape, tokens, "none", chunk=chunk)
    again = gradients if recompute == "full" else 0
    return kept + max(
        again + gradients + message_bytes(m, shape, tokens, cp), loss_bytes(m, shape, tokens)
    )


def table(
    m: ModelConfig,
    shape: MeshShape,
    cp: Method,
    layers: Sequence[int],
    weights: int,
    sequences: Sequence[int],
) -> Table:
    """A line for each length that the mesh can cut; ``weights``: bytes of all else."""
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
    """Powers of 2 from 4096 to 1048576, rounded up to what the mesh cuts."""
    return [-(-(2**n) // unit) * unit for n in range(12, 21)]


def size(n: float) -> str:
    """Bytes for people: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
