"""``python -m dtron.verify --mesh dp=2,tp=2``: is the sharding still right?

Builds a model and one global batch, takes one optimizer step on one device and one on the simulated mesh,
both in float64, and compares the loss, every gradient and every weight after the step. Two correct programs
differ by the rounding of sums taken in another order, about 1e-15; a forgotten reduction differs by 0.1 to 1.
Anything over 1e-9 is a bug. Edit a layer, run this.

Also printed: what the step communicated, by kind and mesh axis. What a simulation cannot show is a mistake of
the network or of a device; the tests repeat the comparison on real processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtron.collectives import CollectiveCounter, HiddenCommunication, no_hidden_communication
from dtron.config import DataConfig, RunConfig, check, microbatches
from dtron.dtensor import full
from dtron.layers.loss import IGNORE
from dtron.mesh import Layout, MeshShape, rules_for
from dtron.model import declare_model, forward, make_batch, valid_tokens
from dtron.optim import adam_init, adam_update, clip_scale, global_norm
from dtron.params import draw, flat, leaves, tree_map
from dtron.simulate import simulated
from dtron.step import gradients

TOLERANCE = 1e-9


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as whole tensors."""

    loss: float
    norm: float
    grads: Any
    params: Any
    collectives: CollectiveCounter


@dataclass(frozen=True)
class Difference:
    """Relative errors of one weight: largest difference over largest value."""

    path: str
    grad: float
    weight: float

    @property
    def same(self) -> bool:
        """Written so that NaN is not."""
        return self.grad <= TOLERANCE and self.weight <= TOLERANCE


def one_step(
    config: RunConfig, shape: MeshShape, mutate: Callable[[Layout], Layout] = lambda x: x
) -> StepResult:
    """The step that ``config`` describes, on simulated ranks (``MeshShape()`` is one device), in float64."""
    m = config.model
    spec, dims = declare_model(m), m.dims()
    whole = tree_map(lambda w: draw(w, dims, config.seed).double(), spec)
    rows = _random_rows(config)
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    with simulated(shape) as mesh:
        layout = mutate(Layout(mesh, rules_for(config.zero)))
        params = tree_map(lambda w, s: layout.shard(w.clone(), *s.axes), whole, spec)
        batches = [make_batch(r, layout) for r in rows.chunk(count)]

        def loss_fn(weights, batch):
            with no_hidden_communication():
                return forward(weights, batch, m, layout, config.recompute)

        with CollectiveCounter(mesh) as counter:
            loss, grads = gradients(loss_fn, params, batches, valid_tokens(rows), layout, config.zero)
            norm = global_norm(grads)
        whole_grads = tree_map(lambda g: full(g).clone(), grads)  # the update consumes them
        params, _ = adam_update(
            grads,
            adam_init(params),
            params,
            spec,
            config.optim.lr,
            clip_scale(norm, config.optim.clip),
            config.optim,
        )
        return StepResult(full(loss).item(), norm, whole_grads, tree_map(full, params), counter)


def compare(want: StepResult, got: StepResult) -> tuple[float, list[Difference]]:
    """``(relative error of the loss, errors of every weight)``. What is zero but for rounding (a key's bias:
    softmax does not see it) is measured against a small part of the largest gradient or weight instead of
    itself."""
    g_floor = 1e-6 * max(g.abs().max().item() for g in flat(want.grads))
    w_floor = 1e-2 * max(w.abs().max().item() for w in flat(want.params))
    rows = [
        Difference(path, relative_error(g, g0, g_floor), relative_error(w, w0, w_floor))
        for (path, g0), g, w0, w in zip(
            leaves(want.grads), flat(got.grads), flat(want.params), flat(got.params), strict=True
        )
    ]
    return abs(got.loss - want.loss) / abs(want.loss), rows


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value, or over ``floor`` where that is larger."""
    if got.shape != want.shape:
        return float("inf")
    gap, scale = (got - want).abs().max().item(), max(want.abs().max().item(), floor)
    return gap / scale if scale else gap


def _random_rows(config: RunConfig) -> Tensor:
    """A global batch of random tokens in which some targets do not count, unevenly over the rows."""
    g = torch.Generator().manual_seed(config.seed)
    rows = torch.randint(config.model.vocab, (config.batch, config.data.sequence + 1), generator=g)
    rows[:: max(2, config.batch // 3), -max(1, config.data.sequence // 3) :] = IGNORE
    return rows


def main(argv: Sequence[str]) -> int:
    from dtron.cli import parse  # tests import this module and need no command line

    defaults = RunConfig(data=DataConfig(sequence=32))
    config = parse(argv, defaults)
    shape = MeshShape.parse(config.mesh or "dp=2,tp=2")
    if "--batch" not in " ".join(argv):
        config = replace(config, batch=4 * shape.data, micro_batch=config.micro_batch or 2)
    check(config.model, shape, config.data.sequence)
    microbatches(config.batch, config.micro_batch, shape)
    console = Console()
    want = one_step(config, MeshShape())
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
        console.print(f"mesh {shape}, zero {config.zero}: the same result as one device, to {TOLERANCE:.0e}")
        return 0
    what = (
        f"{wrong.path} (gradient {wrong.grad:.1e}, weight {wrong.weight:.1e})"
        if wrong
        else f"loss {loss_error:.1e}"
    )
    console.print(f"mesh {shape}, zero {config.zero}: differs from one device, first in {what}")
    return 1


def _error_table(shape: MeshShape, config: RunConfig, loss_error: float, rows: list[Difference]) -> Table:
    table = Table(
        title=f"one step on {shape} ({shape.size} ranks, zero {config.zero}) against one device, float64"
    )
    table.add_column("")
    for name in ("relative error of the gradient", "of the weight after the step"):
        table.add_column(name, justify="right")
    table.add_row("loss", f"{loss_error:.1e}", "")
    for r in rows:
        style = None if r.same else "bold red"
        table.add_row(r.path, f"{r.grad:.1e}", f"{r.weight:.1e}", style=style)
    return table


def _collective_table(counter: CollectiveCounter) -> Table:
    table = Table(title="collectives of one step, per rank")
    for name in ("kind", "over", "count", "MiB"):
        table.add_column(name, justify="right" if name in ("count", "MiB") else "left")
    for key, n in sorted(counter.count.items()):
        table.add_row(key.kind, key.axis, str(n), f"{counter.bytes[key] / 2**20:.3f}")
    return table


if __name__ == "__main__":
    from dtron.cli import run_cli

    sys.exit(run_cli(main, sys.argv[1:]))
