"""Rates between measured ones, and the clock of a mix of work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtron.planner.gpu_rates import load_gpu, work_of
from dtron.planner.operators import Operator
from dtron.planner.rate_table import along, on_grid, rate

H200 = load_gpu("h200")
SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384]
LARGE = st.integers(256, 1 << 15)
ROWS = [[1024, 10.0, 1.0], [4096, 30.0, 5.0]]
SECONDS = st.fixed_dictionaries(
    {k: st.floats(0, 10) for k in ("matmul 16", "matmul 8", "attention", "elementwise")}
)


def test_a_rate_between_two_sizes_is_between_their_rates():
    assert along(ROWS, 2048) == [20.0, 3.0]  # halfway, in logarithms
    assert along(ROWS, 1) == [10.0, 1.0]
    assert along(ROWS, 1 << 20) == [30.0, 5.0]


@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from(SIZES))
def test_a_measured_size_has_its_rate(m, n, k):
    grid = H200.matmul["16"]
    i, j, h = map(SIZES.index, (m, n, k))
    assert on_grid(grid, "tn", (m, n, k)) == pytest.approx(grid["tn"][i][j][h])


@given(LARGE, LARGE, LARGE)
def test_rates_stay_within_the_table(m, n, k):
    rates = [x for plane in H200.matmul["8"]["nt"] for row in plane for x in row]
    found = rate(H200.matmul["8"], "nn", (m, n, k))  # a layout that FP8 does not have
    assert min(rates) <= found * 1.0001 and found <= max(rates) * 1.0001


def test_few_rows_take_the_time_of_a_tile():
    def seconds(m: int) -> float:
        return m / rate(H200.matmul["16"], "nn", (m, 4096, 4096))

    assert seconds(16) == pytest.approx(seconds(256))


def test_tables_of_any_kind():
    assert rate(5, "nn", (1, 1, 1)) == 5.0
    assert rate([[64, 64, 64, 1.0], [512, 512, 512, 2.0]], "nn", (300, 300, 300)) == 2.0


@given(SECONDS, st.floats(0, 10))
def test_the_clock_takes_the_power_limit_and_not_more(busy, waiting):
    ghz = H200.clock(busy, waiting)
    watts = H200.power(busy, waiting, ghz)
    assert watts <= H200.watts["limit"] * 1.0001
    assert ghz == H200.max_ghz or watts == pytest.approx(H200.watts["limit"], rel=1e-4)


def test_work_that_takes_more_power_has_a_lower_clock():
    clocks = [H200.clock({k: 1.0}, 0.0) for k in ("matmul 8", "matmul 16", "attention")]
    assert clocks == sorted(clocks) and clocks[0] < clocks[-1] < H200.max_ghz
    assert H200.clock({"elementwise": 1.0}, 0.0) == H200.max_ghz


def test_matmuls_follow_the_clock_and_memory_does_not():
    matmul = Operator("matmul", "mm", 2.0 * 4096**3, 1, 1, (1, 4096, 4096, 4096), layout="nn")
    copy = Operator("elementwise", "copy_", read=1 << 28, written=1 << 28)
    fast, slow = ([H200.seconds(op, ghz) for op in (matmul, copy)] for ghz in (1.8, 1.2))
    assert slow[0] == pytest.approx(1.5 * fast[0]) and slow[1] == fast[1]
    assert [work_of(op) for op in (matmul, copy)] == ["matmul 16", "elementwise"]
    assert work_of(replace(matmul, bits=8)) == "matmul 8"


def test_access_has_rates_of_its_own():
    copy = Operator("elementwise", "x", read=1 << 27, written=1 << 27)
    turned = replace(copy, access="transposed")
    assert H200.seconds(turned) > 1.2 * H200.seconds(copy)
    assert H200.seconds(replace(copy, access="unknown")) == H200.seconds(copy)


def test_a_file_is_based_on_another_one():
    h100 = load_gpu("h100")
    assert h100.matmul == H200.matmul and h100.memory_gbs < H200.memory_gbs
    copy = Operator("elementwise", "copy_", read=1 << 28, written=1 << 28)
    assert h100.seconds(copy) > 1.3 * H200.seconds(copy)


def test_a_file_without_watts_has_one_clock():
    b200 = load_gpu("b200")
    assert b200.clock({"matmul 16": 1.0}, 0.0) == b200.ghz
    assert b200.power({"matmul 16": 1.0}, 0.0, 1.0) == 0.0
