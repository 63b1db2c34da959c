"""The program from its command line: what it writes, on any mesh, after a resume, and what it
refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron import checkpoint
from dtron.data import get_tokenizer
from dtron.data.sources import Chunks
from dtron.runtime.cli import load, parse
from dtron.runtime.exit import run_cli
from dtron.runtime.launch import plan_run
from dtron.runtime.metrics import Metrics, Throughput
from dtron.runtime.time_breakdown import breakdown
from dtron.runtime.trace import read
from tests.helpers import dying
from tests.helpers.paths import ROOT
from tests.helpers.ranks import Ranks
from tests.helpers.texts import TEXTS, corpus, words

sys.path.insert(0, str(ROOT))
import train  # noqa: E402  (the program is no part of the package)

# One worker for all: its ranks plan a mesh's collectives once, and the text is tokenised once.
pytestmark = pytest.mark.xdist_group("program")

TINY = [
    "--model.layers=1",
    "--model.embed=32",
    "--model.heads=2",
    "--model.kv-heads=2",
    "--model.vocab=300",
]
TINY += ["--model.head-dim=16", "--model.mlp=64", "--data.seq-len=16", "--data.path=corpus.jsonl"]
TINY += ["--device=cpu", "--batch=4", "--steps=4", "--sample-tokens=5"]
TINY += [
    "--optim.lr=5e-3",
    "--optim.warmup=1",
]  # steps long enough that a wrong one shows in the next loss
MANY = ["--simulate", "--mesh=dp=2,tp=2", "--zero=3"]
KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops_per_device", "mfu"}
KEYS |= {"peak_memory_gib", "step_seconds", "data_wait_ratio", "skipped_steps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("program")).parent


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Run as one process, beside the text, with a cache of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        patch.delenv(name, raising=False)
    patch.setenv("DTRON_CACHE", str(folder / "cache"))
    patch.chdir(folder)


@pytest.fixture(autouse=True)
def run_dir(folder, tmp_path, monkeypatch) -> Path:
    enter(folder, monkeypatch)
    return tmp_path / "run"


def run(run_dir: Path, *argv: str) -> list[dict]:
    """What metrics.jsonl holds after a run that succeeds."""
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}", *argv]) == 0
    return records(run_dir)


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict]) -> list[float]:
    return [record["loss"] for record in found]


@pytest.fixture(scope="module")
def one_device(folder) -> list[float]:
    """What every other way to take these four steps must give."""
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        want = losses(run(folder / "run"))
    assert want[-1] < want[0] - 0.05
    return want


def agree(found: list[dict], want: list[float]) -> None:
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert losses(found) == pytest.approx(want, rel=1e-5)


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


def test_tensorboard_has_the_same_numbers(run_dir, one_device):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(run_dir, "--tensorboard")
    board = EventAccumulator(str(run_dir)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (r["step"], r["loss"]) for r in found
    ]
    assert set(board.Tags()["scalars"]) == KEYS - {"step", "mfu"} | {"validation_loss"}


@pytest.mark.parametrize(("steps", "recorded"), [("7", 5), ("4", 4)])
def test_a_profiled_run_shows_one_step_and_learns_the_same(run_dir, capsys, steps, recorded):
    found = run(run_dir, "--profile", f"--steps={steps}", "--optim.schedule=constant")
    assert [record["step"] for record in found] == list(range(1, int(steps) + 1))
    assert losses(found) == losses(run(run_dir, f"--steps={steps}", "--optim.schedule=constant"))
    assert capsys.readouterr().out.count("communication, hidden") == 1
    names = [e["name"] for e in json.loads((run_dir / "trace.json").read_text())["traceEvents"]]
    assert [n for n in names if n.startswith("ProfilerStep")] == [f"ProfilerStep#{recorded}"]
    assert breakdown(read(run_dir / "trace.json")).matmul > 0


# ---- many ranks


@pytest.fixture(scope="module")
def many(folder) -> list[dict]:
    """A run on simulated ranks, for tests that look at it, or come after one."""
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        return run(folder / "many", *MANY)


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


@pytest.mark.parametrize(
    ("first", "then"), [([], MANY), (MANY, ["--zero=0"])], ids=["split", "joined"]
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    run_dir, one_device, first, then, monkeypatch
):
    agree(run(run_dir, "--save-every=2", *first), one_device)
    shutil.rmtree(checkpoint.folder(run_dir) / "step-00000004")  # as if it had been killed before
    starts, rows = [], Chunks.rows
    monkeypatch.setattr(
        Chunks, "rows", lambda self, start, n: starts.append(start) or rows(self, start, n)
    )
    found = run(run_dir, "--resume", *then)
    agree(found, one_device)
    assert starts[:2] == [8, 12]  # samples: two steps of four are behind it
    assert [record["tokens"] for record in found] == [64, 128, 192, 256]
    assert load(run_dir / "config.json").resume
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    meshes = [
        [a[7:] for a in argv if a.startswith("--mesh=")] or ["dp=1"] for argv in (first, then)
    ]
    assert [[start["mesh"]] for start in starts] == meshes
    assert all(start["torch"] == torch.__version__ and start["device"] == "cpu" for start in starts)


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """The next run of this process gets a signal in this step: it ends the step, saves, and
    leaves."""
    rate = train.learning_rate

    def signalled(optim, done: int, steps: int) -> float:
        if done + 1 == step:
            signal.raise_signal(signal.SIGUSR1)
        return rate(optim, done, steps)

    patch.setattr(train, "learning_rate", signalled)


def torchrun(*argv: str, program: str = "train.py", **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / program), *TINY, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_give_the_losses_of_one_device(run_dir, one_device):
    done = torchrun("--mesh=dp=2", "--zero=3", "--profile", f"--run-dir={run_dir}")
    assert done.returncode == 0, done.stderr
    agree(records(run_dir), one_device)
    assert done.stdout.count("step 4: validation loss") == 1
    assert done.stdout.count("communication, exposed") == 1  # rank 0 alone says where the time went
    for rank in range(2):
        b = breakdown(read(run_dir / f"trace-rank{rank}.json"))
        assert min(b.matmul, b.attention, b.elementwise, b.communication + b.hidden) > 0


def test_processes_that_are_refused_say_so_once_and_end(run_dir):
    done = torchrun("--mesh=dp=2,tp=2", f"--run-dir={run_dir}")
    assert done.returncode != 0
    assert done.stderr.count("error: mesh 'dp=2,tp=2' has 4 ranks, but 2 are running") == 1, (
        done.stderr
    )
    assert not own_frames(done.stderr, ROOT), done.stderr
    assert not run_dir.exists()


def own_frames(said: str, root: Path) -> list[str]:
    """The project's own files in the tracebacks of this text. torchrun has a traceback too, of
    files that may lie below the checkout, in a .venv, and the checkout may have any name."""
    root = root.resolve()
    ours = lambda file: file == root / "train.py" or root / "dtron" in file.parents
    return [name for name in re.findall(r'File "([^"\n]+)"', said) if ours(Path(name).resolve())]


@pytest.mark.parametrize("name", ["main", "dtron", "a dtron"])
def test_frames_of_the_project_are_told_from_others(tmp_path, name):
    root = tmp_path / name
    theirs = [
        ".venv/lib/python3.11/site-packages/torch/distributed/run.py",
        ".venv/dtron/train.py",
        "run.py",
    ]
    ours = ["train.py", "dtron/runtime/exit.py", "dtron/moe/../hf/__main__.py"]
    lines = lambda files: "".join(f'  File "{root / file}", line 1, in main\n' for file in files)
    assert own_frames(lines(theirs), root) == []
    assert own_frames(lines(theirs + ours), root) == [str(root / file) for file in ours]


@pytest.mark.parametrize(
    ("dies", "how", "launcher"),
    [("0", "leaves", True), ("1", "leaves", False), ("1", "hangs", False)],
)
def test_a_rank_that_dies_ends_the_job_and_is_named(run_dir, dies, how, launcher):
    """Within the timeout, by the rank next to it; the patience with these processes would be the
    hang."""
    timeout = 60 if launcher else 10  # a busy machine takes seconds to start those of a launcher
    pipe = (
        "--mesh=pp=2",
        "--model.layers=2",
        f"--timeout-seconds={timeout}",
        f"--run-dir={run_dir}",
    )
    if launcher:
        done = torchrun(
            *pipe,
            program="tests/helpers/dying.py",
            DIES=dies,
            HOW=how,
        )
        code, said = done.returncode, done.stderr
    else:
        ranks = Ranks(
            [*TINY, *pipe], 2, run_dir.with_name("output.txt"), dying.main, DIES=dies, HOW=how
        )
        code, said = all(ranks.together()), ranks.output.read_text()
    assert code, said
    other = 1 - int(dies)
    line = f"error: stage {other}: pipeline rank {dies} (stage {dies}) has died or hangs"
    assert line in said and ("--timeout-seconds" in said) == (how == "hangs"), said


def test_pipeline_processes_give_the_losses_of_one_device(run_dir):
    model = ("--model.layers=2", "--model.tied")
    want = losses(run(run_dir.with_name("one"), *model))
    argv = [*TINY, "--mesh=pp=2", "--pipeline.schedule=zb-h1", *model, f"--run-dir={run_dir}"]
    ranks = Ranks(argv, 2, run_dir.with_name("output.txt"))
    assert ranks.together() == [0, 0], ranks.output.read_text()
    agree(records(run_dir), want)
    assert ranks.output.read_text().count("sample: ") == 1


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pp=2 1f1b", "pp=4 zb-h1"),
        ("pp=2,tp=2 interleaved", "pp=2 zb-v"),
        ("pp=4 gpipe", "dp=2,tp=2 1f1b"),
    ],
)
def test_a_run_resumes_on_another_pipeline(run_dir, first, then, monkeypatch):
    """Other pp, other schedule, other stages per rank; the tied embedding's two copies too."""

    def flags(text: str) -> list[str]:
        mesh, schedule = text.split()
        model = ["--model.layers=4", "--model.tied", "--micro-batch=1"]
        return [
            "--simulate",
            f"--mesh={mesh}",
            f"--pipeline.schedule={schedule}",
            "--sample-tokens=0",
            *model,
        ]

    plain = ["--model.layers=4", "--model.tied"]
    want = losses(run(run_dir.with_name("one"), *plain))
    stop_after(
        2, monkeypatch
    )  # two steps of each: what is left of the first is slow, and the next begins
    found = run(run_dir, *flags(first))
    assert losses(found) == pytest.approx(want[:2], rel=1e-5)
    agree(run(run_dir, "--resume", *flags(then)), want)


