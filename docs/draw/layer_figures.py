"""The figure of latent attention, from real DTensors on simulated ranks; see figures.py."""

from __future__ import annotations

import torch

from dtron.course.views.layer import Recorder, flow
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.attention import AttentionInputs
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.mla import MLA, MLAConfig, MLAMixer, mla
from dtron.model.config import ModelConfig
from dtron.model.presets import preset
from dtron.params import declare, init, unshard
from dtron.tools.count_collectives import CollectiveCounter
from dtron.tools.drawing import Canvas


def latent(shape: MeshShape) -> str:
    """Draw the tensors of latent attention, and below the cached numbers per token of models."""
    sizes = MLAConfig(kv_rank=256, q_rank=384, nope_dim=48, rope_dim=64, v_dim=64)
    dims = {"embed": 768, "heads": 16, "layers": 1, "layernorm": False, **sizes.dims()}
    with simulated(shape) as mesh:
        layout = Recorder(mesh)
        p = unshard(init(declare(MLA, dims), dims, 0, layout), layout)
        x = layout.shard(torch.ones(1024, 768), "tokens_sp", "act_embed")
        table = layout.shard(torch.zeros(1024, sizes.rope_dim), "tokens", None)
        with CollectiveCounter(mesh) as counter:
            mla(p, x, AttentionInputs(mask=AttentionMask(1024), table_TH=table), layout)
        (line_before, line_after), (y_before, y_after) = layout.seen
        canvas = Canvas(1400)
        first, second = counter.order
        steps = [
            ("x_TD", "TD", x, "@"),
            ("w_q_down", "DR", p.w_q_down, ""),
            ("w_kv_down", "DR", p.w_kv_down, "="),
            ("line_TR", "TR", line_before, first),
            ("line_TR", "TR", line_after, "@"),
            ("w_kv_up", "RNH", p.w_kv_up, "..."),
            ("w_o", "NHD", p.w_o, "="),
            ("y_TD", "TD", y_before, second),
            ("y_TD", "TD", y_after, ""),
        ]
        y = flow(canvas, "Latent attention", steps, shape) + 180
    canvas.text(
        20, y, "Numbers that a server keeps of each token, in every layer", bold=True, size=16
    )
    kept = {
        name: cached(preset(name)) for name in ("llama3.1-405b", "qwen3-235b-a22b", "deepseek-v3")
    }
    m = preset("deepseek-v3")
    kept["deepseek-v3 with keys and values of all heads"] = m.heads * sum(MLAMixer(m).head_dims)
    for i, (name, n) in enumerate(kept.items()):
        width = max(3, 700 * n / max(kept.values()))
        canvas.text(20, y + 31 + 28 * i, name)
        canvas.rect(350, y + 15 + 28 * i, width, 22, "#4a8fd0")
        canvas.text(358 + width, y + 31 + 28 * i, f"{n:,}", bold=True)
    return canvas.svg()


def cached(m: ModelConfig) -> int:
    """Return the numbers that generation caches for a token in a layer."""
    return m.mla.kv_rank + m.mla.rope_dim if m.latent else 2 * m.kv_heads * m.head_dim
