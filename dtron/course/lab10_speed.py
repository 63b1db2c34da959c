"""Lab 10: speed. The student's arithmetic is compared with dtron's counts, the mesh with a plan,
and the reading of a trace with right answers on the shipped trace and on traces that are made
up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.course.lab10_plan import (
    PEAK,
    close,
    gathers,
    mfu,
    multiplied,
    other_sizes,
    plan,
    roofline,
    step_flops,
)
from dtron.course.lab10_trace import (
    CLASSES,
    OTHER_NAMES,
    Kernel,
    busy,
    exposed,
    kernels,
    kind,
    made_up,
)
from dtron.model.flops import flops_per_token
from dtron.model.presets import preset
from dtron.model.transformer import declare_model
from dtron.tree import flat


def kinds_of_the_step(module: ModuleType) -> None:
    """Compare the classes of all kernels of the shipped trace, those with the most time first."""
    times: dict[str, float] = {}
    for k in kernels():
        times[k.name] = times.get(k.name, 0.0) + k.end - k.start
    _compare_kinds(module, [(n, kind(n)) for n in sorted(times, key=lambda n: -times[n])])


def kinds_of_others(module: ModuleType) -> None:
    _compare_kinds(module, OTHER_NAMES)


def _compare_kinds(module: ModuleType, names: Sequence[tuple[str, str]]) -> None:
    mine = answer(module, "kind")
    for name, want in names:
        if (got := mine(name)) not in CLASSES:
            raise Wrong(f"{name[:60]}: {got!r} is no class; the classes are {', '.join(CLASSES)}")
        if got != want:
            raise Wrong(f"{name[:90]} is of the class {want}, and you say {got}")


SMALL = (
    ("one kernel", (("matmul", 3, 7),)),
    ("a gap", (("matmul", 0, 2), ("matmul", 5, 6))),
    ("a message beside a matmul", (("matmul", 0, 4), ("communication", 1, 9))),
    ("a copy inside a matmul", (("matmul", 0, 9), ("copy", 2, 3), ("communication", 7, 12))),
    ("in no order of time", (("matmul", 6, 9), ("matmul", 0, 2))),
    ("two messages at once", (("communication", 0, 5), ("communication", 2, 8), ("copy", 6, 7))),
)


def small(spans: Sequence[tuple[str, int, int]]) -> list[Kernel]:
    names = {"matmul": "nvjet_a", "communication": "ncclDevKernel_AllGather", "copy": "Memcpy DtoD"}
    return [Kernel(names[k], float(start), float(end)) for k, start, end in spans]


def times(name: str, right: Callable[[list[Kernel]], float], hidden: bool) -> Callable:
    """Make a check of a function of a trace: on small traces, or on traces that are made up."""

    def check(module: ModuleType) -> None:
        mine = answer(module, name)
        traces = [(what, small(spans)) for what, spans in SMALL]
        if hidden:
            traces = [(f"made-up trace {seed}", made_up(seed)) for seed in range(4)]
        for what, trace in traces:
            want, got = right(trace), mine(list(trace))
            if abs(got - want) > 1e-6 * max(want, 1):
                spans = "" if hidden else f" ({', '.join(_text(k) for k in trace)})"
                raise Wrong(f"{what}{spans}: {name} is {want:g} us, and you say {got:g} us")

    return check


def _text(k: Kernel) -> str:
    return f"{kind(k.name)} from {k.start:g} to {k.end:g}"


def time_of_each(module: ModuleType) -> None:
    """Compare ``breakdown`` of the shipped trace and of one that is made up."""
    for what, trace in (("shipped trace", kernels()), ("made-up trace", made_up(9))):
        got = answer(module, "breakdown")(list(trace))
        span = max(k.end for k in trace) - min(k.start for k in trace)
        want = {c: busy(k for k in trace if kind(k.name) == c) for c in CLASSES}
        for name, us in {**want, "idle": span - busy(trace)}.items():
            if name not in got:
                raise Wrong(
                    f"{what}: breakdown has no {name!r}; write 0 if none of its kernels run"
                )
            if abs(got[name] - us) > 1e-6 * span:
                added = sum(k.end - k.start for k in trace if kind(k.name) == name)
                why = ", the sum of durations; kernels overlap" if close(got[name], added) else ""
                raise Wrong(f"{what}: {name} takes {us:,.1f} us, and you say {got[name]:,.1f}{why}")


def questions() -> dict[str, tuple[float, str]]:
    """Return the right answer to each question of the shipped trace, and advice."""
    m, tokens, trace = preset("bench-1.3b"), 2 * 4096, kernels()
    span = (max(k.end for k in trace) - min(k.start for k in trace)) / 1e6
    seconds = {c: busy(k for k in trace if kind(k.name) == c) / 1e6 for c in CLASSES}
    adamw = sum(k.end - k.start for k in trace if "_sqrt" in k.name) / 1e6
    whole, weights = flops_per_token(m, 4096) * tokens, 6.0 * multiplied(m) * tokens
    return {
        "MFU": (
            whole / span / PEAK,
            "FLOPs of the step, over the time from first start to last end",
        ),
        "TFLOP/s of matmuls": (weights / seconds["matmul"] / 1e12, "6 per weight and token"),
        "TFLOP/s of attention": (
            (whole - weights) / seconds["attention"] / 1e12,
            "a causal mask has half of the pairs",
        ),
        "GB/s of AdamW": (
            28 * sum(w.numel for w in flat(declare_model(m))) / adamw / 1e9,
            "all weights, also the embedding; the norm of the gradients is another kernel",
        ),
        "speedup without attention": (
            span / (span - seconds["attention"]),
            "the time of the step over the time that is left",
        ),
    }


def answers(module: ModuleType) -> None:
    """Compare ``ANSWERS``, to one percent. The points are the share of right ones."""
    given, asked = answer(module, "ANSWERS"), questions()
    mistakes = []
    for question, (want, advice) in asked.items():
        got = given.get(question)
        if got is None:
            mistakes.append(f"ANSWERS has no {question!r} yet")
        elif not isinstance(got, (int, float)):
            mistakes.append(f"{question!r}: {got!r} is no number")
        elif not close(got, want, 0.01):
            mistakes.append(
                f"{question!r}: {got:.4g} is {got / want:.3f} of the right number; {advice}"
            )
    if mistakes:
        raise Wrong(mistakes[0], share=1 - len(mistakes) / len(asked))


MS = (1e-3, 1e-3, 1e-3, 1e-3)
LAB = Lab(
    10,
    "speed",
    (
        Part("step_flops", 2, step_flops((("bench-1.3b", 4096, 2), ("llama3-8b", 8192, 1)))),
        Part("mfu", 1, mfu(((7.7e13, 0.14, 1), (6e15, 1.5, 8)))),
        Part("matmul_seconds", 1, roofline(((8192, 2048, 5632), (16, 4096, 4096)))),
        Part(
            "waiting",
            2,
            gathers((((10**8,) * 4, MS, 2, 2e11), ((10**8,) * 4, MS, 8, 1e11))),
        ),
        Part("PLAN", 3, plan),
        Part("kind", 2, kinds_of_the_step),
        Part("busy", 1, times("busy", busy, hidden=False)),
        Part("exposed", 1, times("exposed", exposed, hidden=False)),
        Part("breakdown", 1, time_of_each),
        Part("ANSWERS", 3, answers),
        Part("the arithmetic, other sizes", 2, other_sizes, hidden=True),
        Part("kind, other traces", 2, kinds_of_others, hidden=True),
        Part("busy, other traces", 1, times("busy", busy, hidden=True), hidden=True),
        Part("exposed, other traces", 2, times("exposed", exposed, hidden=True), hidden=True),
    ),
)
