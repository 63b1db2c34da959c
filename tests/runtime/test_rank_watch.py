"""Slow ranks are named with their cause, on simulated numbers and on real ranks; the health of GPUs
is read from a stand-in of NVML."""

from __future__ import annotations

import math
import random
import re
import threading
from itertools import count
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dtron.runtime import stragglers
from dtron.runtime.gpu_health import (
    COLUMNS,
    HealthSampler,
    health_faults,
    health_metrics,
    open_nvml,
    read_health,
)
from dtron.runtime.probes import stride_of
from dtron.runtime.rank_watch import COLUMNS as ALL
from dtron.runtime.rank_watch import Judge, RankWatch
from dtron.runtime.stragglers import CAUSES, Slow, slow_ranks
from dtron.testing import assert_caught
from tests.helpers.train_cli import refused

STEP = 1.0
TYPICAL = {"data": 0.001, "host": 0.02, "pauses": 0.002, "compute": 1e-4, "communication": 5e-5}


def numbers(ranks: int, seed: int) -> dict[str, list[float]]:
    """Healthy ranks: their numbers differ by some percent."""
    rng = random.Random(seed)
    return {c: [x * rng.uniform(0.97, 1.03) for _ in range(ranks)] for c, x in TYPICAL.items()}


def planted(found: dict[str, list[float]], rank: int, cause: str, stride: int) -> None:
    """Make a rank slow. Its messages go to one neighbour, and come from the other."""
    if cause != "communication":
        found[cause][rank] += 0.2 if cause in ("data", "host", "pauses") else 0.3 * TYPICAL[cause]
        return
    n = len(found[cause])
    for r in (rank - stride, rank, rank + stride):
        found[cause][r % n] *= 3


def names_the_slow_rank(ranks, stride, rank, cause, seed, find=slow_ranks):
    found, step = numbers(ranks, seed), [STEP] * ranks
    assert find(step, found, stride) == []
    planted(found, rank, cause, stride)
    assert [(s.rank, s.cause) for s in find(step, found, stride)] == [(rank, cause)]


@given(
    ranks=st.integers(5, 64),
    place=st.floats(0, 0.999),
    cause=st.sampled_from(CAUSES),
    seed=st.integers(0, 9),
)
def test_the_slow_rank_is_named_with_its_cause_and_no_other(ranks, place, cause, seed):
    names_the_slow_rank(ranks, 1, int(place * ranks), cause, seed)
    names_the_slow_rank(8 * ranks, 8, int(place * 8 * ranks), cause, seed)  # hosts of 8 GPUs


def test_the_fast_rank_of_two_is_the_measure():
    for cause in ("data", "host", "pauses", "compute"):
        names_the_slow_rank(2, 1, 1, cause, 0)


def test_mutants_are_caught():
    def alone(step, found, stride):  # without the neighbours
        return slow_ranks(step, found, 0)

    assert_caught(lambda: names_the_slow_rank(8, 1, 3, "communication", 0, alone))

    def by_step(step, found, stride):  # the time of a step, which all ranks share
        return slow_ranks(step, dict.fromkeys(CAUSES, step), stride)

    assert_caught(lambda: names_the_slow_rank(8, 1, 3, "data", 0, by_step))


def test_what_is_not_measured_names_nobody():
    found = numbers(4, 0)
    found["communication"][1] = math.nan
    found["data"][0] = math.nan
    assert slow_ranks([STEP] * 4, found) == []
    assert slow_ranks([STEP], {c: [x] for c, x in TYPICAL.items()}) == []


def test_messages_between_hosts_use_the_stride():
    assert (stride_of(16, 8), stride_of(8, 8), stride_of(9, 8), stride_of(4, 0)) == (8, 1, 1, 1)


def test_texts_have_a_unit():
    texts = [stragglers.describe(Slow(1, c, 2 * x, x)) for c, x in TYPICAL.items()]
    assert texts[0] == "its host waits 2 ms a step for data, the median rank 1 ms"
    assert "stands still 4 ms a step, the median rank 2 ms" in texts[2]
    assert "200 us" in texts[3] and "100 us" in texts[4]


