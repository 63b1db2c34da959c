"""The command that reads a trace: its table, and what it refuses."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from dtron.runtime.exit import run_cli
from dtron.tools import profile
from tests.runtime.test_trace import device_trace


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_reads_a_trace(tmp_path, capsys, packed):
    data = json.dumps(
        {"traceEvents": [*device_trace(), {"ph": "M", "name": "process_name"}]}
    ).encode()
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert run_cli(profile.main, [str(path), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"matmul +│ +0\.04 │ +66\.7%", out) and re.search(
        r"exposed +│ +0\.0[12] │ +25\.0%", out
    )
    assert out.splitlines()[-1].split() == ["0.04", "ms", "1", "x", "matmul", "nvjet_sm90_tst"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read (No such file"),
        (b"not json", "not a Chrome trace"),
        (b"[1, 2]", "not a Chrome trace"),
        (b'{"loss": 1}', "not a Chrome trace"),
        (b'{"traceEvents": [3]}', "not a Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "x"}]}', "not a Chrome trace"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-4], "not a Chrome trace"),
        (b'{"traceEvents": []}', "no kernel and no operator"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, capsys, content, part):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    assert run_cli(profile.main, [str(path)]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and not out
    assert str(path) in err and part in err and ("--profile" in err or content is None)
