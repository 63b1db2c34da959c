"""``python -m dtron.verify --mesh dp=2,tp=2``: check that sharding does not change the result.

The command builds a model and one global batch. It takes one optimizer step on one device and one
on the simulated mesh, both in float64. Then it compares the loss, every gradient and every weight
after the step. Two correct programs sum in a different order; their rounding differs by about
1e-15. A forgotten reduction differs by 0.1 to 1. Anything over 1e-9 is a bug. Run this after
editing a layer.

The command also prints the collectives of the step by kind and mesh axis. A simulation cannot show
faults of the network or of a device; the tests repeat the comparison on real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.runtime.validate import check, microbatches
from dtron.schedules.runner import Program
from dtron.tools.count_collectives import (
    CollectiveCounter,
    HiddenCommunication,
    no_hidden_communication,
)
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state
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
    state: dict[str, Any]
    collectives: CollectiveCounter


@dataclass(frozen=True)
class Difference:
    """Relative errors of one weight: largest difference over largest value."""

    path: str
    grad: float
    weight: float
    state: float = 0.0
    """of the optimizer's state, the largest error of its trees"""

    @property
    def same(self) -> bool:
        """Whether all errors are within TOLERANCE; NaN is not."""
        return self.grad <= TOLERANCE and self.weight <= TOLERANCE and self.state <= TOLERANCE


def one_step(
    config: RunConfig, shape: MeshShape, mutate: Callable[[Layout], Layout] = lambda x: x
) -> StepResult:
    """Take the step of ``config`` in float64 on simulated ranks (``MeshShape()`` is one device)."""
    m = config.model
    rows = _random_rows(config)
    documents, positions = _random_documents(config) if config.data.document_mask else (None, None)
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    with simulated(shape) as mesh:
        layout = mutate(Layout(mesh, rules_for(config.zero)))
        pipe = pipeline(config, shape, count, config.data.seq_len, layout)
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
        whole = partial(pipe.whole, fn=lambda x: full(x).clone())
        whole_grads = whole(done[1])  # the update consumes them
        tokens, lr = valid_tokens(rows), config.optim.lr
        opt = init_state(step.optimizer, pipe.spec, params)
        loss, norm, _, params, opt = step.update(params, opt, done, tokens, lr)
        state = {name: whole(tree) for name, tree in opt.trees.items()}
        return StepResult(loss.item(), norm.item(), whole_grads, whole(params), state, counter)


def _guarded(functions: Program) -> Program:
    """Wrap the functions in the guard against hidden communication."""

    def guard(fn: Callable) -> Callable:
        def guarded(*args):
            with no_hidden_communication():
                return fn(*args)

        return guarded

    return replace(functions, enter=guard(functions.enter), stage=guard(functions.stage))


def on_one_device(config: RunConfig) -> RunConfig:
    """The same step without a pipeline. An auxiliary loss depends on the tokens of a microbatch.
    With such a loss, the microbatches are the same too."""
    config = replace(config, pipeline=PipelineConfig())
    if not config.model.moe.aux_loss:
        return config
    return replace(
        config,
        micro_batch=microbatches(config.batch, config.micro_batch, MeshShape.parse(config.mesh))[1],
    )


def compare(want: StepResult, got: StepResult) -> tuple[float, list[Difference]]:
    """Return ``(relative error of the loss, errors of every weight, and last of the gradient
    norm)``. Some weights have zero gradient except for rounding (a key's bias: softmax ignores
    it). The error of such a weight is relative to a small part of the largest gradient, weight or
    state."""
    grads = _errors(want.grads, got.grads, 1e-6)
    weights = _errors(want.params, got.params, 1e-2)
    states = [_errors(want.state[name], got.state[name], 1e-6) for name in want.state]
    rows = [
        Difference(path, grads[path], weights[path], _worst(s[path] for s in states if path in s))
        for path in grads
    ]
    norm = abs(got.norm - want.norm) / abs(want.norm)
    return abs(got.loss - want.loss) / abs(want.loss), [*rows, Difference(NORM, norm, 0.0)]


def _errors(want: Any, got: Any, share: float) -> dict[str, float]:
    """Return the error of every leaf by path.

    ``share``: the part of the largest value that errors are relative to, at least."""
    found = dict(leaves(got))
    floor = share * max((x.abs().max().item() for x in flat(want)), default=0.0)
    return {path: relative_error(found[path], x, floor) for path, x in leaves(want)}


def _worst(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if one is NaN."""
    return max(errors, key=lambda error: (error != error, error), default=0.0)


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value, or over ``floor`` where that is larger."""
    if got.shape != want.shape:
        return float("inf")
    gap, scale = (got - want).abs().max().item(), max(want.abs().max().item(), floor)
    return gap / scale if scale else gap


def _random_rows(config: RunConfig) -> Tensor:
    """Draw a global batch of random tokens. Some targets are ignored, unevenly over the rows."""
    g = torch.Generator().manual_seed(config.seed)
    rows = torch.randint(config.model.vocab, (config.batch, config.data.seq_len + 1), generator=g)
    rows[:: max(2, config.batch // 3), -max(1, config.data.seq_len // 3) :] = IGNORE
    return rows


def _random_documents(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Draw ``(document, position)`` of every token; about every tenth token begins a document."""
    g = torch.Generator().manual_seed(config.seed + 1)
    begins = torch.rand(config.batch, config.data.seq_len, generator=g) < 0.1
    places = torch.arange(config.data.seq_len).expand(begins.shape)
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
    seq_len: int = 32
    """tokens per sequence"""
    document_mask: bool = False
    """several documents in a sequence, which attend within themselves only"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations computed again in backward"""
    cp_method: Method = "ring"
    """attention over cp"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: each rank has an early and a late part of a sequence"""
    zero3_gather: Literal["step", "microbatch"] = "step"
    """zero 3 with pp: when weights are gathered"""
    seed: int = 0
    """of weights and batch"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def run(self) -> RunConfig:
        """The training run whose step is taken."""
        shape = MeshShape.parse(self.mesh)
        micro_batch = self.micro_batch or (2 if shape.pp == 1 else 1)
        count = 2 if shape.pp == 1 else 2 * shape.pp + 1  # odd, and fills any pipeline
        return RunConfig(
            mesh=self.mesh,
            zero=self.zero,
            batch=self.batch or count * micro_batch * shape.data,
            micro_batch=micro_batch,
            recompute=self.recompute,
            zero3_gather=self.zero3_gather,
            seed=self.seed,
            cp_method=self.cp_method,
            zigzag=self.zigzag,
            pipeline=self.pipeline,
            optim=self.optim,
            model=self.model,
            data=DataConfig(seq_len=self.seq_len, document_mask=self.document_mask),
        )


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse  # tests import this module and need no command line

    config = parse(argv, VerifyConfig(), prog="python -m dtron.verify").run()
    shape = MeshShape.parse(config.mesh)
    check(config.model, shape, config.data.seq_len, config.cp_method, config.zigzags)
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    pipeline(config, shape, count, config.data.seq_len, Layout())  # raises if invalid
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
        f"{wrong.path} (gradient {wrong.grad:.1e}, weight {wrong.weight:.1e}, state {wrong.state:.1e})"
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
    for name in ("gradient", "weight", "state"):
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
