"""``python -m dtron.verify --mesh dp=2,tp=2``: check that sharding does not change the result.

The command builds a model and one global batch. It takes one optimizer step on one device and one
on the simulated mesh, both in float64. Then it compares the loss, the gradient norm, every
gradient, and every weight and optimizer state after the step. Two correct programs sum in a
different order; their rounding differs by about 1e-15. A forgotten reduction differs by 0.1 to 1.
Anything over 1e-9 is a bug. Run this after editing a layer.

With ``--dtype bfloat16`` the steps compute as training does: in bfloat16, from float32 master
weights. Memory that no kernel has written is filled with NaN, so a read of it shows. The rounding
of bfloat16 has no fixed size. So both steps are compared with the float64 step of one device: the
mesh may differ by a few times as much as one device does. Rounding can also give a token another
expert, which is no small change; ``--model.moe.balanced`` sets the choice.

With ``--compile`` the mesh is not simulated. The command starts a process for each rank, and the
processes take the compiled step on the CPU, where inductor generates C++.

With a ``--loss.name`` that has a second model, such as dpo, the second model has random weights,
or with LoRA the frozen weights. The documents of a row are the answers of pairs.

With ``--bitwise`` the step on the mesh is taken twice, and all bits of the two results must be the
same. The processes of ``--compile`` are new ones each time.

The command also prints the collectives of the step by kind and mesh axis. A simulation cannot show
faults of the network or of a device.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.losses.config import LossConfig
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.head import loss_options
from dtron.model.lora import LoraConfig, check_lora
from dtron.model.transformer import declare_model
from dtron.moe.dispatch import Dispatch
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.runtime.determinism import deterministic
from dtron.runtime.validate import check, check_expert_sizes, check_recompute, microbatches
from dtron.tools.compare_steps import (
    TOLERANCE,
    Difference,
    compare,
    compare_rounded,
    different_bits,
)
from dtron.tools.count_collectives import (
    CollectiveCounter,
    HiddenCommunication,
)
from dtron.tools.first_nonfinite import FirstNonFinite
from dtron.tools.verify_processes import step_of_processes
from dtron.tools.verify_step import one_step
from dtron.training.low_bit_state import check_formats
from dtron.training.optim_config import build_optimizer
from dtron.training.pipeline import pipeline


def on_one_device(config: RunConfig) -> RunConfig:
    """Return the config of the same step without a pipeline. An auxiliary loss depends on the
    tokens of a microbatch, and forced balance on their places in it. With one of them, the
    microbatches are the same too."""
    config = replace(config, pipeline=PipelineConfig())
    if not (config.model.moe.aux_loss or config.model.moe.balanced):
        return config
    size = config.ramp.sizes[0]
    _, rows = microbatches(size, config.micro_batch, MeshShape.parse(config.mesh))
    return replace(config, micro_batch=rows)


def _exact(config: RunConfig) -> RunConfig:
    """Return the config of the same step in float64, whose master weights cannot be split."""
    return replace(config, optim=replace(config.optim, master_weights="float32"))


@dataclass(frozen=True)
class VerifyConfig:
    """Prove that one optimizer step on a mesh has the result of one device, in float64, on
    simulated ranks."""

    mesh: str = "dp=2,tp=2"
    """the mesh to prove, as dp=2,tp=2,pp=2"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage"""
    batch: int | None = None
    """sequences in the step; None: a few microbatches"""
    micro_batch: int | None = None
    """sequences per rank at once"""
    seq_len: int = 32
    """tokens per sequence"""
    document_mask: bool = False
    """several documents in a sequence; tokens attend within their document only"""
    recompute: str = "none"
    """activation policy: none, selective, full or offload; compiled also budget"""
    recompute_budget: float | None = None
    """with recompute budget or offload: the share of activations to keep, as 0.5"""
    cp_method: Method = "ring"
    """attention over cp"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: each rank has an early and a late part of a sequence"""
    zero3_gather: Literal["step", "microbatch"] = "step"
    """zero 3 with pp: when weights are gathered"""
    moe_dispatch: Dispatch = "auto"
    """how tokens reach their experts"""
    dtype: Literal["float64", "bfloat16"] = "float64"
    """bfloat16: compute as training does, with NaN in memory that no kernel has written"""
    compile: bool = False
    """take the compiled step; the command starts a process for each rank"""
    bitwise: bool = False
    """take the step on the mesh twice, with --deterministic: all bits must be the same"""
    seed: int = 0
    """random seed of weights and batch"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def run(self) -> RunConfig:
        """Return the config of the training run whose step is taken."""
        shape = MeshShape.parse(self.mesh)
        usual = 2 if shape.pp == 1 else 1
        micro_batch = usual if self.micro_batch is None else self.micro_batch
        count = 2 if shape.pp == 1 else 2 * shape.pp + 1  # odd, and fills any pipeline
        # The documents of a row are the answers of its pairs.
        masked = self.document_mask or self.loss.objective.sequences
        return RunConfig(
            mesh=self.mesh,
            zero=self.zero,
            batch=count * micro_batch * shape.data if self.batch is None else self.batch,
            micro_batch=micro_batch,
            recompute=self.recompute,
            recompute_budget=self.recompute_budget,
            zero3_gather=self.zero3_gather,
            moe_dispatch=self.moe_dispatch,
            deterministic=self.bitwise,
            seed=self.seed,
            cp_method=self.cp_method,
            zigzag=self.zigzag,
            pipeline=self.pipeline,
            optim=self.optim,
            model=self.model,
            lora=self.lora,
            loss=self.loss,
            data=DataConfig(seq_len=self.seq_len, document_mask=masked),
        )


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse  # tests import this module and need no command line

    flags = parse(argv, VerifyConfig(), prog="python -m dtron.verify")
    config, dtype, console = flags.run(), getattr(torch, flags.dtype), Console()
    shape = MeshShape.parse(config.mesh)
    if config.loss.folder:
        raise UserError(
            f"--loss.{config.loss.objective.second_model} {config.loss.folder}: the second model "
            "has random weights here; leave it out"
        )
    check(config.model, shape, config.data.seq_len, config.cp_method, config.zigzags)
    check_recompute(config.how, flags.compile)
    config.loss.objective.check(loss_options(config.model), config.model.padded_vocab, shape.tp)
    check_expert_sizes(config.how, config.model, shape, dtype, config.lora)
    optimizer, spec = build_optimizer(config.optim), config.declare()
    check_lora(declare_model(config.model), config.lora, shape, config.zero)
    check_formats(optimizer, spec, shape, config.zero, dtype)
    count, _ = microbatches(config.ramp.sizes[0], config.micro_batch, shape)
    pipeline(config, shape, count, config.data.seq_len, Layout())  # raises if invalid
    name = f"mesh {shape}, zero {config.zero}"
    exact = dtype == torch.float64
    limit = TOLERANCE if exact else 1.0
    try:
        want = one_step(_exact(on_one_device(config)), MeshShape())
        one = want if exact else one_step(on_one_device(config), MeshShape(), dtype=dtype)
        with deterministic(flags.bitwise):
            got, *again = (
                step_of_processes(config, shape, want, dtype)
                if flags.compile
                else one_step(config, shape, dtype=dtype)
                for _ in range(1 + flags.bitwise)
            )
    except (HiddenCommunication, ValueError) as error:
        for each in filter(None, (error, error.__cause__)):
            # A checkpointed block that was left has hooks on saved tensors until its frame ends.
            traceback.clear_frames(each.__traceback__)
        console.print(f"{name}: {error}", markup=False, soft_wrap=True)
        return 1
    for result, run, ranks, where in (
        (one, on_one_device(config), MeshShape(), "one device"),
        (got, config, shape, "the mesh"),
    ):
        if not result.finite:
            why = first_nonfinite(run, ranks, dtype) or result.first_nonfinite
            text = f"{name}: the step of {where} is not finite; {why}"
            console.print(text, markup=False, soft_wrap=True)
            return 1
    loss_error, rows = compare(want, got) if exact else compare_rounded(want, one, got)
    console.print(_error_table(shape, config, loss_error, rows, limit))
    if got.collectives is not None:
        console.print(_collective_table(got.collectives))
    if differs := [what for other in again if (what := different_bits(got, other))]:
        console.print(f"{name}: other bits the second time, first in {differs[0]}", soft_wrap=True)
        return 1
    wrong = next((r for r in rows if not r.within(limit)), None)
    if wrong is None and loss_error <= limit:
        within = f"to {TOLERANCE:.0e}" if exact else f"within the rounding of {flags.dtype}"
        twice = "; the same bits twice" if again else ""
        console.print(f"{name}: the same result as one device, {within}{twice}", soft_wrap=True)
        return 0
    first = f"loss {loss_error:.1e}" if wrong is None else _described(wrong)
    if not exact and config.model.moe.experts and not config.model.moe.balanced:
        first += (
            f"; rounding to {flags.dtype} may give a token another expert, so try "
            "--model.moe.balanced too, which sets the choice"
        )
    console.print(f"{name}: differs from one device, first in {first}", soft_wrap=True)
    return 1


def _described(d: Difference) -> str:
    return f"{d.path} (gradient {d.grad:.1e}, weight {d.weight:.1e}, state {d.state:.1e})"


def first_nonfinite(config: RunConfig, shape: MeshShape, dtype: torch.dtype) -> str | None:
    """Take the step again, and describe the first operation whose result is not finite."""
    watches: list[FirstNonFinite] = []

    def watch(weights: list[tuple[str, Tensor]]) -> FirstNonFinite:
        watches.append(FirstNonFinite(weights))
        return watches[0]

    one_step(config, shape, dtype=dtype, watch=watch)
    return watches[0].where


def _error_table(
    shape: MeshShape,
    config: RunConfig,
    loss_error: float,
    rows: list[Difference],
    tolerance: float,
) -> Table:
    kind = "relative errors" if tolerance < 1 else "errors, as multiples of the rounding,"
    table = Table(title=f"{kind} of one step on {shape} ({shape.size} ranks, zero {config.zero})")
    table.add_column("")
    for name in ("gradient", "weight", "state"):
        table.add_column(name, justify="right")
    table.add_row("loss", f"{loss_error:.1e}", "", "")
    for r in rows:
        style = None if r.within(tolerance) else "bold red"
        table.add_row(r.path, f"{r.grad:.1e}", f"{r.weight:.1e}", f"{r.state:.1e}", style=style)
    return table


def _collective_table(counter: CollectiveCounter) -> Table:
    table = Table(title="collectives of one step, per rank")
    for name in ("kind", "over", "count", "MiB"):
        table.add_column(name, justify="right" if name in ("count", "MiB") else "left")
    for key, n in sorted(counter.count.items()):
        table.add_row(key.kind, key.axis, str(n), f"{counter.bytes[key] / 2**20:.3f}")
    return table
