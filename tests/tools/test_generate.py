"""The command ``dtron generate``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from dtron import checkpoint
from dtron.data.tokenization import load_tokenizer
from dtron.generation.engine import Engine
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.tools.generate import main
from dtron.training.optimizer import init_state
from tests.generation.models import MODELS
from tests.helpers.texts import one_line
from tests.helpers.values import ADAMW, ONE


def run_directory(folder: Path) -> Tokenizer:
    """Write a run with a byte-level tokenizer."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    m = replace(MODELS["grouped"], vocab=256)
    spec = (declare_model(m),)
    params = init(spec, m.dims(), 0, ONE)
    cli.save(RunConfig(model=m), folder / "config.json")
    checkpoint.save(
        folder, checkpoint.TrainState(3, 0, params, init_state(ADAMW, spec, params)), spec, {}
    )
    return tokenizer


def test_from_a_run_directory(tmp_path, capsys):
    """The command, on one device and on simulated ranks."""
    run_directory(tmp_path)
    argv = [
        "--from",
        str(tmp_path),
        "--prompt",
        "def",
        "--prompt",
        "x",
        "--tokens",
        "5",
        "--temperature",
        "0",
    ]
    assert main(argv) == 0
    want = capsys.readouterr().out
    assert want.startswith("def") and "\nx" in want
    assert main([*argv, "--simulate", "--mesh", "pp=2,tp=2"]) == 0
    assert capsys.readouterr().out == want
    refused = lambda more, *said: one_line(lambda: main([*argv, *more]), *said)
    refused(["--tokens", "62"], "--tokens 62", "context is 64", "use --tokens 61")
    refused(["--prompt", ""], "no tokens")
    refused(["--simulate", "--mesh", "tp=3"], "tp must divide")
    refused(["--simulate", "--mesh", "cp=2"], "cp")
    refused(["--from", str(tmp_path / "no")], "no folder")
    refused(["--top", "2"], "--top")
    refused(["--prompt", "caf\udce9"], "--prompt 'caf\\udce9'", "UTF-8", "character 3")
    refused(["--seed", str(2**70)], "--seed")
    refused(["--from", "caf\udce9"], "no folder")
    refused(["--from", "x" * 300], "--from", "cannot be opened")
    for mesh in ("caf\udce9", "tp=" + "9" * 30, "tp=1e3"):
        refused(["--mesh", mesh], "mesh")
    assert main([*argv, "--temperature", "1e-40", "--top-p", "1e-300"]) == 0
    assert capsys.readouterr().out == want
    (tmp_path / "tokenizer.json").unlink()
    refused([], "has no tokenizer.json")
    for places in ("checkpoints/step-00000003", "checkpoints"):  # an empty folder, and none
        shutil.rmtree(tmp_path / places)
        refused([], f"{tmp_path}: the run has no checkpoint yet", "--save-every")


def test_padding_and_truncation_of_a_tokenizer_are_left_out(tmp_path, capsys):
    tokenizer = run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "4", "--temperature", "0", "--prompt", "def f"]
    argv += ["--prompt", "x"]
    assert main(argv) == 0
    want = capsys.readouterr().out
    tokenizer.enable_padding(length=9, pad_id=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(argv) == 0 and capsys.readouterr().out == want
    tokenizer.no_padding()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(argv) == 0 and capsys.readouterr().out == want


def test_a_run_stops_as_the_model_that_it_began_with(tmp_path, monkeypatch):
    """A run with --init-from keeps the model's generation_config.json in hf/."""
    run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "9", "--temperature", "0", "--prompt", "def"]
    tokens: list[int] = []

    class Recorded(Engine):
        def step(self):
            events = super().step()
            tokens.extend(event.token for event in events)
            return events

    monkeypatch.setattr("dtron.tools.generate.Engine", Recorded)
    assert main(argv) == 0
    new = list(tokens)
    second = next(i for i, token in enumerate(new) if token != new[0])
    unused = next(i for i in range(256) if i not in new)
    (tmp_path / "hf").mkdir()

    def stopped(name: str, entries: object) -> int:
        (tmp_path / name).write_text(json.dumps(entries))
        tokens.clear()
        assert main(argv) == 0
        return len(tokens)

    assert stopped("hf/config.json", {"eos_token_id": new[second]}) == second + 1
    assert stopped("hf/generation_config.json", {"eos_token_id": [unused, new[0]]}) == 1
    assert stopped("hf/generation_config.json", {"eos_token_id": None}) == second + 1
    (tmp_path / "hf" / "config.json").unlink()
    eos = load_tokenizer(str(tmp_path)).id_to_token(new[second])
    assert stopped("tokenizer_config.json", {"eos_token": eos}) == second + 1


