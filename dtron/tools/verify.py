"""``python -m dtron.verify --mesh dp=2,tp=2``: is the sharding still right?

Builds a model and one global batch, takes one optimizer step on one device and one on the simulated
mesh, both in float64, and compares the loss, every gradient and every weight after the step. Two
correct programs differ by the rounding of sums taken in another order, about 1e-15; a forgotten
reduction differs by 0.1 to 1. Anything over 1e-9 is a bug. Edit a layer, run this.

Also printed: what the step communicated, by kind and mesh axis. What a simulation cannot show is a
mistake of the network or of a device; the tests repeat the comparison on real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.context_parallel import Method
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.config import ModelConfig
from dtron.params import draw, flat, leaves, tree_map
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig, Schedule
from dtron.runtime.validate import check, microbatches
from dtron.schedules.runner import Program
from dtron.tools.count_collectives import (
    CollectiveCounter,
    HiddenCommunication,
    no_hidden_communication,
)
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import adam_init
from dtron.training.pipeline import pipeline

TOLERANCE = 1e-9
NORM = "the gradient norm"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as whole tensors."""

    loss: float
    norm: float
    grads: Any
    params: Any
    first_moments: Any
    second_moments: Any
    collectives: CollectiveCounter


@dataclass(frozen=True)
class Difference:
    """Relative errors of one weight: largest difference over largest value."""

    path: str
    grad: float
    weight: float
    state: float = 0.0
    """of the optimizer's moments, the larger error of the two"""

    @property
    def same(self) -> bool:
        """Written so that NaN is not."""
        return self.grad <= TOLERANCE and self.weight <= TOLERANCE and self.state <= TOLERANCE


def one_step(
    config: RunConfig, shape: MeshShape, mutate: Callable[[Layout], Layout] = lambda x: x
) -> StepResult:
    """The step that ``config`` describes, on simulated ranks (``MeshShape()`` is one device), in
    float64."""
    m = config.model
    rows = _random_rows(config)
    documents, positions = _random_documents(config) if config.data.document_mask else (None, None)
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    with simulated(shape) as mesh:
        layout = mutate(Layout(mesh, rules_for(config.zero)))
        pipe = pipeline(config, shape, count, config.data.sequence, layout)
        dims = m.dims()
        params = tree_map(
            lambda w: layout.shard(draw(w, dims, config.seed).double(), *w.axes), pipe.spec
        )
        parts = lambda x: [None] * count if x is None else x.chunk(count)
        batches = [
            make_batch(*one, depth=m.mtp.depth, zigzag=config.zigzags)
            for one in zip(
                rows.chunk(count), [layout] * count, parts(documents), parts(positions), strict=True
            )
        ]
        run_plan = RunPlan.eager(config, shape, count, torch.float64, torch.float64)
        step = build_step(config, run_plan, pipe, wrap=_guarded)
        with CollectiveCounter(mesh) as counter:
            done = [*step.gradients(params, batches)]
        whole_grads = pipe.whole(done[1], lambda g: full(g).clone())  # the update consumes them
        tokens, lr = valid_tokens(rows), config.optim.lr
        loss, norm, _, params, opt = step.update(params, adam_init(params), done, tokens, lr)
        whole = [pipe.whole(tree, lambda x: full(x).clone()) for tree in (params, opt.m, opt.v)]
        return StepResult(loss.item(), norm.item(), whole_grads, *whole, counter)


def _guarded(functions: Program) -> Program:
    """The same functions, under the guard against hidden communication."""

    def guard(fn: Callable) -> Callable:
        def guarded(*args):
            with no_hidden_communication():
                return fn(*args)

        return guarded

    return replace(functions, enter=guard(functions.enter), stage=guard(functions.stage))


def on_one_device(config: RunConfig) -> RunConfig:
    """The same step without a pipeline. An auxiliary loss sees which tokens are in a micro-batch,
    so then these are the same too."""
    config = replace(config, schedule="1f1b", pipeline=PipelineConfig())
    if not config.model.moe.aux_loss:
        return config
    return replace(
        config,
        micro_batch=microbatches(config.batch, config.micro_batch, MeshShape.parse(config.mesh))[1],
    )


def compare(want: StepResult, got: StepResult) -> tuple[float, list[Difference]]:
    """``(relative error of the loss, errors of every weight, and last of the gradient norm)``. A
    weight whose gradient is zero but for rounding (a key's bias: softmax does not see it) is
    measured against a small part of the largest gradient, weight or moment instead of itself."""
    floors = {"grads": 1e-6, "params": 1e-2, "first_moments": 1e-6, "second_moments": 1e-12}
    errors = {
        name: _errors(getattr(want, name), getattr(got, name), share)
        for name, share in floors.items()
    }
    rows = [
        Difference(path, grad, weight, max(m, v, key=lambda error: (error != error, error)))
        for (path, _), grad, weight, m, v in zip(leaves(want.grads), *errors.values(), strict=True)
    ]
    norm = abs(got.norm - want.norm) / abs(want.norm)
    return abs(got.loss - want.loss) / abs(want.loss), [*rows, Difference(NORM, norm, 0.0)]


