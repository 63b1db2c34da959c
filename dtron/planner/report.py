"""A plan as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.flops import flops_per_token
from dtron.planner.gpu_rates import Gpu
from dtron.planner.plan_step import SECOND, STATE, RankPlan
from dtron.planner.step_time import RankTime, link_of
from dtron.runtime.config import RunConfig

GIB = 2**30
STEP = ("activations", "gradients", "messages", "working", "batch")


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step on all ranks.

    ``ranks``, ``times``: of each pipeline rank.
    ``tokens``: tokens of a step, on all ranks.
    ``copy_engines``: copy engines carry the weights of ZeRO-3."""

    config: RunConfig
    shape: MeshShape
    gpu: Gpu
    ranks: Sequence[RankPlan]
    times: Sequence[RankTime]
    tokens: int
    copy_engines: bool = False

    @property
    def seconds(self) -> float:
        return max(t.now for t in self.times)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second on one GPU."""
        return self.tokens / self.seconds / self.shape.size

    @property
    def tflops(self) -> float:
        """TFLOP/s of one GPU, of the model's FLOPs without recomputation."""
        each = flops_per_token(self.config.model, self.config.data.seq_len, self.config.lora)
        return self.tokens_per_second * each / 1e12

    @property
    def watts(self) -> float:
        """The mean power of all GPUs together; 0 if the file of rates has no watts."""
        each = sum(t.watts for t in self.times) / len(self.times)
        return each * self.shape.size

    @property
    def gib(self) -> float:
        """The largest memory of a rank."""
        return max(r.largest for r in self.ranks) / GIB + self.gpu.overhead_gib

    @property
    def fits(self) -> bool:
        return self.gib <= self.gpu.memory_gib


def memory_table(plan: StepPlan) -> Table:
    """A row for each pipeline rank: what its memory holds at the largest total of a step."""
    out = Table(title=f"GiB of a GPU of {plan.gpu.memory_gib:g} GiB, mesh {plan.shape}")
    second = (SECOND,) if any(r.state[SECOND] for r in plan.ranks) else ()
    names = (*STATE, *second, *STEP)
    on_host = any(r.host for r in plan.ranks)
    columns = ("rank", "stages", *names, "libraries", "total", "at start")
    columns += ("host",) if on_host else ()
    for name in columns:
        out.add_column(name, justify="right", no_wrap=True)
    for r in plan.ranks:
        kinds = [_gib(r.peak.get(kind, 0)) for kind in names]
        total = sum(r.peak.values()) / GIB + plan.gpu.overhead_gib
        stages = ",".join(map(str, r.stages))
        host = [_gib(r.host)] if on_host else []
        libraries = f"{plan.gpu.overhead_gib:.2f}"
        out.add_row(str(r.rank), stages, *kinds, libraries, f"{total:.2f}", _gib(r.at_start), *host)
    return out


def time_table(plan: StepPlan) -> Table:
    """A row for each pipeline rank: the milliseconds of a step, and where they go."""
    kinds = list(dict.fromkeys(kind for t in plan.times for kind in t.busy))
    axes = list(dict.fromkeys(axis for t in plan.times for axis in t.exposed))
    out = Table(title=f"milliseconds of a step on {plan.gpu.name}")
    columns = ("rank", *kinds, *(f"waits for {axis}" for axis in axes), "waits for stages", "total")
    for name in columns:
        out.add_column(name, justify="right", no_wrap=True)
    for r, t in zip(plan.ranks, plan.times, strict=True):
        busy = [_ms(t.busy[kind]) for kind in kinds]
        waits = [_ms(t.exposed[axis]) for axis in axes]
        out.add_row(str(r.rank), *busy, *waits, _ms(t.bubble), _ms(t.now))
    return out


def communication_table(plan: StepPlan) -> Table:
    """A row for each mesh axis: what a rank sends in a step, and how much of it kernels hide."""
    out = Table(title="messages of a step: GB that a rank sends, and milliseconds")
    for name in ("axis", "link", "GB", "hidden", "exposed"):
        out.add_column(name, justify="right", no_wrap=True)
    for axis in dict.fromkeys(axis for t in plan.times for axis in t.sent):
        sent_by_rank = [t.sent[axis] for t in plan.times]
        most = plan.times[sent_by_rank.index(max(sent_by_rank))]
        link = link_of(plan.shape, axis, plan.gpu)
        sent = f"{most.sent[axis] / 1e9:.2f}"
        out.add_row(axis, link, sent, _ms(most.hidden[axis]), _ms(most.exposed[axis]))
    return out


def summary(plan: StepPlan, token_budget: float) -> list[str]:
    """Return lines with the speed, and the verdict on memory.

    ``token_budget``: tokens of a whole run; 0: no run is planned."""
    room = plan.gpu.memory_gib
    fits = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{fits}: {plan.gib:.1f} GiB of {room:g} GiB on the rank with the most",
        f"step {1e3 * plan.seconds:,.1f} ms, {plan.tokens:,} tokens: "
        f"{plan.tokens_per_second:,.0f} tokens/s and {plan.tflops:,.0f} TFLOP/s on each GPU, MFU "
        f"{100 * plan.tflops / plan.gpu.peak_tflops:.1f} %",
    ]
    if plan.watts:
        joules = plan.watts * plan.seconds / plan.tokens
        lines.append(
            f"power {plan.watts / plan.shape.size:,.0f} W of each GPU, at a clock of "
            f"{min(t.ghz for t in plan.times):.2f} GHz: {joules:.3g} J per token"
        )
    if token_budget:
        lines.append(run_text(plan, token_budget))
    return lines


def run_text(plan: StepPlan, token_budget: float) -> str:
    """Return a line with the steps and the time of a whole run."""
    hours = token_budget / plan.tokens * plan.seconds / 3600
    return (
        f"{token_budget:,.0f} tokens: {token_budget / plan.tokens:,.0f} steps, "
        f"{hours / 24:,.1f} days, {hours * plan.shape.size:,.0f} GPU-hours"
    )


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
