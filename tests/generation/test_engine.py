"""Continuous batching changes no text: whatever arrives when, in pages of any size, on any mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.generation import cached_model, forward_inputs
from dtron.generation.engine import Engine
from dtron.generation.pages import FreePages
from dtron.generation.sampling import Sampling
from dtron.generation.scheduler import CacheSize, Scheduler
from dtron.mesh import Layout, stage_mesh
from dtron.rules import rules_for
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.runtime.generation import cache_for, generate
from dtron.testing import assert_caught, meshes
from dtron.training.pipeline import Pipeline, one_stage, pipeline
from dtron.tree import flat, tree_map
from tests.generation.models import F64, MODELS, assert_cached, greedy_text, on_mesh, texts, weights
from tests.helpers.examples import examples
from tests.helpers.real_mesh import real_mesh
from tests.helpers.texts import one_line
from tests.helpers.values import ONE


@dataclass(frozen=True)
class Arrival:
    """A request: the step before which it arrives, its prompt's length, its new tokens, and the
    step before which it is cancelled (None: never)."""

    step: int
    prompt: int
    tokens: int
    cancelled: int | None = None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 8),
        st.integers(1, 13),
        st.integers(1, 9),
        st.none() | st.integers(1, 12),
    ),
    min_size=1,
    max_size=6,
)
PROMPTS = texts(*range(1, 14))


@cache
def longest_text(name: str, prompt: int) -> list[int]:
    return greedy_text(MODELS[name], PROMPTS[prompt - 1], 9)


def run(engine: Engine, arrivals: list[Arrival]) -> list[list[int]]:
    """The new tokens of each request, which arrive and are cancelled between steps."""
    new: list[list[int]] = [[] for _ in arrivals]
    numbers: dict[int, int] = {}
    step = 0
    while engine.busy or len(numbers) < len(arrivals):
        for i, a in enumerate(arrivals):
            if a.step == step:
                sampling = Sampling(0.0)
                numbers[engine.add(PROMPTS[a.prompt - 1], a.tokens, sampling)] = i
            if a.cancelled is not None and a.step + a.cancelled == step:
                engine.cancel(next(n for n, j in numbers.items() if j == i))
        for event in engine.step():
            assert event.number in numbers
            new[numbers[event.number]].append(event.token)
        step += 1
        assert step < 500, "no progress"
    return new


def assert_same_texts(
    name: str, arrivals: list[Arrival], size: CacheSize, m: ModelConfig | None = None
) -> None:
    m = MODELS[name] if m is None else m
    engine = Engine(weights(m), m, one_stage(m, 1, ONE), size)
    got = run(engine, arrivals)
    for a, new in zip(arrivals, got, strict=True):
        want = longest_text(name, a.prompt)[a.prompt :][: a.tokens]
        assert new == (want if a.cancelled is None else want[: len(new)])
    free = engine._scheduler.free.pools[0]
    assert sorted(free) == list(range(1, size.pages))  # all pages came back, each once


@st.composite
def sizes(draw) -> CacheSize:
    """A cache in which the longest text has room."""
    page = draw(st.sampled_from([1, 2, 4, 16]))
    least = -(-21 // page)
    return CacheSize(
        rows=draw(st.integers(1, 4)),
        pages=1 + draw(st.integers(least, 2 * least)),
        page=page,
        chunk=draw(st.sampled_from([1, 3, 4, 64])),
        prefill_rows=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=examples(6, thorough=150))
@given(arrivals=ARRIVALS, size=sizes())
def test_batching_changes_no_text(name, arrivals, size):
    assert_same_texts(name, arrivals, size)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=examples(4, thorough=100))
@given(st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=3), min_size=1, max_size=3))
def test_the_cache_changes_no_logits(name, pieces):
    assert_cached(MODELS[name], pieces)


CROWD = [Arrival(i, 13 - 3 * i, 9) for i in range(3)]
CROWDED = CacheSize(rows=3, pages=9, page=4, chunk=4, prefill_rows=2)


def test_requests_are_preempted():
    """The crowd of the mutants below does not have room, so requests wait and are preempted."""
    preempted = []

    class Watched(Scheduler):
        def _preempt(self, pool: int) -> None:
            preempted.append(pool)
            super()._preempt(pool)

    m = MODELS["grouped"]
    engine = Engine(weights(m), m, one_stage(m, 1, ONE), CROWDED)
    engine._scheduler = Watched(CROWDED, 1)
    run(engine, CROWD)
    assert preempted


def shared_page(self: FreePages, pool: int, count: int):
    """A page stays free although a row has it."""
    free = self.pools[pool]
    return self._with(pool, free[: len(free) - count + 1]), free[len(free) - count :][::-1]


def stale_table(scheduler, pieces, width=None):
    """Decode has the table of the tokens that are in the cache, without the new token's page."""
    for piece in pieces:
        r, page = piece.request, scheduler.size.page
        r.pages = r.pages if r.cached % page else (*r.pages[: r.cached // page], 0)
    return forward_inputs.decode_inputs(scheduler, pieces, width)


def off_by_one(scheduler, pieces, width=None):
    made = forward_inputs.decode_inputs(scheduler, pieces, width)
    return replace(made, positions_BS=made.positions_BS + 1)


def freed_page(scheduler, pieces, width=None):
    """The first page of a row is given to others while the row still reads it."""
    for piece in pieces:
        r = piece.request
        if len(r.pages) > 1 and r.pages[0] not in scheduler.free.pools[0]:
            scheduler.free = scheduler.free.give(0, r.pages[:1])
    return forward_inputs.decode_inputs(scheduler, pieces, width)


MUTANTS = [
    (FreePages, "take", shared_page, "grouped"),
    ("dtron.generation.engine", "decode_inputs", stale_table, "grouped"),
    ("dtron.generation.engine", "decode_inputs", off_by_one, "grouped"),
    ("dtron.generation.engine", "decode_inputs", freed_page, "latent"),
]


@pytest.mark.parametrize(("where", "what", "mutant", "name"), MUTANTS)
def test_wrong_pages_are_caught(where, what, mutant, name, monkeypatch):
    longest_text(name, 13), longest_text(name, 10), longest_text(name, 7)
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{what}", mutant)
    else:
        monkeypatch.setattr(where, what, mutant)
    assert_caught(lambda: assert_same_texts(name, CROWD, CROWDED))


@pytest.mark.parametrize("name", ["delta", "mamba"])
def test_a_state_that_is_not_emptied_is_caught(name, monkeypatch):
    """A row's new request must not see the state of the last one."""

    def stale(*args):
        inputs, rows = forward_inputs.prefill_inputs(*args)
        return replace(inputs, fresh_B=torch.zeros_like(inputs.fresh_B)), rows

    monkeypatch.setattr("dtron.generation.engine.prefill_inputs", stale)
    assert_caught(lambda: assert_same_texts(name, CROWD, replace(CROWDED, rows=1)))


def test_padding_that_changes_a_state_is_caught(monkeypatch):
    """A row that is still read keeps its state while the others decode."""

    def moved(scheduler, pieces, width=None):
        made = forward_inputs.decode_inputs(scheduler, pieces, width)
        return replace(made, last_B=made.last_B.clamp(min=0))

    monkeypatch.setattr("dtron.generation.engine.decode_inputs", moved)
    assert_caught(lambda: assert_same_texts("mamba", CROWD, replace(CROWDED, pages=30)))


WIDE = {
    name: replace(
        MODELS[name],
        layers=2 if name == "mamba" else 1,
        heads=12,
        kv_heads=12,
        mlp=48,
        moe=replace(MODELS[name].moe, mlp=24),
        mamba=replace(MODELS["mamba"].mamba, heads=12, groups=1),
    )
    for name in ("grouped", "latent", "experts", "mamba")
}
STREAM = [Arrival(0, 9, 5), Arrival(0, 2, 9), Arrival(1, 13, 4), Arrival(3, 5, 8), Arrival(3, 1, 6)]
SMALL = CacheSize(rows=2, pages=14, page=2, chunk=4)


def streamed(m: ModelConfig, params, pipe: Pipeline, size: CacheSize = SMALL, device="cpu"):
    return run(Engine(params, m, pipe, size, device), STREAM)


@cache
def on_one_device(name: str, wide: bool) -> list[list[int]]:
    m = WIDE[name] if wide else MODELS[name]
    return streamed(m, weights(m), one_stage(m, 1, ONE), CacheSize(rows=8, pages=64))


def same_on(mesh: str, name: str) -> None:
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        got = on_mesh(WIDE[name], mesh, Layout(device_mesh, rules_for(1)), run=streamed)
    assert got == on_one_device(name, wide=True)


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ("tp=3", "grouped"),
        ("dp=2,tp=2", "latent"),
        ("tp=2,ep=2", "experts"),
        ("cp=2", "latent"),
        ("dp=2,tp=2", "mamba"),
    ],
)
def test_the_mesh_changes_nothing(mesh, name):
    same_on(mesh, name)


