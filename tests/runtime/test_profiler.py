"""The profiler of a run records one step and no other."""

from __future__ import annotations

import json

import pytest
import torch

from dtron.runtime.profiler import Recorder
from dtron.runtime.trace import read


@pytest.mark.parametrize("target", [1, 3])
def test_one_step_is_recorded_and_no_other(tmp_path, target):
    """Step n has n matmuls, so the trace shows which step was recorded."""
    seen = []
    recorder = Recorder(tmp_path / "trace.json", target, "cpu", seen.append)
    recorded = []
    for step in range(1, 5):
        recorder.begin()
        for _ in range(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
        recorded.append(recorder.end())
        torch.ones(8).exp()
    assert recorded == [step == target for step in range(1, 5)]
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in trace]
    assert names.count("aten::mm") == target and "aten::exp" not in names
    assert seen == [read(tmp_path / "trace.json")]
    assert "matmul" in {s.category for s in seen[0]}


def test_nothing_is_recorded_unless_asked(tmp_path):
    recorder = Recorder(tmp_path / "trace.json", 0, "cpu", pytest.fail)
    for _ in range(3):
        recorder.begin()
        assert not recorder.end()
    assert not any(tmp_path.iterdir())


def test_each_process_writes_its_own_and_the_first_speaks(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "03":
        monkeypatch.setenv("RANK", rank)
        recorder = Recorder(tmp_path / "trace.json", 1, "cpu", seen.append)
        recorder.begin()
        torch.ones(8).exp()
        recorder.end()
    assert {p.name for p in tmp_path.iterdir()} == {"trace-rank0.json", "trace-rank3.json"}
    assert len(seen) == 1
