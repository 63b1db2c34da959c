"""How fast text becomes token files, and token files become batches, on this machine's processors.

    python bench/data.py                                    # text and a tokenizer are made here
    python bench/data.py --text corpus.jsonl --tokenizer tokenizer.json --workers 2

``prepare`` is measured against a stand-in for the way of Megatron-LM's tools/preprocess_data.py,
written here: a pool of processes, one JSON line per task in chunks of 32, each document encoded
alone by the same tokenizer and sent back as a list of ids, an array per document written by the
parent. Both have the same workers and write the same bytes, which is checked; they take turns, and
the best of each is told. Then one process reads batches from the .bin/.idx, as each rank does.
Prints a line of JSON per measurement, then a table. Needs tokenizers and dtron, no GPU and no
torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from dtron.data.indexed import Indexed, Writer, token_dtype
from dtron.data.prepare import prepare
from dtron.data.sources import Chunks, Mixed, Packed, Source
from dtron.data.tokenization import encoder_of, end_id, get_tokenizer, vocab_of


def library_text(file: Path, characters: int) -> None:
    """Documents of 3,000 characters, from the source of Python's packages."""
    left = characters
    with file.open("w") as out:
        for source in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            text = source.read_text(errors="ignore")[:left]
            for start in range(0, len(text), 3000):
                if text[start : start + 3000].strip():
                    out.write(json.dumps({"text": text[start : start + 3000]}) + "\n")
            left -= len(text)
            if left <= 0:
                return


def start(tokenizer: str) -> None:
    global encoder, end
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = encoder_of(tokenizer)
    end = end_id(encoder)


def encode(line: str) -> list[int]:
    return [*encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids, end]


def preprocess(text: Path, tokenizer: Tokenizer, out: Path, workers: int) -> int:
    """The stand-in."""
    tokens = 0
    context = multiprocessing.get_context("spawn")
    with (
        Writer(out, token_dtype(vocab_of(tokenizer)), overwrite=True) as writer,
        context.Pool(workers, start, (tokenizer.to_str(),)) as pool,
        text.open(encoding="utf-8") as lines,
    ):
        for ids in pool.imap(encode, lines, 32):
            writer.document(np.array(ids, writer.dtype))
            tokens += len(ids)
    return tokens


def rate(fn: Callable[[], int]) -> float:
    """What ``fn`` says it did, per second."""
    begun = time.perf_counter()
    done = fn()
    return done / (time.perf_counter() - begun)


def reading(source: Source, batch: int, batches: int = 10) -> float:
    """Tokens per second of batches, one after the other."""
    source.rows(0, 1)  # the order is made once
    return rate(
        lambda: sum(source.rows(n * batch, batch).tokens[:, 1:].size for n in range(batches))
    )


def preparing(
    text: Path, tokenizer: Tokenizer, folder: Path, workers: int, repeats: int
) -> tuple[float, float]:
    """Tokens per second of ``prepare`` and of the stand-in."""
    ours = lambda: (
        prepare([text], tokenizer, str(folder / "a"), workers=workers, overwrite=True).tokens
    )
    theirs = lambda: preprocess(text, tokenizer, folder / "b", workers)
    rates = [(rate(ours), rate(theirs)) for _ in range(repeats)]
    for suffix in (".bin", ".idx"):
        assert (folder / f"a{suffix}").read_bytes() == (folder / f"b{suffix}").read_bytes()
    return tuple(map(max, zip(*rates, strict=True)))


def main() -> None:
    o = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    o.add_argument("--text", help="a .jsonl with the column text (made here)")
    o.add_argument("--tokenizer", help="a tokenizer.json (trained here)")
    o.add_argument("--vocab", type=int, default=16000)
    o.add_argument("--workers", type=int, default=2)
    o.add_argument("--characters", type=int, default=40_000_000, help="of text that is made here")
    o.add_argument("--repeats", type=int, default=3)
    o = o.parse_args()
    found: dict[str, float] = {}

    def say(what: str, value: float) -> None:
        found[what] = value
        print(json.dumps({"what": what, "tokens_per_s": round(value)}), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Path(o.text) if o.text else folder / "text.jsonl"
        if not o.text:
            library_text(text, o.characters)
        docs = [
            json.loads(line)["text"] for _, line in zip(range(10_000), text.open(), strict=False)
        ]
        tokenizer = get_tokenizer(
            o.tokenizer, docs, o.vocab if not o.tokenizer else 1 << 31, folder
        )
        ours, theirs = preparing(text, tokenizer, folder, o.workers, o.repeats)
        say(f"prepare, {o.workers} workers", ours)
        say(f"stand-in for preprocess_data.py, {o.workers} workers", theirs)
        data, vocab = Indexed(folder / "a"), vocab_of(tokenizer)
        for s in (1024, 4096):
            plain, marked = (
                Packed(data, 0, len(data), s, 0, 100_000, vocab, marks) for marks in (False, True)
            )
            mixed = Mixed([plain, Chunks(data.tokens, s, 0, None, False)], [0.7, 0.3])
            for what, source in (
                ("", plain),
                (", documents marked", marked),
                (", two sources mixed", mixed),
            ):
                say(f"batches of {s}{what}", reading(source, 2**19 // s))
    about = f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}, numpy {np.__version__}"
    print(f"\n{os.cpu_count()} CPU cores, {about}\n| what | tokens/s |\n|---|---|")
    print("\n".join(f"| {what} | {value:,.0f} |" for what, value in found.items()))


if __name__ == "__main__":
    main()