@pytest.mark.slow
@settings(max_examples=12)
@given(meshes(6, ("dp", "cp", "tp")), st.sampled_from(sorted(WIDE)))
def test_no_mesh_changes_anything(mesh, name):
    same_on(mesh, name)


def on_pool(mesh: str) -> list[list[int]]:
    """A job for the pool: text on real ranks."""
    device_mesh = real_mesh(mesh)
    layout = Layout(stage_mesh(device_mesh), rules_for(1))
    return on_mesh(MODELS["grouped"], mesh, layout, device_mesh, streamed)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "pp=2,tp=2"])
def test_real_ranks(pool, mesh):
    assert pool.run(on_pool, mesh) == [on_one_device("grouped", wide=False)] * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("cuda_graph", "compile"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_changes_nothing(name, cuda_graph, compile):
    """Recorded forwards too, whose kinds are replayed at other lengths and in other rows."""
    if cuda_graph and not compile and name == "experts":
        pytest.skip("experts are recorded only where they are compiled")
    m = MODELS[name]
    there = tree_map(lambda w: w.cuda(), weights(m))
    engine = Engine(there, m, one_stage(m, 1, ONE), SMALL, "cuda", cuda_graph, compile)
    assert run(engine, STREAM) == on_one_device(name, wide=False)


def test_a_row_ends_where_its_text_does():
    """A row ends at its end token. The other rows go on unchanged."""
    m, prompts = MODELS["grouped"], texts(5, 2, 7)
    pipe, params = one_stage(m, 1, ONE), weights(m)
    free = generate(params, prompts, 12, m, pipe, Sampling(0.0))
    end = free[0][5 + 3]  # the fourth token of the first row
    stopped = generate(params, prompts, 12, m, pipe, Sampling(0.0), ends={end})
    for prompt, full, cut in zip(prompts, free, stopped, strict=True):
        new = full[len(prompt) :]
        n = new.index(end) + 1 if end in new else len(new)
        assert cut == full[: len(prompt) + n]
    assert len(stopped[0]) < len(free[0])


def test_a_text_does_not_depend_on_its_companions():
    """Drawn texts too: each has its own random numbers."""
    m, params = MODELS["grouped"], weights(MODELS["grouped"])
    alone, prompt = one_stage(m, 1, ONE), PROMPTS[4]
    want = generate(params, [prompt], 9, m, alone, Sampling(1.0, seed=7))[0]
    many = generate(params, [PROMPTS[8], prompt, prompt], 9, m, alone, Sampling(1.0, seed=6))
    assert many[1] == want and many[2] != want


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_line(bad):
    m = MODELS["grouped"]
    pipe, params = one_stage(m, 1, ONE), weights(m)
    flat(params)[0][3] = bad
    call = lambda: generate(params, texts(5, 2, 7), 12, m, pipe, Sampling(0.0))
    one_line(call, "logits are not finite", "earlier checkpoint")


@pytest.mark.parametrize(("prompt", "tokens"), [(3, 2), (7, 9), (4, 1)])
def test_texts_that_have_room_run_at_once(prompt, tokens):
    """A cache for some texts takes all of them in the first step, and preempts none."""
    m = MODELS["grouped"]
    pipe = one_stage(m, 1, ONE)
    size = replace(cache_for(4, prompt + tokens, pipe), page=4, prefill_rows=4)
    size = replace(size, pages=1 + 4 * size.pages_for(prompt + tokens))
    engine = Engine(weights(m), m, pipe, size)
    for _ in range(4):
        engine.add(PROMPTS[prompt - 1], tokens, Sampling(0.0))
    for _ in range(tokens):
        assert len(engine.step()) == 4
    assert not engine.busy


def test_what_has_no_room_is_one_line():
    m = MODELS["grouped"]
    engine = Engine(weights(m), m, one_stage(m, 1, ONE), CacheSize(rows=1, pages=3, page=4))
    one_line(lambda: engine.add([1] * 6, 4), "10 tokens", "2 pages of 4", "larger cache")
    one_line(lambda: engine.add([], 4), "no tokens")
    one_line(lambda: engine.add([1] * 60, 9), "context is 64")
    one_line(lambda: engine.add([61], 1), "61", "tokenizer")
    engine.add([1] * 5, 4)  # the last token is not run
    assert engine.busy
    one_line(lambda: CacheSize(rows=0, pages=2), "rows=0")
    one_line(lambda: CacheSize(rows=1, pages=1), "pages=1")


def test_bytes_of_a_page():
    """On the rank with the most layers: keys and values of its heads."""
    m = MODELS["grouped"]
    one = one_stage(m, 1, ONE)
    a_layer = 2 * 4 * m.kv_heads * m.head_dim * 8
    assert cached_model.page_bytes(m, one, 4, F64) == m.layers * a_layer
    split = pipeline(RunConfig(mesh="pp=2", model=m), MeshShape.parse("pp=2"), 1, 64, ONE)
    assert cached_model.page_bytes(m, split, 4, F64) == m.layers // 2 * a_layer
    assert cached_model.pages_in(5 * m.layers * a_layer + 1, m, one, 4, F64) == 5
    one_line(lambda: cached_model.pages_in(9, m, one, 4, F64), "9 bytes", "more memory")
    only_states = replace(MODELS["mamba"], pattern="S")
    assert cached_model.pages_in(9, only_states, one_stage(only_states, 1, ONE), 4, F64) == 17
