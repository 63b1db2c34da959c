"""Shows the placement of every weight on a mesh, and the memory of each rank.

    python -m dtron.show --mesh dp=8,tp=4 --model llama3-8b

The table has one row per weight; equal blocks share rows. A row has the logical axes with the mesh
axes that shard them, the placement, the whole shape and one rank's shape, and the bytes of one
rank:

    parameters  the master weight, and its copy in the compute dtype if that is another. ZeRO
                stages 1 and 2 gather all copies before the microbatches
    gradients   the gradients kept between microbatches; stages 0 and 1 do not shard them over dp
                and cp
    optimizer   the optimizer's state; for AdamW two moments

A second table has the memory of activations by sequence length, for one row per data rank; see
tools/memory_estimate.py. ``--svg FILE`` draws the mesh, and the shards of each weight of one block.

Placements follow from the rules. So nothing is allocated and no process is started, and any machine
can show a mesh of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.losses.config import LossConfig
from dtron.model.block import Block
from dtron.model.config import ModelConfig
from dtron.model.lora import LoraConfig, check_lora, with_lora
from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.model.transformer import Transformer, declare_model
from dtron.model.widths import describe_mup
from dtron.params import WeightSpec
from dtron.rules import RULES, place, rules_for
from dtron.runtime.check_loss import check_second_model
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.second_memory import second_model_bytes
from dtron.runtime.validate import check, sequence_unit
from dtron.schedules import make
from dtron.tools import memory_estimate
from dtron.tools.console import wide_console
from dtron.tools.drawing import Canvas, TensorPicture, draw_mesh, draw_tensor
from dtron.tools.memory_estimate import size
from dtron.tools.shard_shapes import coordinates, local_range, local_shape
from dtron.training.low_bit_state import master_bytes
from dtron.training.optim_config import OptimConfig, build_optimizer
from dtron.training.parameter_groups import check_groups, describe_groups
from dtron.tree import flat


@dataclass(frozen=True)
class ShowConfig:
    """Show the placement of every weight on a mesh, and the memory of each rank."""

    mesh: str = "dp=2,tp=2"
    """axes of the mesh, as dp=8,tp=4"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage"""
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """compute dtype; auto: bfloat16, as on a GPU; master weights, gradients and optimizer state are
    float32"""
    cp_method: Method = "ring"
    """method of attention over cp; the estimate counts its messages"""
    svg: str | None = None
    """also draw the mesh and one block into this file"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class Row:
    """One weight, or ``count`` weights with equal rows.

    ``shape``, ``local``: the shape of the whole weight, and of the largest shard.
    ``params``, ``grads``, ``optimizer``: bytes on the rank that holds most."""

    path: str
    count: int
    axes: str
    placement: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    params: int
    grads: int
    optimizer: int


def named_axes(w: WeightSpec, shape: MeshShape, zero: int) -> str:
    """Return ``[embed@dp, mlp@tp]``: each logical axis with the mesh axes that shard it."""
    rules = rules_for(zero)

    def named(axis: str) -> str:
        sharded_by = "+".join(a for a in rules[axis] if shape.parts(a) > 1)
        return f"{axis}@{sharded_by}" if sharded_by else axis

    return "[" + ", ".join(map(named, w.axes)) + "]"


def rows(
    model: ModelConfig,
    shape: MeshShape,
    zero: int,
    compute: int = 2,
    master: int = 4,
    spec: Transformer | None = None,
    optim: OptimConfig | None = None,
) -> list[Row]:
    """Return a row for each weight; equal blocks share rows.

    ``compute``, ``master``: bytes per element.
    ``spec``: the weights (None: the whole model).
    ``optim``: the optimizer whose state is counted (None: the default one)."""
    atoms = {a: n for a, n in shape.atoms.items() if a != "pp"}
    axes, sizes = list(atoms), list(atoms.values())
    first = [0] * len(axes)  # the first rank's shard is never smaller than another rank's
    found, optimizer = [], build_optimizer(optim or OptimConfig())
    for w, path, count in _grouped(spec or declare_model(model)):
        placements = place(rules_for(zero), axes, *w.axes)
        gathered = local_shape(w.shape, sizes, place(rules_for(0), axes, *w.axes), first)
        local = local_shape(w.shape, sizes, placements, first)
        n, n_gathered = math.prod(local), math.prod(gathered)
        in_use = w.dtype.itemsize if w.dtype else compute
        element = in_use if w.frozen else master_bytes(optimizer, w, master)
        copies = n * in_use if in_use != element else 0
        copies += n_gathered * in_use if zero < 3 and n != n_gathered else 0
        grads = 0 if w.frozen else master * (n_gathered if zero < 2 else n)
        state = 0 if w.frozen else optimizer.state_bytes(w, local, master)
        shown = [f"{axis}: {_short(p)}" for axis, p in zip(axes, placements, strict=True)]
        found.append(
            Row(
                path=path,
                count=count,
                axes=named_axes(w, shape, zero),
                placement=f"({', '.join(shown)})",
                shape=w.shape,
                local=local,
                params=count * (n * element + copies),
                grads=count * grads,
                optimizer=count * state,
            )
        )
    return found


def _grouped(spec: Transformer) -> list[tuple[WeightSpec, str, int]]:
    """Return ``(weight, path, count)`` of every weight. Consecutive equal blocks share their
    entries."""

    def kind(block: Block) -> list[tuple[str, tuple[int, ...]]]:
        return [(w.path.split(".", 2)[2], w.shape) for w in flat(block)]

    runs = [list(run) for _, run in groupby(spec.blocks, kind)]
    found: dict[str, tuple[str, int]] = {}
    firsts = []
    for run in runs:
        first, last = (flat(block)[0].path.split(".")[1] for block in (run[0], run[-1]))
        old = f"blocks.{first}."
        new = f"blocks.{first}-{last}." if first != last else old
        found |= {w.path: (w.path.replace(old, new, 1), len(run)) for w in flat(run[0])}
        firsts.append(run[0])
    shown = flat(replace(spec, blocks=tuple(firsts)))
    return [(w, *found.get(w.path, (w.path, 1))) for w in shown]


def _short(placement: Any) -> str:
    return f"S{placement.dim}" if placement.is_shard() else "+" if placement.is_partial() else "R"


def total(found: Sequence[Row]) -> tuple[int, int, int]:
    """Return the bytes on one rank: parameters, gradients, optimizer state."""
    return tuple(sum(getattr(r, name) for r in found) for name in ("params", "grads", "optimizer"))


def table(found: Sequence[Row], title: str) -> Table:
    """Return the table of weights, with a row of totals."""
    out = Table(title=title)
    for name in ("weight", "axes", "placement", "shape", "on one rank"):
        out.add_column(name, overflow="fold")
    for name in ("params", "gradients", "optimizer"):
        out.add_column(name, justify="right", no_wrap=True)
    for r in found:
        cost = (size(n) for n in (r.params, r.grads, r.optimizer))
        cells = (r.path, r.axes, r.placement, _by(r.shape), _by(r.local))
        out.add_row(*(c.replace("[", r"\[") for c in cells), *cost)
    out.add_section()
    out.add_row("one rank holds", "", "", "", "", *(size(n) for n in total(found)))
    return out


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def picture(model: ModelConfig, shape: MeshShape, zero: int) -> str:
    """Return an SVG of the mesh, and of the shards of every weight of one block."""
    atoms = {a: n for a, n in shape.atoms.items() if a != "pp"}
    axes, sizes = list(atoms), list(atoms.values())
    canvas = Canvas(940)
    canvas.text(20, 28, f"mesh {shape}: {shape.size} ranks", bold=True, size=16)
    y = draw_mesh(canvas, 20, 50, shape)
    title = f"one block of {model.layers}, zero {zero}: who holds which part"
    canvas.text(20, y + 30, title, bold=True, size=16)
    y, x, lowest = y + 50, 20, 0
    for w in flat(declare_model(model).blocks[-1]):
        placements = place(rules_for(zero), axes, *w.axes)
        shards = [
            (rank, local_range(w.shape, sizes, placements, coordinate))
            for rank, coordinate in coordinates(sizes)
        ]
        name = w.path.split(".", 2)[2]
        tensor = TensorPicture(name, named_axes(w, shape, zero), w.shape, shards)
        width, height = draw_tensor(canvas, x, y, tensor, shape)
        lowest, x = max(lowest, y + height), x + width + 30
        if x > 740:
            x, y = 20, lowest + 20
    return canvas.svg()


def _second_bytes(config: ShowConfig, shape: MeshShape, seq_len: int) -> list[int]:
    """Return the bytes of the second model of the loss on each pipeline rank."""
    names = ("zero", "cp_method", "model", "lora", "loss")
    own: Any = {name: getattr(config, name) for name in names}
    run = RunConfig(**own, data=DataConfig(seq_len=seq_len))
    check_second_model(run, shape)
    compute = torch.float32 if config.dtype == "float32" else torch.bfloat16
    return second_model_bytes(run, shape, make("1f1b", shape.pp, 1), compute, torch.float32)


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse

    config = parse(argv, ShowConfig(), prog="python -m dtron.show")
    shape = MeshShape.parse(config.mesh)
    zigzag = config.model.token_order(config.cp_method) == "zigzag"
    unit = sequence_unit(shape, zigzag)
    seq_len = memory_estimate.seq_lens(unit)[0]
    model = replace(config.model, context=max(seq_len, config.model.context))
    check(model, shape, seq_len, config.cp_method, zigzag)
    optimizer = build_optimizer(config.optim, config.model.mup)
    check_lora(declare_model(config.model), config.lora, shape, config.zero)
    declared = with_lora(declare_model(config.model), config.lora)
    check_groups(optimizer, declared)
    compute = 4 if config.dtype == "float32" else 2
    console = wide_console()
    layers = layers_per_stage(config.model, shape.pp, seq_len)
    stages, most = split_into_stages(config.model, layers), 0
    second = _second_bytes(config, shape, unit)  # a length that any second model has
    for number, stage in enumerate(stages):
        spec = with_lora(stage, config.lora)
        args = config.model, shape, config.zero, compute, 4, spec
        found = rows(*args, config.optim)
        which = f"stage {number} of {shape.pp}, " if shape.pp > 1 else ""
        console.print(table(found, f"{which}mesh {shape}: {shape.size} ranks, zero {config.zero}"))
        host = size(total(rows(*args, replace(config.optim, offload_state=False)))[2])
        beside = f", and {host} of state on the host" if config.optim.offload_state else ""
        if second[number]:
            beside += f", {size(second[number])} of it for the {config.loss.objective.second_model}"
        on_rank = sum(total(found)) + second[number]
        console.print(f"{size(on_rank)} on each rank{beside}, activations not counted")
        most = max(most, on_rank)
    for line in describe_groups(optimizer, declared):
        console.print(f"optimizer group {line}")
    for line in describe_mup(config.model):
        console.print(f"muP {line}")
    lens = memory_estimate.seq_lens(unit)
    console.print(memory_estimate.table(config.model, shape, config.cp_method, layers, most, lens))
    console.print(f"rules: {_rules_line(shape, config.model)}")
    if config.svg:
        try:
            Path(config.svg).write_text(picture(config.model, shape, config.zero))
        except OSError as error:
            why = f"cannot be written ({error.strerror}); choose another"
            raise UserError(f"--svg {config.svg}: {why}") from None
        console.print(f"drawn to {config.svg}")
    return 0


def _rules_line(shape: MeshShape, model: ModelConfig) -> str:
    """Return the rules that this model uses and that shard on this mesh."""
    used = {a for w in flat(declare_model(model)) for a in w.axes} | {"tokens", "tokens_sp"}
    used |= {"tokens_ep"} if "experts" in used else set()
    live = {k: [a for a in v if shape.parts(a) > 1] for k, v in RULES.items() if k in used}
    return ", ".join(f"{k}@{'+'.join(v)}" for k, v in live.items() if v) or "one device"
