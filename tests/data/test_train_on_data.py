"""train.py on every kind of data: the same on any mesh, after a resume, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train as program
from dtron import checkpoint
from dtron.data import Prefetch
from dtron.data.__main__ import main as data_main
from dtron.data.sources import Packed
from dtron.runtime import batches
from dtron.runtime.exit import run_cli
from tests.helpers.texts import TEXTS, corpus
from tests.helpers.train_cli import TINY, agree, enter, losses, records

pytestmark = pytest.mark.xdist_group("program")

MANY = ["--simulate", "--mesh=dp=2", "--zero=3", "--micro-batch=1"]
CHATS = [
    [
        {"role": "user", "content": f"{a} plus {b}?"},
        {"role": "assistant", "content": f"It is {a + b}."},
    ]
    for a in range(12)
    for b in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = corpus(tmp_path_factory.mktemp("data")).parent
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": talk}) + "\n" for talk in CHATS)
    )
    (folder / "notes.txt").write_text("".join(TEXTS[:90]).replace("return", "yield"))
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        argv = ["prepare", "corpus.jsonl", "--vocab=300", "--out=tokens", "--workers=1"]
        assert run_cli(data_main, argv) == 0
    return folder


@pytest.fixture(autouse=True)
def run_dir(folder, tmp_path, monkeypatch) -> Path:
    enter(folder, monkeypatch)
    return tmp_path / "run"


def run(run_dir: Path, *argv: str) -> list[dict]:
    assert run_cli(program.main, [*TINY, f"--run-dir={run_dir}", *argv]) == 0
    return records(run_dir)


KINDS = {
    "indexed": ["--data.path=tokens"],
    "indexed, masked": ["--data.path=tokens.idx", "--data.document-mask", "--data.split=8,2"],
    "fitted": ["--data.path=tokens", "--data.packing=best-fit"],
    "text, fitted": ["--data.packing=best-fit"],
    "positions alone": [
        "--data.path=tokens",
        "--data.document-positions=True",
        "--model.positions=learned",
    ],
    "mixed": ["--data.path=0.7 tokens, 0.3 notes.txt"],
    "streamed": ["--data.streaming"],
    "chat": [
        "--data.path=chat.jsonl",
        "--data.chat",
        "--data.seq-len=96",
        "--data.validation-ratio=0.1",
    ],
}


def killed_and_resumed(run_dir: Path, *argv: str, then: list[str]) -> None:
    """Four steps on one device. Then the last two steps again, from a checkpoint and in another
    way."""
    want = run(run_dir, *argv, "--save-every=2")
    assert all(0 <= record["data_wait_ratio"] <= 1 for record in want)
    shutil.rmtree(
        checkpoint.folder(run_dir) / "step-00000004"
    )  # as if the run had been killed before step 4
    found = run(run_dir, *argv, *then, "--resume")
    agree(found, losses(want))
    assert losses(found)[:2] == losses(want)[:2]
    assert [r["tokens"] for r in found] == [r["tokens"] for r in want]
    assert found[3]["validation_loss"] == pytest.approx(want[3]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_with_the_very_next_sample(run_dir, kind):
    killed_and_resumed(run_dir, *KINDS[kind], then=["--micro-batch=1"])


@pytest.mark.parametrize(
    "kind", [k if k == "chat" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_killed_run_goes_on_on_another_mesh(run_dir, kind):
    killed_and_resumed(run_dir, *KINDS[kind], then=MANY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_ramp_has_the_samples_of_the_plain_order(run_dir, kind, monkeypatch):
    """Sixteen samples in steps of 4, and in steps of 2 and 4."""
    found, convert = [], batches.to_host
    read = lambda rows, *more: found.append(rows.tokens) or convert(rows, *more)
    monkeypatch.setattr(batches, "to_host", read)
    run(run_dir, *KINDS[kind], "--batch=4")
    plain = np.concatenate(found)
    found.clear()
    run(run_dir.with_name("ramp"), *KINDS[kind], "--batch=2:0, 4:4", "--steps=6")
    assert [len(x) for x in found] == [2, 2, 2, 2, 4, 4]
    assert np.array_equal(np.concatenate(found), plain)


def test_resuming_one_sample_off_is_seen(run_dir, monkeypatch):
    """The mutant that the tests above must catch: the second process reads one sample too far."""
    original, process = Packed.rows, []

    def rows(self, start, count):
        return original(self, start + (len(process) > 1 and self.shuffle), count)

    monkeypatch.setattr(Packed, "rows", rows)
    opened = program.open_data
    monkeypatch.setattr(program, "open_data", lambda *a: process.append(1) or opened(*a))
    with pytest.raises(AssertionError):
        killed_and_resumed(run_dir, "--data.path=tokens", then=[])


def test_the_options_about_documents_change_what_is_computed(run_dir):
    learned = ["--data.path=tokens", "--model.positions=learned", "--steps=1"]
    options = [
        [],
        ["--data.document-mask"],
        ["--data.document-positions=True"],
        ["--data.document-mask", "--data.document-positions=False"],
    ]
    found = [losses(run(run_dir / str(i), *learned, *more))[0] for i, more in enumerate(options)]
    assert len(set(found)) == 4


def test_a_conversation_is_learned_where_the_assistant_speaks(run_dir, capsys):
    found = run(run_dir, *KINDS["chat"], "--steps=30", "--sample-tokens=0")
    assert found[-1]["loss"] < found[0]["loss"] - 1
    assert all(record["tokens"] < 4 * 96 * 0.7 * record["step"] for record in found)


def test_the_order_is_part_of_a_run(run_dir, capsys):
    """Two epochs of a text are shuffled together. So a longer run has another order, unless a flag
    sets the epochs."""
    argv = ["--data.path=tokens", "--steps=60", "--sample-tokens=0", "--log-every=99"]
    run(run_dir, *argv, "--save-every=60", "--batch=8")
    capsys.readouterr()
    longer = [*TINY, f"--run-dir={run_dir}", *argv, "--batch=8", "--resume", "--steps=2000"]
    assert run_cli(program.main, longer) == 2
    said = capsys.readouterr().err
    assert "data.samples=" in said and "use --data.samples " in said
    samples = said.split("use --data.samples ")[1].split(",")[0]
    assert run_cli(program.main, [*longer, f"--data.samples={samples}", "--steps=61"]) == 0


def test_without_a_tokenizer_ids_are_shown(folder, run_dir, capsys):
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"tokens{suffix}", run_dir.parent / f"bare{suffix}")
    run(run_dir, f"--data.path={run_dir.parent / 'bare'}", "--steps=1")
    shown = capsys.readouterr().out.split("sample: ")[1].splitlines()[0].split()
    assert len(shown) == 13 and all(word.isdigit() for word in shown)
    assert not (run_dir / "tokenizer.json").exists()


def test_what_is_refused_is_one_line(folder, run_dir, capsys):
    def refused(*argv: str) -> str:
        assert run_cli(program.main, [*TINY, f"--run-dir={run_dir}", *argv]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        return err

    bare = run_dir.parent / "bare"
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    tokens[tokens == np.bincount(tokens).argmax()] = 999
    tokens.tofile(f"{bare}.bin")
    shutil.copy(folder / "tokens.idx", f"{bare}.idx")
    said = refused(f"--data.path={bare}")
    assert "bare.bin" in said and "token id 999" in said and "--model.vocab" in said
    Path(f"{bare}.bin").write_bytes(tokens.tobytes()[:-1])
    assert "bare.bin" in (said := refused(f"--data.path={bare}")) and "cut short" in said
    Path(f"{bare}.idx").write_bytes(Path(folder / "tokens.idx").read_bytes()[:99])
    assert "bare.idx" in (said := refused(f"--data.path={bare}")) and "cut short" in said
    Path(f"{bare}.idx").unlink()
    assert "bare.idx' does not exist" in refused(f"--data.path={bare}")
    assert "weights sum to 0" in refused("--data.path=0 tokens, 0 notes.txt")
    assert "'-1 tokens' does not begin with a weight" in refused(
        "--data.path=-1 tokens, 2 notes.txt"
    )
    assert "'no' does not exist" in refused("--data.path=1 no, 2 notes.txt")
    assert "--data.split '1,x'" in refused("--data.path=tokens", "--data.split=1,x")
    assert "the 'tokens.bin' validation text has 0 tokens" in refused(
        "--data.path=tokens", "--data.split=1"
    )
    assert "larger share by --data.validation-ratio" in refused(
        "--data.path=tokens", "--data.validation-ratio=0.0001"
    )
    assert "tokens have no roles" in refused("--data.path=tokens", "--data.chat")
    assert "line 1" in (said := refused("--data.chat")) and "'messages'" in said
    assert "drop one of the two" in refused("--data.streaming", "--data.packing=best-fit")
    assert "data.samples=0" in refused("--data.samples=0")
    assert "set --model.vocab 300" in refused("--data.path=tokens", "--model.vocab=299")
    assert not run_dir.exists() or not list(run_dir.iterdir())


def test_text_that_turns_out_bad_while_it_is_streamed(folder, run_dir, capsys):
    bad = folder / "bad.jsonl"
    bad.write_text((folder / "corpus.jsonl").read_text() + '{"text": 1}\n')
    argv = [
        f"--data.path={bad}",
        "--data.streaming",
        "--data.tokenizer=tokens.tokenizer.json",
        "--steps=400",
    ]
    assert run_cli(program.main, [*TINY, f"--run-dir={run_dir}", *argv]) == 2
    assert "bad.jsonl' line 201" in capsys.readouterr().err


def test_the_run_says_how_long_it_waited_for_data(run_dir, monkeypatch):
    """data_wait_ratio is the share of a step in which the host waited for data."""
    original = Prefetch.next

    def late(self):
        found, self.waited = original(self), 1e9
        return found

    monkeypatch.setattr(Prefetch, "next", late)
    assert [record["data_wait_ratio"] for record in run(run_dir, "--steps=3")] == [1.0] * 3
