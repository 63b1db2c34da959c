"""The plan of lab 10: the student's arithmetic is compared with dtron's counts and with two clocks,
and the mesh with a plan of dtron."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

from dtron.course.lab import Wrong, answer
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.model.flops import active_count, flops_per_token
from dtron.model.presets import preset
from dtron.model.transformer import declare_model
from dtron.tree import flat

PEAK, BANDWIDTH = 989e12, 4.8e12  # of an H200, from its data sheet: FLOP/s in bfloat16, bytes/s
TASK = "--model bench-8b-width --batch 32 --data.seq-len 4096"
GPU, GPUS, MOST_GIB, LEAST_TOKENS = "h100", 8, 8.0, 51_500
FLAGS = ("--mesh", "--zero", "--micro-batch", "--recompute")


def close(got: float, want: float, tolerance: float = 1e-6) -> bool:
    return abs(got - want) <= tolerance * abs(want)


def multiplied(m: ModelConfig) -> int:
    """Count the weights that multiply a token: all but the embedding, and of experts the token's
    own."""
    return active_count(m) - sum(w.numel for w in flat(declare_model(m).embedding))


def step_flops(cases: Sequence[tuple[str, int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``step_flops`` for presets, tokens of a row and rows."""

    def check(module: ModuleType) -> None:
        formula = answer(module, "step_flops")
        for name, seq_len, rows in cases:
            m = preset(name)
            want = flops_per_token(m, seq_len) * rows * seq_len
            got = formula(multiplied(m), m.layers, m.heads * m.head_dim, seq_len, rows * seq_len)
            if not close(got, want):
                raise Wrong(
                    f"{name}, {rows} x {seq_len} tokens: a step has {want:.4e} FLOPs, and you say "
                    f"{got:.4e}, {got / want:.3f} of it"
                )

    return check


def mfu(cases: Sequence[tuple[float, float, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``mfu`` for FLOPs, seconds and GPUs."""

    def check(module: ModuleType) -> None:
        for flops, seconds, gpus in cases:
            want = flops / seconds / gpus / PEAK
            got = answer(module, "mfu")(flops, seconds, gpus, PEAK)
            if not close(got, want):
                raise Wrong(
                    f"{flops:.3g} FLOPs in {seconds:g} s on {gpus} GPUs of {PEAK / 1e12:.0f} "
                    f"TFLOP/s: the MFU is {want:.4f}, and you say {got:.4f}"
                )

    return check


def roofline(cases: Sequence[tuple[int, int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``matmul_seconds`` for sizes of matrices."""

    def check(module: ModuleType) -> None:
        for m, k, n in cases:
            compute, memory = 2 * m * k * n / PEAK, 2 * (m * k + k * n + m * n) / BANDWIDTH
            want = max(compute, memory)
            got = answer(module, "matmul_seconds")(m, k, n, PEAK, BANDWIDTH)
            if not close(got, want):
                limit = "FLOPs" if compute > memory else "bytes"
                raise Wrong(
                    f"[{m}, {k}] @ [{k}, {n}]: its {limit} take {1e6 * want:.2f} us, and you say "
                    f"{1e6 * got:.2f} us"
                )

    return check


Gathers = tuple[tuple[int, ...], tuple[float, ...], int, float]  # arguments of ``waiting``


def gathers(cases: Sequence[Gathers]) -> Callable[[ModuleType], None]:
    """Make a check of ``waiting``, against two clocks: one of kernels, one of messages."""

    def check(module: ModuleType) -> None:
        for weights, seconds, ranks, bandwidth in cases:
            now = arrived = waited = 0.0
            for w, s in zip(weights, seconds, strict=True):
                # The message of this block was asked for when the block before began.
                arrived += 2 * w * (ranks - 1) / ranks / bandwidth
                waited += max(0.0, arrived - now)
                begin = max(now, arrived)
                now, arrived = begin + s, begin
            got = answer(module, "waiting")(weights, seconds, ranks, bandwidth)
            if abs(got - waited) > 1e-6 * sum(seconds):
                raise Wrong(
                    f"blocks of {list(weights)} weights on {ranks} ranks, which compute for "
                    f"{list(seconds)} s: kernels wait for {waited:.4g} s, and you say {got:.4g} s"
                )

    return check


class Planned(NamedTuple):
    """Memory and speed of a plan: ``tokens`` per second on one GPU."""

    gib: float
    tokens: float


@cache
def planned(flags: str) -> Planned:
    """Plan the task with these flags. Raises UserError for flags that dtron refuses, and Wrong for
    another number of GPUs."""
    from dtron.runtime.cli import parse
    from dtron.tools.plan import PlanConfig, plan_config, quiet

    quiet()
    config = parse(shlex.split(f"{TASK} {flags}"), PlanConfig(), prog="dtron plan")
    if (gpus := MeshShape.parse(config.mesh).size) != GPUS:
        raise Wrong(f"{flags!r} has {gpus} GPUs, and there are {GPUS}")
    found = plan_config(config, GPU)
    return Planned(found.gib, found.tokens_per_second)


def plan(module: ModuleType) -> None:
    """Plan the student's mesh, and compare the plan with the task."""
    flags = answer(module, "PLAN")
    if not isinstance(flags, str):
        raise Wrong(f"PLAN is {type(flags).__name__}, not a text of flags, as on the command line")
    for word in shlex.split(flags):
        if word.startswith("-") and word.partition("=")[0] not in FLAGS:
            raise Wrong(f"PLAN has {word}; its flags are {', '.join(FLAGS)}")
    try:
        found = planned(flags)
    except UserError as error:
        raise Wrong(f"PLAN {flags!r}: {error}") from error
    what = f"{flags!r} has {found.gib:.1f} GiB and {found.tokens:,.0f} tokens/s per GPU"
    if found.gib > MOST_GIB:
        raise Wrong(f"{what}; too large: at most {MOST_GIB:g} GiB")
    if found.tokens < LEAST_TOKENS:
        raise Wrong(f"{what}; too slow: at least {LEAST_TOKENS:,}")


def other_sizes(module: ModuleType) -> None:
    step_flops((("bench-moe", 2048, 4), ("llama2-7b", 1024, 1)))(module)
    mfu(((1.25e16, 3.2, 64),))(module)
    roofline(((64, 64, 64), (1, 8192, 28672), (4096, 128, 4096)))(module)
    gathers(
        (((3 * 10**8, 10**7, 4 * 10**8), (2e-3, 5e-4, 1e-3), 16, 2e11), ((5,), (1.0,), 1, 1.0))
    )(module)