# ---- looks


def row(step: float = STEP, health: dict[str, float] | None = None, **causes: float) -> list[float]:
    own = {"step": step, **TYPICAL, "energy": math.nan} | dict.fromkeys(COLUMNS, math.nan)
    own |= causes | (health or {})
    return [own[name] for name in ALL]


def test_a_rank_is_reported_when_it_is_slow_in_two_looks_and_once():
    judge = Judge(["rank 0 (a)", "rank 1 (b)", "rank 2 (c)"])
    slow, whole = [row(), row(data=0.3), row()], [row()] * 3
    said = [judge.note(i, 0, table).warnings for i, table in enumerate([slow, whole, slow, slow])]
    assert [len(x) for x in said] == [0, 0, 0, 1]
    assert said[3] == [
        "warning: step 3: rank 1 (b) is slow in data: its host waits 300 ms a step for data, the "
        "median rank 1 ms"
    ]
    again = [judge.note(i, 0, table) for i, table in enumerate([slow, whole, slow, slow])]
    assert [len(x.warnings) for x in again] == [0, 0, 0, 1]
    assert again[0].metrics["ranks.data_seconds.max"] == 0.3
    assert again[0].metrics["ranks.data_seconds.median"] == 0.001
    assert Judge(["rank 0 (a)"]).note(1, 0, [row()]).metrics == {}


def watched(slow: int) -> list[tuple[list[str], list[str]]]:
    """A job for the pool: one rank waits for its data. No clock runs: each step takes a second."""
    ticks = count()
    with RankWatch(2, "cpu", dist.group.WORLD, clock=lambda: float(next(ticks))) as watch:
        looks = []
        for step in range(1, 9):
            watch.begin()
            data = 0.5 if dist.get_rank() == slow else 0.01
            looks.append(watch.end(step, 64, data, launch=0.4 - data, wait=0.0))
    found = [look for look in looks if look is not None]
    text = [line for look in found for line in look.warnings if "slow in data" in line]
    return len(found), text, [look.metrics["ranks.data_seconds.max"] for look in found[:1]]


@pytest.mark.xdist_group("pool")
def test_real_ranks_name_the_rank_that_waits_for_its_data(pool):
    answers = pool.run(watched, 2)
    assert answers[1:] == [(0, [], [])] * 3  # rank 0 reports
    looks, (line,), largest = answers[0]
    assert looks == 3 and largest == [0.5]
    assert re.fullmatch(
        r"warning: step 4: rank 2 \(\S+\) is slow in data: its host waits 500 ms a step for data, "
        r"the median rank 10 ms",
        line,
    )


def test_one_process_on_a_cpu_is_not_watched():
    watch = RankWatch(0, "cpu")
    watch.begin()
    assert watch.end(100, 1, 0.0, 0.0, 0.0) is None


def test_hidden_waits_cost_nothing():
    """While the host waits for the device, the device works."""
    ticks = count()
    watch = RankWatch(1, "cpu", clock=lambda: float(next(ticks)))
    for _ in range(2):
        watch.begin()
        look = watch.end(1, 64, data=0.2, launch=0.0, wait=0.7)
    assert look is not None and watch._message.table[0, 1:3].tolist() == [0.0, 0.0]
    watch.begin()
    watch.end(1, 64, data=0.5, launch=0.1, wait=0.2)
    assert watch._message.table[0, 1:3].tolist() == pytest.approx([0.3, 0.2])


# ---- the health of GPUs


class NVMLError(Exception):
    pass


def unsupported(*_):
    raise NVMLError("Not Supported")


def nvml(**changes) -> SimpleNamespace:
    """A stand-in for pynvml: an H200 under load."""
    own = {
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_VOLATILE_ECC": 0,
        "NVML_MEMORY_ERROR_TYPE_CORRECTED": 0,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVMLError": NVMLError,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 650_000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 9_000_000,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
        "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: 3 * (1 - kind),
    }
    return SimpleNamespace(**own | changes)


