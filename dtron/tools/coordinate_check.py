"""The coordinate check of muP (Yang et al. 2022, arXiv:2203.03466, appendix D.1).

    dtron coordinate-check --model.mup-base-width 64

trains a model at several widths for a few steps, on one fixed batch of random tokens. It measures
the result of each weight: the mean of its absolute values, and the mean of the absolute changes
since the first step. If a measure grows with the width, as width^slope, then no learning rate is
right for all widths. The command prints the measures and their slopes, and exits with 1 if a slope
is above ``--slope``. With the standard parametrization it fails, with muP it passes.

Measures may shrink with the width, as the first logits do under muP. Only growth is a fault.

All models have ``--model``'s proportions (``at_width``). Experts get equal numbers of tokens
(``moe.balanced``), so that each step compares the same tokens. Of several experts the first is
measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtron.bounds import under
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.batch import Batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model, predict
from dtron.model.widths import at_width
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import check
from dtron.tools.verify_step import plan_of, step_inputs
from dtron.tools.weight_use import WeightUse
from dtron.training.build import build_step
from dtron.training.optim_config import OptimConfig, build_optimizer
from dtron.training.optimizer import init_state
from dtron.training.parameter_groups import check_groups
from dtron.training.pipeline import pipeline
from dtron.tree import flat


@dataclass(frozen=True)
class CoordinateCheckConfig:
    """Check that activations do not grow with the model's width (muP)."""

    widths: str = "64,128,256,512"
    """values of model.embed; the other widths of the model change in proportion"""
    steps: int = 4
    """optimizer steps before the last measure, at the constant rate --optim.lr"""
    batch: int = 4
    """sequences in the batch"""
    seq_len: int = 64
    """tokens per sequence"""
    slope: float = 0.25
    """largest exponent of the width with which a measure may grow"""
    seed: int = 0
    """random seed of weights and batch"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("seq_len", 1)):
            if not least <= getattr(self, name) <= 1 << 20:
                raise UserError(
                    f"{name}={getattr(self, name)}: must be from {least} to {1 << 20}; change it"
                )
        under(self, "coordinate-check", {"slope": float("inf")})
        if len(set(self.sizes)) < 2:
            raise UserError(
                f"--widths {self.widths}: must be two widths at least, as 64,128; add another"
            )

    @property
    def sizes(self) -> list[int]:
        parts = [part.strip() for part in self.widths.split(",")]
        if not all(part.isdecimal() and 1 <= int(part) <= 1 << 20 for part in parts):
            raise UserError(
                f"--widths {self.widths!r}: must be widths of the model, as 64,128; change it"
            )
        return sorted({int(part) for part in parts})

    def run(self, width: int) -> RunConfig:
        """Return the config of the run at one width."""
        m = replace(self.model, context=max(self.model.context, self.seq_len))
        if m.moe.experts:
            m = replace(m, moe=replace(m.moe, balanced=True))
        return RunConfig(
            batch=self.batch,
            micro_batch=self.batch,
            seed=self.seed,
            steps=self.steps,
            optim=self.optim,
            model=at_width(m, width),
            data=DataConfig(seq_len=self.seq_len),
        )


class _Results(WeightUse):
    """Keeps the result of the first operation with each weight, by path."""

    def __init__(self, weights: Sequence[tuple[str, Tensor]]):
        super().__init__(weights)
        self.found: dict[str, Tensor] = {}

    def see(
        self, func: Any, path: str | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        if path is not None and outputs:
            self.found.setdefault(path, outputs[0])


def results(p: Any, batch: Batch, m: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Run the model. Return the results of its matrices and of the embedding by path, and the
    logits."""
    pairs = [
        (w.path, x)
        for w, x in zip(flat(declare_model(m)), flat(p), strict=True)
        if w.decays and w.path != "w_head"
    ]
    with torch.no_grad(), _Results(pairs) as seen:
        logits = predict(p, batch, m, layout)
    return {**seen.found, "logits": logits}


@dataclass(frozen=True)
class Measure:
    """The result of one kind of weight, a mean over the blocks.

    ``size``: the mean absolute value after the last step.
    ``change``: the mean absolute change since before the first step."""

    size: float
    change: float


def measures(config: RunConfig, dtype: torch.dtype = torch.float32) -> dict[str, Measure]:
    """Train on one device, and measure the result of each kind of weight. Weights of all blocks
    have one name, such as ``blocks.*.mlp.w_up``."""
    m, layout = config.model, Layout()
    plan = plan_of(config, MeshShape(), dtype)
    pipe = pipeline(config, MeshShape(), plan.count, config.data.seq_len, layout)
    step = build_step(config, plan, pipe)
    params, batches, tokens = step_inputs(config, pipe, plan.count, dtype)
    opt = init_state(build_optimizer(config.optim, m.mup), pipe.spec, params)
    first = results(params[0], batches[0], m, layout)
    for _ in range(config.steps):
        _, _, _, params, opt = step(params, opt, batches, tokens, config.optim.lr)
    last = results(params[0], batches[0], m, layout)
    groups: dict[str, list[Measure]] = {}
    for path, x in last.items():
        size, change = x.abs().mean().item(), (x - first[path]).abs().mean().item()
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(Measure(size, change))
    return {
        name: Measure(*(sum(xs) / len(xs) for xs in zip(*((a.size, a.change) for a in found))))
        for name, found in groups.items()
    }


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent s of the least-squares fit ``value = c width^s``. It is infinite for a
    value that is not finite."""
    if not all(map(math.isfinite, values)):
        return math.inf
    xs, ys = ([math.log(max(v, 1e-30)) for v in vs] for vs in (widths, values))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    up = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return up / sum((a - x) ** 2 for a in xs)


@dataclass(frozen=True)
class Row:
    """A measure of one kind of weight at all widths."""

    name: str
    kind: str
    values: list[float]
    slope: float


def coordinate_check(
    config: CoordinateCheckConfig, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Return the rows of the table."""
    sizes = config.sizes
    runs = [config.run(width) for width in sizes]  # refuses a width before anything is trained
    for run in runs:
        check(run.model, MeshShape(), config.seq_len)
    check_groups(build_optimizer(config.optim, config.model.mup), declare_model(runs[0].model))
    found, rows = [measures(run, dtype) for run in runs], []
    for name in found[0]:
        for kind in ("size", "change"):
            values = [getattr(one[name], kind) for one in found]
            rows.append(Row(name, kind, values, slope(sizes, values)))
    return rows


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse

    config = parse(argv, CoordinateCheckConfig(), prog="dtron coordinate-check")
    rows = coordinate_check(config)
    how = f"muP, base width {config.model.mup_base_width}" if config.model.mup else "standard"
    table = Table(title=f"mean absolute value, and its change in {config.steps} steps ({how})")
    for name in ("result of", "", *map(str, config.sizes), "slope"):
        table.add_column(name, justify="left" if name in ("result of", "") else "right")
    for row in rows:
        cells = (row.name, row.kind, *(f"{v:.2e}" for v in row.values), f"{row.slope:+.2f}")
        table.add_row(*cells, style="bold red" if row.slope > config.slope else None)
    console = Console()
    console.print(table)
    worst = max(rows, key=lambda row: row.slope)
    fails = worst.slope > config.slope
    console.print(
        f"{'grows' if fails else 'nothing grows'} with the width: the largest slope is "
        f"{worst.slope:+.2f}, of {worst.name} ({worst.kind}); at most {config.slope:g} is allowed",
        markup=False,
        soft_wrap=True,
    )
    return int(fails)
