"""The batch ramp: which samples each step has, the schedule over samples, and steps on any mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import accumulate
from math import ceil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.runtime.validate import microbatches, ramp_microbatches
from dtron.schedules import SCHEDULES, make
from dtron.testing import assert_caught, zero_stages
from dtron.training.batch_ramp import BatchRamp, parse_batch
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.lr_schedule import learning_rate
from dtron.training.optimizer import init_state
from dtron.training.pipeline import Pipeline, pipeline
from dtron.tree import flat
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, random_rows
from tests.helpers.texts import one_line
from tests.helpers.values import F64

# ---- the sizes of the steps


def test_a_text_of_each_form():
    assert parse_batch(16, 256) == parse_batch("16:0", 8) == BatchRamp((16,))
    assert parse_batch("4:0, 8:10,2:20", 8) == BatchRamp((4, 8, 2), (0, 10, 20))
    ramp = parse_batch(" 64:0 , 256 : 2B, 512:10.5B", 4096)
    assert ramp.sizes == (64, 256, 512) and ramp.in_samples
    assert ramp.begins == (0, ceil(2e9 / 4096), ceil(10.5e9 / 4096))
    assert parse_batch("1:0K,2:3K,4:1M", 1000).begins == (0, 3, 1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["--batch ''", "must be a number of sequences, or a ramp"]),
        ("many", ["--batch 'many'", "a ramp"]),
        ("1.5", ["--batch '1.5'", "a ramp"]),
        ("64:0,", ["a ramp"]),
        ("64:0:1", ["a ramp"]),
        ("64:0, :5", ["'' is no number of sequences"]),
        ("-4:0", ["'-4' is no number of sequences"]),
        ("4.5:0", ["'4.5' is no number"]),
        ("٤:0", ["is no number"]),
        ("0:0", ["0 sequences", "from 1 to"]),
        ("9" * 30 + ":0", ["sequences", "from 1 to"]),
        ("4:0, 8:", ["'' is no point of a run"]),
        ("4:0, 8:B", ["'B' is no point"]),
        ("4:0, 8:2T", ["'2T' is no point"]),
        ("4:0, 8:2.5", ["'2.5' is no point"]),
        ("4:0, 8:2.B", ["'2.B' is no point"]),
        ("4:0, 8:-3", ["'-3' is no point"]),
        ("4:0, 8:nan", ["'nan' is no point"]),
        ("4:0, 8:" + "9" * 20, ["more than any run has"]),
        ("4:10, 8:20", ["the first size must begin at 0", "4:0"]),
        ("4:0, 8:20, 16:20", ["each size must begin after the one before"]),
        ("4:0, 8:20, 16:3", ["raise 3"]),
        ("4:0, 8:2K, 16:3B, 32:4", ["each size must begin after"]),
        ("4:0, 8:2, 16:3B", ["some points are steps, and others are tokens"]),
    ],
)
def test_a_wrong_text_is_one_line(text, said):
    one_line(lambda: parse_batch(text, 16), *said)


def sizes_by_definition(ramp: BatchRamp, steps: int) -> list[int]:
    """The size of each step, one after the other: the last entry that has begun."""
    sizes: list[int] = []
    for step in range(steps):
        done = sum(sizes) if ramp.in_samples else step
        sizes.append(
            [s for s, begin in zip(ramp.sizes, ramp.begins, strict=True) if begin <= done][-1]
        )
    return sizes


ramps = st.builds(
    lambda entries, in_samples: BatchRamp(
        tuple(size for size, _ in entries),
        (0, *accumulate(gap for _, gap in entries[1:])),
        in_samples,
    ),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
    st.booleans(),
)


def samples_of(ramp: BatchRamp, steps: int, step: int = 0, samples: int = 0) -> list[range]:
    return [
        range(first, first + size)
        for count, start, size in ramp.phases(steps, step, samples)
        for first in range(start, start + count * size, size)
    ]


class ResumedByStep(BatchRamp):
    """A mutant: after a resume, the sample follows from the step and the size of the batch."""

    def phases(self, steps, step=0, samples=0):
        return super().phases(steps, step, step * self.size(step, samples))


@given(ramp=ramps, steps=st.integers(0, 30), data=st.data())
def test_every_sample_comes_once_and_in_order(ramp, steps, data):
    """From the first step, and after a resume at any step."""
    in_order(ramp, steps, data.draw(st.integers(0, steps)))


def test_a_resume_that_knows_the_step_alone_is_seen():
    in_order(BatchRamp((2, 4), (0, 3)), 6, 4)
    assert_caught(lambda: in_order(ResumedByStep((2, 4), (0, 3)), 6, 4))


def in_order(ramp: BatchRamp, steps: int, done: int) -> None:
    want = sizes_by_definition(ramp, steps)
    found = samples_of(ramp, steps)
    assert [len(part) for part in found] == want
    assert [x for part in found for x in part] == list(range(sum(want)))
    assert ramp.samples_after(steps) == sum(want)
    used = sum(want[:done])
    assert samples_of(ramp, steps, done, used) == found[done:]
    assert ramp.samples_after(steps, done, used) == sum(want)
    assert done == steps or ramp.size(done, used) == want[done]


def test_a_very_long_run_has_few_phases():
    ramp = parse_batch("64:0, 256:2B", 4096)
    assert len(list(ramp.phases(1 << 62))) == 2
    assert ramp.samples_after(1 << 62) > 1 << 62


# ---- microbatches


@given(
    shares=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    micro_batch=st.none() | st.integers(1, 4),
    mesh=st.builds(MeshShape, dp=st.integers(1, 3), pp=st.integers(1, 3)),
)
def test_all_steps_have_microbatches_of_one_size(shares, micro_batch, mesh):
    ramp = BatchRamp(tuple(n * mesh.data * (micro_batch or 1) for n in shares))
    counts, rows = ramp_microbatches(ramp, micro_batch, mesh)
    assert [count * rows for count in counts] == list(ramp.sizes)
    if micro_batch is not None or len(set(shares)) == 1:
        assert (counts[0], rows) == microbatches(ramp.sizes[0], micro_batch, mesh)


# ---- the schedule


def test_the_learning_rate_is_a_function_of_samples():
    """Spelled out: steps of 2, 2, 2, 4, 4 samples after 0, 2, 4, 6 and 10."""
    optim = OptimConfig(lr=1.0, schedule="linear", warmup=0, min_lr_ratio=0.0)
    c = RunConfig(batch="2:0, 4:3", steps=5, optim=optim)
    rates = [learning_rate(c.optim, c.progress(*at)) for at in enumerate((0, 2, 4, 6, 10))]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.0])
    c = replace(c, optim=replace(c.optim, warmup=4))  # the first four steps have 10 samples
    rates = [learning_rate(c.optim, c.progress(*at)) for at in enumerate((0, 2, 4, 6, 10))]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])


@given(
    ramp=ramps.filter(lambda r: r.ramps),
    steps=st.integers(2, 30),
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.integers(0, 10),
)
def test_the_curve_over_samples_does_not_depend_on_the_sizes(ramp, steps, schedule, warmup):
    """The rate of a step after the warm-up is that of a run with one sample in each step."""
    c = RunConfig(steps=steps, optim=OptimConfig(schedule=schedule, warmup=warmup))
    c.__dict__["ramp"] = ramp
    used = list(accumulate(sizes_by_definition(ramp, steps), initial=0))[:-1]
    in_warmup = ramp.samples_after(warmup)
    single = RunConfig(
        batch=1, steps=used[-1] + 1, optim=OptimConfig(schedule=schedule, warmup=in_warmup)
    )
    rates = [learning_rate(c.optim, c.progress(step, s)) for step, s in enumerate(used)]
    for s, rate in zip(used, rates, strict=True):
        if s >= in_warmup:
            assert rate == pytest.approx(learning_rate(single.optim, single.progress(s, s)))
    assert all(rate <= c.optim.lr for rate in rates)
    if used[-1] > in_warmup and schedule != "constant":
        assert rates[-1] == pytest.approx(0.1 * c.optim.lr)


def test_one_size_counts_steps():
    """As before there were ramps. So a run may go on with another batch size."""
    for batch in (16, "16:0"):
        c = RunConfig(batch=batch, steps=50)
        assert c.progress(7, 999) == (7, 1, 20, 49)


# ---- the step


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, n) for name in SCHEDULES for n in (1, 2, 5, 12) if name != "dualpipe-v" or n > 5],
)
def test_only_the_table_depends_on_the_number_of_microbatches(name, count):
    """The stages of each rank, the pairs that need groups, and whether a backward has halves."""
    a, b = make(name, 3, count), make(name, 3, 8)
    assert (a.rank_of, a.pairs, a.in_halves) == (b.rank_of, b.pairs, b.in_halves)


CONFIG = RunConfig(
    model=replace(MODEL, layers=4), data=DataConfig(seq_len=16), steps=4, seed=3, zero=1
)
SIZES = (4, 12, 8)


def steps(mesh: str, config: RunConfig, change=lambda pipe: pipe) -> list[float]:
    """The losses and norms of a run whose steps have ``SIZES``, in microbatches of 4 rows, and the
    weights after it."""
    shape = MeshShape.parse(mesh)
    if not mesh:
        return _steps(Layout(), config, shape, change)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(config.zero))
        return _steps(layout, config, shape, change)


def _steps(layout: Layout, config: RunConfig, shape: MeshShape, change) -> list[float]:
    counts, m = [size // 4 for size in SIZES], config.model
    pipe = change(pipeline(config, shape, counts[0], 16, layout, counts))
    step = build_step(config, RunPlan.eager(config, shape, (counts[0], 4), F64, F64), pipe)
    params = init(pipe.spec, m.dims(), 0, layout, F64)
    opt, found = init_state(step.optimizer, pipe.spec, params), []
    for number, size in enumerate(SIZES):
        with paused():
            rows = random_rows(replace(config, batch=size), number)
        batches = [make_batch(r, layout) for r in rows.split(4)]
        loss, norm, _, params, opt = step(params, opt, batches, valid_tokens(rows), 1e-2)
        found += [loss.item(), norm.item()]
    sums = [full(w).double().sum().item() for w in flat(params)]
    return [*found, sum(sums)]


def agree(mesh: str, schedule: str, zero: int, **how) -> None:
    config = replace(CONFIG, zero=zero, pipeline=PipelineConfig(schedule))
    assert steps(mesh, config, **how) == pytest.approx(one_device(), rel=1e-9)


@cache
def one_device() -> list[float]:
    return steps("", CONFIG)


@settings(max_examples=examples(1, thorough=30))
@example(mesh="dp=2", schedule="1f1b", zero=3)
@example(mesh="dp=2,pp=2", schedule="zb-v", zero=1)
@given(
    mesh=st.sampled_from(["pp=2", "dp=2,pp=2"]),
    schedule=st.sampled_from([name for name in SCHEDULES if name != "dualpipe-v"]),
    zero=zero_stages(),
)
def test_steps_of_several_sizes_on_any_mesh(mesh, schedule, zero):
    """Each size has its own number of microbatches, and so its own table of the schedule.
    (DualPipe-V needs more microbatches than the first size has here.)"""
    agree(mesh, schedule, zero)


def test_the_table_of_another_size_is_seen():
    """The mutant: every step runs by the table of the first step."""

    @dataclass(frozen=True)
    class Mutant(Pipeline):
        def for_count(self, microbatches):
            return self

    def mutant(pipe: Pipeline) -> Pipeline:
        return Mutant(**{f.name: getattr(pipe, f.name) for f in fields(pipe)})

    assert_caught(lambda: agree("pp=2", "1f1b", 1, change=mutant))