def health(**changes) -> dict[str, float]:
    return dict(zip(COLUMNS, read_health(nvml(), "handle"), strict=True)) | changes


def test_the_numbers_of_a_gpu_have_their_units():
    assert health() == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "power_watts": 650,
        "temperature_c": 61,
        "energy_joules": 9000,
        "throttles": 4,
        "ecc_corrected": 3,
        "ecc_uncorrected": 0,
    }
    some = read_health(nvml(nvmlDeviceGetTotalEccErrors=unsupported), "handle")
    assert some[:6] == [1980, 3201, 650, 61, 9000, 4] and all(map(math.isnan, some[6:]))


def test_metrics_join_the_gpus_of_all_ranks():
    hot = health(sm_clock_mhz=1200, temperature_c=88, throttles=0x44)
    samples = [list(health().values()), list(hot.values())]
    assert health_metrics(samples, [600.0, 400.0], 2000) == {
        "gpu.sm_clock_mhz": 1200,
        "gpu.memory_clock_mhz": 3201,
        "gpu.power_watts": 1300,
        "gpu.temperature_c": 88,
        "gpu.ecc_corrected": 6,
        "gpu.ecc_uncorrected": 0,
        "gpu.throttled.power_cap": 2,
        "gpu.throttled.thermal": 1,
        "gpu.throttled.power_brake": 0,
        "gpu.throttled.slowdown": 0,
        "joules_per_token": 0.5,
    }
    assert health_metrics([[math.nan] * len(COLUMNS)], [math.nan], 2000) == {}


def test_faults_of_a_gpu_are_named():
    now = health(throttles=0x20, sm_clock_mhz=1200, temperature_c=88, ecc_uncorrected=2)
    found = health_faults(list(health().values()), list(now.values()))
    assert found["thermal"] == "its GPU lowers its clocks (thermal): 1200 MHz, 88 C, 650 W"
    assert found["memory"].startswith("its GPU has 2 new uncorrected memory errors")
    assert health_faults(list(health().values()), list(health().values())) == {}
    judge = Judge(["rank 0 (a, cuda:0)"])
    said = [judge.note(i, 0, [row(health=h)]).warnings for i, h in enumerate((health(), now, now))]
    assert [len(x) for x in said] == [0, 1, 1]  # memory at once, clocks in the second look
    assert "uncorrected" in said[1][0] and "thermal" in said[2][0]


def test_a_thread_reads_the_gpu_and_nobody_waits():
    asked, read = threading.Event(), threading.Event()

    def slowly():
        asked.set()
        read.wait(30)
        return [1.0] * len(COLUMNS)

    sampler = HealthSampler(slowly)
    sampler.ask()
    assert asked.wait(30) and all(map(math.isnan, sampler.newest))  # a call of NVML hangs
    read.set()
    thread = next(t for t in threading.enumerate() if t.name == "GPU health")
    sampler.close()
    thread.join(30)
    assert sampler.newest == [1.0] * len(COLUMNS) and not thread.is_alive()


def test_a_gpu_is_opened_by_its_uuid_or_a_note_says_why_not():
    handles = {"GPU-1": "handle"}

    def handle_of(uuid):
        return handles.get(uuid) or unsupported()

    module = nvml(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle_of)
    module.nvmlDeviceGetPowerUsage = {"handle": 1000}.__getitem__
    read, note = open_nvml("cuda:3", lambda name: module, lambda device: "GPU-1")
    assert read()[2] == 1 and note == ""
    read, note = open_nvml("cuda:3", lambda name: module, lambda device: "GPU-2")
    assert read is None and "Not Supported" in note

    def missing(name):
        raise ModuleNotFoundError(name)

    assert "pip install 'dtron[gpu-health]'" in open_nvml("cuda:3", missing)[1]
    assert open_nvml("cpu", missing) == (None, "")


def test_the_flag_is_checked(run_dir, capsys):
    assert "--watch-every" in refused(capsys, f"--run-dir={run_dir}", "--watch-every=-1")