def printed(capsys, argv: list[str], *more: str) -> str:
    assert main([*argv, *more]) == 0
    return capsys.readouterr().out


def test_prompts_of_a_file_and_outputs(tmp_path, capsys, monkeypatch):
    """The same texts from any source, with any number of rows, whole or in pieces."""
    run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "6", "--seed", "3"]
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("\ufeffdef\r\n\n€ x\nq\n", encoding="utf-8")
    rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("def", "€ x", "q")))
    want = printed(capsys, argv, "--prompt", "def", "--prompt", "€ x", "--prompt", "q")
    assert want.startswith("def") and "\n€ x" in want and "\nq" in want
    assert printed(capsys, argv, "--prompts", str(lines)) == want
    assert printed(capsys, argv, "--prompts", str(rows), "--batch", "1") == want
    assert printed(capsys, argv, "--prompt", "def", "--prompts", str(rows))[: len("def")] == "def"
    assert printed(capsys, argv, "--prompts", str(lines), "--stream") == want
    found = printed(capsys, argv, "--prompts", str(lines), "--jsonl").splitlines()
    answers = [json.loads(line) for line in found]
    assert [a["prompt"] for a in answers] == ["def", "€ x", "q"]
    assert all(a["tokens"] == 6 and a["finish_reason"] == "length" for a in answers)
    pieces: list[str] = []
    monkeypatch.setattr(
        "dtron.tools.generate.write_line", lambda stream, text, end="\n": pieces.append(text + end)
    )
    printed(capsys, argv, "--prompts", str(lines), "--stream")
    assert len(pieces) > 5


def test_stop_and_the_ways_to_sample(tmp_path, capsys):
    run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "24", "--prompt", "def", "--jsonl"]
    greedy = json.loads(printed(capsys, argv, "--temperature", "0"))["text"]
    for more in (["--top-k", "1"], ["--min-p", "1"], ["--top-p", "1e-9"]):
        assert json.loads(printed(capsys, argv, *more))["text"] == greedy
    other = json.loads(printed(capsys, argv, "--temperature", "0", "--repetition-penalty", "9"))
    assert other["text"] != greedy
    stop = greedy[5:7]
    stopped = json.loads(
        printed(capsys, argv, "--temperature", "0", "--stop", "~~", "--stop", stop)
    )
    assert stopped["text"] == greedy[: greedy.find(stop)]
    assert stopped["finish_reason"] == "stop" and stopped["tokens"] < 24
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "no.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a"\n')
    refused = lambda more, *said: one_line(lambda: main([*argv, *more]), *said)
    refused(["--prompts", str(tmp_path / "bad.txt")], "bad.txt", "UTF-8 at byte 1")
    refused(["--prompts", str(tmp_path / "no.jsonl")], "no.jsonl, line 2", '"prompt"')
    refused(["--prompts", str(tmp_path / "cut.jsonl")], "cut.jsonl, line 1", "JSON")
    refused(["--prompts", str(tmp_path)], "cannot be read")
    one_line(
        lambda: main(["--from", str(tmp_path), "--prompts", str(tmp_path / "none.txt")]),
        "none.txt",
        "no prompt",
    )
    one_line(lambda: main(["--from", str(tmp_path)]), "no prompt")
    refused(["--stop", ""], "--stop", "at least one character")
    refused(["--stop", "caf\udce9"], "--stop", "UTF-8")
    refused(["--batch", "0"], "--batch 0")
    refused(["--tokens", "0"], "--tokens 0")
    refused(["--stream"], "--stream with --jsonl")
    refused(["--top-k", "-1"], "--top-k -1")
