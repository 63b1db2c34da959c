"""Runs of train.py on one device and on simulated ranks: their log, and the same losses."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron.data import get_tokenizer
from dtron.runtime.cli import load, parse
from dtron.runtime.metrics import Metrics, Throughput
from dtron.runtime.time_breakdown import breakdown
from dtron.runtime.trace import read
from tests.helpers.texts import TEXTS
from tests.helpers.train_cli import KEYS, MANY, TINY, agree, losses, run

# One worker for all tests: it plans a mesh's collectives once and tokenises the text once.
pytestmark = [pytest.mark.xdist_group("program"), pytest.mark.usefixtures("run_dir")]


# ---- one device


def test_a_run_learns_and_says_so(run_dir, capsys):
    argv = ["--steps=20", "--eval-every=8", "--log-every=5"]
    found = run(run_dir, *argv)
    assert [record["step"] for record in found] == list(range(1, 21))
    for record in found:
        assert set(record) == KEYS | (
            {"validation_loss"} if record["step"] in (8, 16, 20) else set()
        )
        assert record["tokens"] == 64 * record["step"] and record["mfu"] is None
        assert min(record[key] for key in KEYS - {"mfu", "skipped_steps"}) > 0
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert found[-1]["validation_loss"] < found[7]["validation_loss"]
    assert load(run_dir / "config.json") == parse([*TINY, f"--run-dir={run_dir}", *argv])
    out, err = capsys.readouterr()
    assert re.findall(r"^step +(\d+)/20  loss \d", out, re.M) == ["1", "5", "10", "15", "20"]
    assert re.findall(r"^step (\d+): validation loss \d", out, re.M) == ["8", "16", "20"]
    assert "\nsample: " in out and not err


@pytest.mark.parametrize("argv", [["--micro-batch=1"], ["--recompute=full"], ["--dtype=float64"]])
def test_what_only_saves_memory_or_adds_digits_does_not_change_the_losses(
    run_dir, one_device, argv
):
    agree(run(run_dir, *argv), one_device)


@pytest.mark.parametrize(
    "argv", [["--dtype=bfloat16"], ["--reduce-dtype=bfloat16", "--micro-batch=1"]]
)
def test_bfloat16_stays_close(run_dir, one_device, argv):
    got = losses(run(run_dir, *argv))
    assert got == pytest.approx(one_device, rel=1e-2) and got != one_device


def test_every_kind_of_input_gives_the_same_losses(run_dir, folder, one_device):
    parquet.write_table(pa.table({"body": TEXTS}), "all.parquet")
    Path("parts").mkdir()
    parquet.write_table(pa.table({"text": TEXTS[:90]}), "parts/0.parquet")
    parquet.write_table(pa.table({"text": TEXTS[90:]}), "parts/1.parquet")
    get_tokenizer(None, TEXTS, 300, folder / "cache").save("tokenizer.json")
    agree(run(run_dir, "--data.path=all.parquet", "--data.column=body"), one_device)
    agree(run(run_dir, "--data.path=parts"), one_device)
    agree(run(run_dir, "--data.tokenizer=tokenizer.json"), one_device)
    Path("all.txt").write_text("".join(TEXTS))  # one document: the same text less the ends
    got = losses(run(run_dir, "--data.path=all.txt"))
    assert len(got) == 4 and got != pytest.approx(one_device, rel=1e-5)


def test_a_sample_is_printed_as_it_is(tmp_path, capsys):
    metrics = Metrics(tmp_path, Throughput("cpu", 1, 1.0), 1, 0, main=True)
    metrics.say("sample: [red]d[:key:] :smile:")
    metrics.close()
    assert capsys.readouterr().out == "sample: [red]d[:key:] :smile:\n"


def test_a_tokenizer_need_not_know_the_prompt_of_the_sample(run_dir):
    known = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known.save("known.json")
    Path("known.txt").write_text("a b b " * 600)
    assert len(run(run_dir, "--data.path=known.txt", "--data.tokenizer=known.json")) == 4


@pytest.mark.parametrize(("steps", "recorded"), [("7", 5), ("4", 4)])
def test_a_profiled_run_shows_one_step_and_learns_the_same(run_dir, capsys, steps, recorded):
    found = run(run_dir, "--profile", f"--steps={steps}", "--optim.schedule=constant")
    assert [record["step"] for record in found] == list(range(1, int(steps) + 1))
    assert losses(found) == losses(run(run_dir, f"--steps={steps}", "--optim.schedule=constant"))
    assert capsys.readouterr().out.count("communication, hidden") == 1
    names = [e["name"] for e in json.loads((run_dir / "trace.json").read_text())["traceEvents"]]
    assert [n for n in names if n.startswith("ProfilerStep")] == [f"ProfilerStep#{recorded}"]
    assert breakdown(read(run_dir / "trace.json")).matmul > 0


def test_simulated_ranks_give_the_losses_of_one_device(many, one_device):
    agree(many, one_device)
    assert [set(record) for record in many] == [KEYS] * 3 + [KEYS | {"validation_loss"}]


@pytest.mark.parametrize("cp", ["ring", "ulysses"])
def test_context_parallel_ranks_give_the_losses_and_the_validation_of_one_device(
    run_dir, one_device, cp
):
    agree(run(run_dir, "--simulate", "--mesh=cp=2", f"--cp-method={cp}"), one_device)


def test_simulated_and_plain_runs_may_follow_each_other_in_one_process(
    run_dir, many, one_device, capsys
):
    agree(many, one_device)
    for argv in ([], MANY):
        agree(run(run_dir, *argv), one_device)
    assert "dp=2,tp=2 (4 ranks, cpu, float32, zero 3)" in capsys.readouterr().out


def test_tp_need_not_divide_the_vocabulary(run_dir):
    odd = ["--model.vocab=301", "--model.vocab-multiple=1"]
    agree(run(run_dir, "--simulate", "--mesh=tp=2", *odd), losses(run(run_dir, *odd)))


def test_the_document_mask_is_the_same_on_every_mesh(run_dir, one_device):
    masked = losses(run(run_dir, "--data.document-mask"))
    assert masked != pytest.approx(one_device, rel=1e-5)
    agree(run(run_dir, "--data.document-mask", *MANY), masked)
