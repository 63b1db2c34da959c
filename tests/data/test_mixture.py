"""dtron.data.mixture: the source of each sample, against megatron-core where it is installed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.data.mixture import _MARK, Blend, parse_sources, samples_of
from dtron.data.sources import Chunks, Mixed
from tests.data.test_indexed import megatron  # noqa: F401  (a fixture)
from tests.helpers.texts import one_line


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 300), st.integers(0, 60)
)
@settings(max_examples=30)
def test_the_largest_deficit_comes_first(weights, start, count):
    weights = [w / sum(weights) for w in weights]
    before, chosen = Blend(weights).choose(start, count)
    counts = np.zeros(len(weights), int)
    for n in range(start + count):
        behind = [w * max(n, 1) - c for w, c in zip(weights, counts, strict=True)]
        best = int(np.argmax(behind))
        if n == start:
            assert before == counts.tolist()
        if n >= start:
            assert chosen[n - start] == best
        counts[best] += 1
        assert np.abs(counts - np.array(weights) * (n + 1)).max() < len(weights)


def test_counts_are_remembered_and_resumed():
    weights, far = [0.6, 0.3, 0.1], 2 * _MARK + 7
    one = Blend(weights)
    pieces = [one.choose(start, 10_000)[1] for start in range(0, far + 10_000, 10_000)]
    assert len(one._marks) == 3
    before, chosen = Blend(weights).choose(far, 900)
    assert np.array_equal(chosen, np.concatenate(pieces)[far : far + 900])
    assert before == np.bincount(np.concatenate(pieces)[:far]).tolist()
    assert one.choose(far, 900)[0] == before


def test_mixing_is_that_of_blended_dataset(megatron):  # noqa: F811
    from megatron.core.datasets import helpers

    for raw in ([0.7, 0.3], [1, 1, 1], [30, 70, 1, 5], [0.1] * 7, [1e-3, 1]):
        weights = megatron[2].normalize(list(raw))
        given_path = ", ".join(f"{w} source{i}" for i, w in enumerate(raw))
        assert [weight for weight, _ in parse_sources(given_path)] == weights
        source, sample = np.zeros(20_000, np.int16), np.zeros(20_000, np.int64)
        helpers.build_blending_indices(source, sample, weights, len(weights), 20_000, False)
        assert np.array_equal(Blend(weights).choose(0, 20_000)[1], source)
        before, chosen = Blend(weights).choose(12_345, 1)
        assert before[chosen[0]] == sample[12_345]


def test_samples_asked_of_each_source_are_those_of_megatrons_builder(megatron):  # noqa: F811
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        _get_size_per_split_per_dataset,
    )

    sizes = _get_size_per_split_per_dataset([0.7, 0.3], [10_001], surplus=0.005)
    assert [samples_of(w, 10_001, False) for w in (0.7, 0.3)] == [size for (size,) in sizes]
    assert samples_of(1.0, 10_001, True) == 10_001


def test_sources_and_weights(tmp_path):
    assert parse_sources(None) == [(1.0, None)]
    assert parse_sources("a b.jsonl") == [(1.0, "a b.jsonl")]
    assert parse_sources("0.7 web.jsonl, 0.3 code.parquet") == [
        (0.7, "web.jsonl"),
        (0.3, "code.parquet"),
    ]
    assert parse_sources(" 3 my text.jsonl ,1 b,0 c") == [(0.75, "my text.jsonl"), (0.25, "b")]
    (tmp_path / "1 a, 2 b.txt").touch()
    odd = str(tmp_path / "1 a, 2 b.txt")
    assert parse_sources(odd) == [(1.0, odd)]
    for bad, part in (
        ("-0.1 a, 1.1 b", "'-0.1 a'"),
        ("0.5 a, b", "'b'"),
        ("nan a, 1 b", "'nan a'"),
        ("inf a", "'inf a'"),
        ("1.x a", "'1.x a'"),
        ("1 a,", "''"),
    ):
        one_line(
            lambda bad=bad: parse_sources(bad),
            repr(bad),
            part,
            "weight of 0 or more",
            "0.7 web.jsonl",
        )
    one_line(lambda: parse_sources("0 a, 0 b"), "'0 a, 0 b'", "sum to 0", "at least one")


def test_a_mixture_takes_each_source_in_its_own_order():
    sources = [
        Chunks(np.arange(100, 201), 5, 1, None, False),
        Chunks(np.arange(300, 501), 5, 2, None, False),
    ]
    rows = Mixed(sources, [0.25, 0.75]).rows(0, 40).tokens
    low = rows[:, 0] < 300
    assert low.sum() == 10
    assert np.array_equal(rows[low], sources[0].rows(0, 10).tokens)
    assert np.array_equal(rows[~low], sources[1].rows(0, 30).tokens)