def _errors(want: Any, got: Any, share: float) -> list[float]:
    floor = share * max(x.abs().max().item() for x in flat(want))
    return [relative_error(y, x, floor) for x, y in zip(flat(want), flat(got), strict=True)]


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value, or over ``floor`` where that is larger."""
    if got.shape != want.shape:
        return float("inf")
    gap, scale = (got - want).abs().max().item(), max(want.abs().max().item(), floor)
    return gap / scale if scale else gap


def _random_rows(config: RunConfig) -> Tensor:
    """A global batch of random tokens in which some targets do not count, unevenly over the
    rows."""
    g = torch.Generator().manual_seed(config.seed)
    rows = torch.randint(config.model.vocab, (config.batch, config.data.sequence + 1), generator=g)
    rows[:: max(2, config.batch // 3), -max(1, config.data.sequence // 3) :] = IGNORE
    return rows


def _random_documents(config: RunConfig) -> tuple[Tensor, Tensor]:
    """``(document, position)`` of every token, a document beginning at about every tenth."""
    g = torch.Generator().manual_seed(config.seed + 1)
    begins = torch.rand(config.batch, config.data.sequence, generator=g) < 0.1
    places = torch.arange(config.data.sequence).expand(begins.shape)
    starts = torch.where(begins, places, 0).cummax(1).values
    return begins.cumsum(1), places - starts


@dataclass(frozen=True)
class VerifyConfig:
    """Prove that one optimizer step on a mesh is that of one device, in float64, on simulated
    ranks."""

    mesh: str = "dp=2,tp=2"
    """the mesh to prove, as dp=2,tp=2,pp=2"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage"""
    batch: int | None = None
    """sequences in the step; None: a few microbatches"""
    micro_batch: int | None = None
    """sequences per rank at once"""
    sequence: int = 32
    """tokens per sequence"""
    document_mask: bool = False
    """several documents in a sequence, which attend within themselves only"""
    recompute: str = "none"
    """activations computed again in backward"""
    cp: Method = "ring"
    """attention over cp"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: each rank has an early and a late part of a sequence"""
    schedule: Schedule = "1f1b"
    """pipeline schedule"""
    seed: int = 0
    """of weights and batch"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def run(self) -> RunConfig:
        """The training run whose step is taken."""
        shape = MeshShape.parse(self.mesh)
        micro_batch = self.micro_batch or (2 if shape.pp == 1 else 1)
        count = 2 if shape.pp == 1 else 2 * shape.pp + 1  # an odd number, that fills any pipeline
        return RunConfig(
            mesh=self.mesh,
            zero=self.zero,
            batch=self.batch or count * micro_batch * shape.data,
            micro_batch=micro_batch,
            recompute=self.recompute,
            schedule=self.schedule,
            seed=self.seed,
            cp=self.cp,
            zigzag=self.zigzag,
            pipeline=self.pipeline,
            model=self.model,
            data=DataConfig(sequence=self.sequence, document_mask=self.document_mask),
        )


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse  # tests import this module and need no command line

    config = parse(argv, VerifyConfig(), prog="python -m dtron.verify").run()
    shape = MeshShape.parse(config.mesh)
    check(config.model, shape, config.data.sequence, config.cp, config.zigzags)
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    pipeline(config, shape, count, config.data.sequence, Layout())  # refuses what cannot be
    console = Console()
    want = one_step(on_one_device(config), MeshShape())
    try:
        got = one_step(config, shape)
    except (HiddenCommunication, ValueError) as error:
        console.print(f"mesh {shape}, zero {config.zero}: {error}", markup=False, soft_wrap=True)
        return 1
    loss_error, rows = compare(want, got)
    console.print(_error_table(shape, config, loss_error, rows))
    console.print(_collective_table(got.collectives))
    wrong = next((r for r in rows if not r.same), None)
    if wrong is None and loss_error <= TOLERANCE:
        console.print(
            f"mesh {shape}, zero {config.zero}: the same result as one device, to {TOLERANCE:.0e}"
        )
        return 0
    what = (
        f"{wrong.path} (gradient {wrong.grad:.1e}, weight {wrong.weight:.1e}, moments {wrong.state:.1e})"
        if wrong
        else f"loss {loss_error:.1e}"
    )
    console.print(f"mesh {shape}, zero {config.zero}: differs from one device, first in {what}")
    return 1


def _error_table(
    shape: MeshShape, config: RunConfig, loss_error: float, rows: list[Difference]
) -> Table:
    table = Table(
        title=f"relative errors of one step on {shape} ({shape.size} ranks, zero {config.zero})"
    )
    table.add_column("")
    for name in ("gradient", "weight", "moments"):
        table.add_column(name, justify="right")
    table.add_row("loss", f"{loss_error:.1e}", "", "")
    for r in rows:
        style = None if r.same else "bold red"
        table.add_row(r.path, f"{r.grad:.1e}", f"{r.weight:.1e}", f"{r.state:.1e}", style=style)
    return table


def _collective_table(counter: CollectiveCounter) -> Table:
    table = Table(title="collectives of one step, per rank")
    for name in ("kind", "over", "count", "MiB"):
        table.add_column(name, justify="right" if name in ("count", "MiB") else "left")
    for key, n in sorted(counter.count.items()):
        table.add_row(key.kind, key.axis, str(n), f"{counter.bytes[key] / 2**20:.3f}")
    return table
