"""The benchmark of generation: both systems do the same work."""

from __future__ import annotations

import importlib.util
import json

from tests.helpers.paths import ROOT

SPEC = importlib.util.spec_from_file_location("bench_generate", ROOT / "bench" / "generate.py")
bench = importlib.util.module_from_spec(SPEC)


def test_both_systems_generate_the_same_tokens(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, SPEC.name, bench)  # for its dataclass
    SPEC.loader.exec_module(bench)
    argv = ["--model", "tiny", "--batch", "1", "3", "--prompt", "5", "--tokens", "4"]
    assert bench.main([*argv, "--repeat", "1", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["batch"], line["system"].split(",")[0]) for line in lines] == [
        (batch, system) for batch in (1, 3) for system in ("dtron", "transformers")
    ]
    assert all(line["same_tokens"] == 1 for line in lines)
    assert all(line["decode_tokens_per_s"] > 0 and line["first_s"] > 0 for line in lines)
