"""Figures of layers and their tensors, from real DTensors on simulated ranks; see figures.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.attention import AttentionInputs
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.mla import MLA, MLAConfig, MLAMixer, mla
from dtron.layers.mlp import MLP, mlp
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.presets import preset
from dtron.params import declare, init, unshard
from dtron.tools.count_collectives import Collective, CollectiveCounter
from dtron.tools.drawing import FAINT, Canvas, TensorPicture, draw_mesh, draw_tensor
from dtron.tools.shard_shapes import coordinates, local_range

COLOURS = {"all_gather": "#4a8fd0", "reduce_scatter": "#50b060", "all_reduce": "#d05050"}


def pieces_of(x: Tensor) -> list:
    """Return the shard of a DTensor on each rank, from its placements."""
    sizes = tuple(x.device_mesh.shape)
    return [
        (rank, local_range(x.shape, sizes, x.placements, at)) for rank, at in coordinates(sizes)
    ]


def pending(x: Tensor) -> str:
    """Return the mesh axes over which a sum is pending."""
    names = x.device_mesh.mesh_dim_names
    return "+".join(a for a, p in zip(names, x.placements, strict=True) if p.is_partial())


def draw(
    canvas: Canvas, x: float, y: float, name: str, dims: str, t: Tensor, shape: MeshShape
) -> float:
    """Draw a DTensor with its shards and return the width.

    ``dims``: a letter for each dim; the caption adds the mesh axes that shard the dim."""
    sharded_by = [[] for _ in dims]
    for axis, p in zip(t.device_mesh.mesh_dim_names, t.placements, strict=True):
        if p.is_shard():
            sharded_by[p.dim].append(axis)
    caption = ", ".join(
        d + "@" * bool(axes) + "+".join(axes) for d, axes in zip(dims, sharded_by, strict=True)
    )
    tensor = TensorPicture(name, f"[{caption}]", tuple(t.shape), pieces_of(t), pending(t))
    width, _ = draw_tensor(canvas, x, y, tensor, shape)
    return width


@dataclass(frozen=True)
class Recorder(Layout):
    """A layout that records the input and the output of every ``constrain``."""

    seen: list = field(default_factory=list)

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        y = super().constrain(x, *axes)
        self.seen.append((x.detach(), y.detach()))
        return y


def layer(shape: MeshShape) -> str:
    """Draw the tensors of an MLP from left to right."""
    dims = {"embed": 384, "mlp": 1280, "gated": True, "bias": False, "layers": 1}
    with simulated(shape) as mesh:
        layout = Recorder(mesh)
        p = unshard(init(declare(MLP, dims), dims, 0, layout), layout)
        x = layout.shard(torch.ones(1024, 384), "tokens_sp", "act_embed")
        with CollectiveCounter(mesh) as counter:
            mlp(p, x, layout)
        (x_before, x_after), (y_before, y_after) = layout.seen
        canvas = Canvas(1180)
        first, second = counter.order
        steps = [
            ("x_TD", "TD", x_before, first),
            ("x_TD", "TD", x_after, "@"),
            ("w_gate, w_up", "DF", p.w_up, "="),
            ("h_TF", "TF", x_after @ p.w_up, "@"),
            ("w_down", "FD", p.w_down, "="),
            ("y_TD", "TD", y_before, second),
            ("y_TD", "TD", y_after, ""),
        ]
        flow(canvas, "An MLP", steps, shape)
    return canvas.svg()


def flow(
    canvas: Canvas,
    name: str,
    steps: list[tuple[str, str, torch.Tensor, Collective | str]],
    shape: MeshShape,
) -> float:
    """Draw the mesh, and below it tensors from left to right, each followed by its operation or
    collective. Returns the upper end of the tensors."""
    canvas.text(20, 28, f"{name} on {shape}", bold=True, size=16)
    draw_mesh(canvas, 20, 44, shape)
    left, top = 20.0, 70 + 33 * shape.size / shape.tp + 16
    for name, letters, tensor, then in steps:
        left += draw(canvas, left, top, name, letters, tensor, shape) + 10
        if isinstance(then, Collective):
            arrow(canvas, left, top + 76, then)
            left += 108
        elif then:
            canvas.text(left, top + 80, then, size=16, bold=True)
            left += 26
    return top


def arrow(canvas: Canvas, x: float, y: float, collective: Collective) -> None:
    canvas.arrow(x, y, 98)
    canvas.text(
        x, y - 8, collective.kind.replace("_", "-"), size=12, colour=COLOURS[collective.kind]
    )
    canvas.text(x, y + 16, f"over {collective.axis}", size=11, colour=FAINT)


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
