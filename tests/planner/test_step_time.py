"""The clock of a plan, on operators that are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.planner.gpu_rates import Gpu, load_gpu
from dtron.planner.operators import Operator
from dtron.planner.plan_step import RankPlan
from dtron.planner.step_time import bytes_sent, link_of, time_step

# One TFLOP/s, one GB/s: a GFLOP takes a millisecond, a megabyte too.
GPU: Gpu = replace(
    load_gpu("h200"),
    matmul={"16": 1.0},
    memory_gbs=1.0,
    memory={},
    watts={},
    gap_us=0.0,
    nvlink={"gbs": 1.0, "us": 0.0},
    copy_engines={"gbs": 1.0, "us": 0.0},
    network={"gbs": 0.5, "us": 0.0},
    beside_nccl=1.0,
    host_gbs=1.0,
)
MATMUL = Operator("matmul", "mm", flops=1e9, size=(1, 1, 1, 1))
GATHER = Operator("collective", "all_gather", written=2_000_000, group="g", token=1)
WAIT = Operator("wait", "wait", token=1)


def rank(*ops: Operator, number: int = 0) -> RankPlan:
    return RankPlan(number, (number,), {}, {}, 0, 0, ops, {"g": "dp"})


def milliseconds(*ops: Operator, mesh: str = "dp=2", gpu: Gpu = GPU, copies: bool = False):
    (time,) = time_step([rank(*ops)], MeshShape.parse(mesh), gpu, copies)
    return round(1e3 * time.now, 6), time


def test_a_kernel_takes_the_longer_of_computing_and_memory():
    assert milliseconds(MATMUL)[0] == 1
    assert milliseconds(replace(MATMUL, read=3_000_000))[0] == 3
    assert milliseconds(Operator("elementwise", "add", read=1_000_000, written=500_000))[0] == 1.5


@pytest.mark.parametrize(
    ("ops", "total", "exposed", "hidden"),
    [
        ((GATHER, WAIT, MATMUL), 2, 1, 0),
        ((GATHER, MATMUL, WAIT), 1, 0, 1),
        ((GATHER, WAIT, WAIT, MATMUL), 2, 1, 0),
        ((MATMUL, GATHER, replace(GATHER, token=2), replace(WAIT, token=2)), 3, 2, 0),
    ],
)
def test_a_collective_is_hidden_until_it_is_waited_for(ops, total, exposed, hidden):
    took, time = milliseconds(*ops)
    assert took == total
    assert round(1e3 * time.exposed["dp"], 6) == exposed
    assert round(1e3 * time.hidden["dp"], 6) == hidden


def test_kernels_beside_nccl_are_slower_and_copies_take_memory():
    slow = replace(GPU, beside_nccl=1.5)
    assert milliseconds(GATHER, MATMUL, WAIT, gpu=slow)[0] == 1.5
    # Copies take 2 MB of memory's time, before the matmul.
    assert milliseconds(GATHER, MATMUL, WAIT, gpu=slow, copies=True)[0] == 3


def test_bytes_of_a_ring():
    assert bytes_sent(GATHER, 4) == 1_500_000
    assert bytes_sent(replace(GATHER, name="all_reduce"), 4) == 3_000_000


@pytest.mark.parametrize(
    ("mesh", "axis", "link"),
    [
        ("tp=8", "tp", "nvlink"),
        ("dp=2,tp=8", "tp", "nvlink"),
        ("dp=2,tp=8", "dp", "network"),
        ("dp=2,tp=4", "dp", "nvlink"),
        ("dp=4,tp=4", "dp", "network"),
        ("pp=2,dp=8", "pp", "network"),
        ("dp=4,tp=2,ep=8", "ep", "nvlink"),
        ("dp=8,tp=2,ep=16", "ep", "network"),
    ],
)
def test_an_axis_within_a_host_has_nvlink(mesh, axis, link):
    assert link_of(MeshShape.parse(mesh), axis, GPU) == link


def message(way: str, name: str) -> Operator:
    return Operator("message", f"{way} {name}", written=1_000_000)


def test_a_rank_waits_for_the_stage_before():
    first = rank(MATMUL, message("send", "F0.0"), MATMUL, message("receive", "B1.0"), MATMUL)
    second = rank(message("receive", "F0.0"), MATMUL, message("send", "B1.0"), number=1)
    a, b = time_step([first, second], MeshShape.parse("pp=2"), GPU)
    assert round(1e3 * b.bubble, 6) == 2 and round(1e3 * b.now, 6) == 3
    assert round(1e3 * a.bubble, 6) == 2 and round(1e3 * a.now, 6) == 5


def test_a_message_that_is_never_sent_is_an_error():
    with pytest.raises(AssertionError, match="never sent"):
        time_step([rank(message("receive", "F0.0"))], MeshShape.parse("pp=2"), GPU)


def test_copies_to_the_host_run_beside():
    assert milliseconds(Operator("host", "copy_", written=3_000_000), MATMUL)[0] == 3
