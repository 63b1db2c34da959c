"""Bytes of a block's activations, from the model config alone. The top of tools/memory_estimate.py
explains the terms."""

from __future__ import annotations

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.activation_checkpoint import ActivationPolicy, BlockBytes
from dtron.model.config import ModelConfig


def block_bytes(
    m: ModelConfig,
    shape: MeshShape,
    tokens: int,
    element: int = 2,
    chunk: int | None = None,
    layer: int = 0,
) -> BlockBytes:
    """Return the bytes of one block's activations. An activation policy keeps some of them.

    ``tokens``: tokens of all cp and tp ranks together.
    ``chunk``: tokens of a rank that its MLP processes at once (None: all).
    ``layer``: the index of the block, which chooses its mixer.
    """
    u = tokens // shape.cp
    t = u // shape.tp
    mixer, c = m.mixer(m.letter(layer)), m.moe
    sparse, dense = m.sparse(layer), m.dense(layer)
    sublayers = mixer.present + (sparse or dense)

    def total(residuals: int, products: int) -> int:
        """Add up, with this many residuals and inputs or outputs of the MLP's matmuls."""
        mlp = 0
        if sparse:
            mlp = products * u * (c.top_k * c.mlp + c.shared) // shape.tp + t * c.top_k * m.embed
        elif dense:
            mlp = products * (u if chunk is None else min(u, chunk)) * m.mlp // shape.tp
        streams = residuals * t * m.embed + sublayers * u * m.embed
        return element * (streams + mlp) + mixer.activation_bytes(shape, tokens, element)

    products = 3 if m.activation in ("swiglu", "geglu") else 2
    norms = sublayers * (2 if m.norm_position == "sandwich" else 1)  # each keeps its input
    return BlockBytes(element * t * m.embed, total(1, products - 1), total(norms, products))


def host_bytes(
    m: ModelConfig,
    shape: MeshShape,
    tokens: int,
    policy: ActivationPolicy,
    blocks: range,
    element: int = 2,
) -> int:
    """Return the bytes of activations that a rank moves to the host for one microbatch in one
    stage.

    ``tokens``: tokens of all cp and tp ranks together.
    ``blocks``: the stage's blocks, by their index in the model."""
    return sum(
        block_bytes(m, shape, tokens, element, layer=i).all
        for i, block in zip(blocks, policy.of_stage(len(blocks)), strict=True)
        if block.offload_bytes is not None
    )