def test_an_error_of_one_rank_alone_is_said(monkeypatch, capsys):
    """Two processes on a machine with one GPU: only the second one has none."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        try:
            run_cli(lambda argv: plan_run(parse(argv)) and 0, ["--device=cuda"])
        except SystemExit as stop:
            assert stop.code == 2
    assert "this machine has 1 GPUs" in capsys.readouterr().err


# ---- refusals


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert run_cli(train.main, [*TINY, *argv]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and not out
    return err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--mesh dp=2", ["mesh 'dp=2' has 2 ranks", "1 is running", "--simulate"]),
        ("--mesh xp=2", ["'xp'", "dp_replicate"]),
        ("--simulate --mesh tp=2,tp=2", ["'tp'", "twice"]),
        ("--simulate --mesh dp=0", ["'0'", "positive"]),
        ("--simulate --mesh dp=-2", ["'-2'", "positive"]),
        ("--simulate --mesh dp=two", ["'two'", "positive"]),
        ("--simulate --mesh dp", ["dp has size ''", "dp=2"]),
        (
            "--simulate --mesh cp=2 --data.seq-len 14",
            ["data.seq_len=", "over cp=2", "multiple of 4"],
        ),
        ("--simulate --mesh pp=2", ["2 pipeline stages for model.layers=1", "--model.layers 2"]),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.layers 3,2",
            ["3,2", "sum to model.layers=4"],
        ),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.layers 4",
            ["must be 2 positive numbers"],
        ),
        ("--simulate --mesh pp=2 --model.layers 4 --pipeline.layers a,b", ["'a,b'", "7,9"]),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.schedule zbv",
            ["--pipeline.schedule", "'zbv'", "'zb-v'"],
        ),
        (
            "--simulate --mesh pp=4 --model.layers 8 --pipeline.schedule dualpipe-v",
            ["at least 8 microbatches, has 4"],
        ),
        ("--simulate --mesh tp=4", ["model.heads=2", "tp=2", "--model.heads 4"]),
        ("--simulate --mesh tp=2 --model.kv-heads 1", ["model.kv_heads=1", "--model.kv-heads 2"]),
        ("--simulate --mesh tp=2 --model.mlp 63", ["model.mlp=63", "--model.mlp 64"]),
        ("--simulate --mesh tp=2 --data.seq-len 15", ["data.seq_len=15", "--data.seq-len 16"]),
        ("--simulate --mesh dp=3", ["batch=4", "3 data ranks", "--batch 3"]),
        ("--micro-batch 3", ["batch=4", "micro_batch=3", "--batch 3"]),
        ("--micro-batch 0", ["micro_batch=0", "at least 1"]),
        ("--simulate --device cuda", ["--simulate --device cuda", "drop one"]),
        ("--cuda-graph on", ["--cuda-graph on", "a GPU and compiled stages", "--cuda-graph auto"]),
        ("--data.seq-len 4096", ["data.seq_len=4096", "--model.context 4096"]),
        ("--data.validation-ratio 1e-4", ["validation text", "raise --data.validation-ratio,"]),
        ("--data.path /no/such.txt", ["--data.path '/no/such.txt'", "does not exist"]),
        ("--data.tokenizer /no/such.json", ["--data.tokenizer '/no/such.json'", "does not exist"]),
        ("--data.column body", ["'body'", "--data.column", "'text'"]),
        ("--model.vocab 100", ["--model.vocab 100", "--model.vocab 257"]),
        ("--stpes 3", ["--stpes: unknown flag", "--steps"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run_dir, capsys, argv, parts):
    message = refused(capsys, f"--run-dir={run_dir}", *argv.split())
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read_are_refused(run_dir, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    five = words({word: i for i, word in enumerate("?abcd")}, tmp_path / "five.json")
    at = f"--run-dir={run_dir}"
    assert "no text at all" in refused(capsys, at, f"--data.path={tmp_path / 'empty.txt'}")
    assert "not a readable Parquet" in refused(
        capsys, at, f"--data.path={tmp_path / 'bad.parquet'}"
    )
    message = refused(capsys, at, f"--data.tokenizer={five}", "--model.vocab=4")
    assert "5 tokens and the model only 4" in message and "--model.vocab 5" in message


def test_a_run_dir_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"  # not a folder without permissions: those do not bind root
    assert f"--run-dir {below}: cannot be written" in refused(capsys, f"--run-dir={below}")
    assert "has no checkpoint" in refused(capsys, f"--run-dir={tmp_path}", "--resume")


def test_a_checkpoint_that_does_not_fit_is_refused(run_dir, capsys):
    run(run_dir, "--save-every=2")
    resume = [f"--run-dir={run_dir}", "--resume"]
    assert "--model.mlp 64" in refused(capsys, *resume, "--model.mlp=96")
    assert "--seed 0" in refused(capsys, *resume, "--seed=1")
    data = max(checkpoint.newest(run_dir).iterdir(), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    message = refused(capsys, *resume)
    assert "not whole" in message and str(data) in message
    shutil.rmtree(data.parent)  # the remedy that the message names
    assert [record["step"] for record in run(run_dir, "--resume")] == [1, 2, 3, 4]


def test_a_refused_resume_leaves_the_run_as_it_was(run_dir, capsys):
    run(run_dir, "--save-every=2")
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    refused(capsys, f"--run-dir={run_dir}", "--resume", "--model.mlp=96")
    refused(capsys, f"--run-dir={run_dir}", "--resume", "--data.path=gone.jsonl")
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


def test_a_new_run_in_a_used_folder_does_not_resume_the_old_one(run_dir):
    """Either it is refused, or what is newest afterwards is its own."""
    run(run_dir, "--save-every=2")
    code = run_cli(train.main, [*TINY, f"--run-dir={run_dir}", "--save-every=2", "--steps=2"])
    assert code == 2 or checkpoint.newest(run_dir).name == "step-00000002"
