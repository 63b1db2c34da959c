"""Time the conversion of text to token files, and of token files to batches, on a CPU.

    python bench/data.py                                    # text and a tokenizer are made here
    python bench/data.py --text corpus.jsonl --tokenizer tokenizer.json --workers 2

``prepare`` is compared with a stand-in for Megatron-LM's tools/preprocess_data.py, written here.
The stand-in has a pool of processes. A task is one JSON line, in chunks of 32. A worker encodes
each document alone, with the same tokenizer, and returns a list of ids. The parent writes one array
per document. Both programs have the same number of workers and must write the same bytes. They take
turns, and the best rate of each is reported.

Then one process reads batches from the .bin/.idx, as each rank does. Prints one JSON line per
measurement, then a table. Needs tokenizers and numpy, but no GPU and no torch.
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
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from dtron.data.indexed import Indexed, Writer, token_dtype
from dtron.data.prepare import prepare
from dtron.data.sources import Chunks, Mixed, Packed, Source
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import encoder_of, get_tokenizer, vocab_of


def library_text(file: Path, characters: int) -> None:
    """Write documents of 3,000 characters, from the source of Python's packages."""
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
    """Run the stand-in and return the number of tokens."""
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
    """Return the count that ``fn`` returns, per second."""
    begun = time.perf_counter()
    done = fn()
    return done / (time.perf_counter() - begun)


def reading(source: Source, batch: int, batches: int = 10) -> float:
    """Return tokens per second of consecutive batches."""
    source.rows(0, 1)  # the order is computed once, before the measurement

    def read() -> int:
        return sum(source.rows(n * batch, batch).tokens[:, 1:].size for n in range(batches))

    return rate(read)


def preparing(
    text: Path, tokenizer: Tokenizer, folder: Path, workers: int, repeats: int
) -> tuple[float, float]:
    """Return tokens per second of ``prepare`` and of the stand-in."""

    def ours() -> int:
        out = str(folder / "a")
        return prepare([text], tokenizer, out, workers=workers, overwrite=True).tokens

    theirs = partial(preprocess, text, tokenizer, folder / "b", workers)
    rates = [(rate(ours), rate(theirs)) for _ in range(repeats)]
    for suffix in (".bin", ".idx"):
        assert (folder / f"a{suffix}").read_bytes() == (folder / f"b{suffix}").read_bytes()
    return tuple(map(max, zip(*rates, strict=True)))


def main() -> None:
    o = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    o.add_argument("--text", help="a .jsonl with the column text (written here)")
    o.add_argument("--tokenizer", help="a tokenizer.json (trained here)")
    o.add_argument("--vocab", type=int, default=16000)
    o.add_argument("--workers", type=int, default=2)
    o.add_argument(
        "--characters", type=int, default=40_000_000, help="length of the text written here"
    )
    o.add_argument("--repeats", type=int, default=3)
    o = o.parse_args()
    rates: dict[str, float] = {}

    def report(what: str, value: float) -> None:
        rates[what] = value
        print(json.dumps({"what": what, "tokens_per_s": round(value)}), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Path(o.text) if o.text else folder / "text.jsonl"
        if not o.text:
            library_text(text, o.characters)
        docs = [json.loads(line)["text"] for line in islice(text.open(), 10_000)]
        vocab_size = o.vocab if not o.tokenizer else 1 << 31
        tokenizer = get_tokenizer(o.tokenizer, docs, vocab_size, folder)
        ours, theirs = preparing(text, tokenizer, folder, o.workers, o.repeats)
        report(f"prepare, {o.workers} workers", ours)
        report(f"stand-in for preprocess_data.py, {o.workers} workers", theirs)
        data, vocab = Indexed(folder / "a"), vocab_of(tokenizer)
        for s in (1024, 4096):
            plain, marked = (
                Packed(data, range(len(data)), s, 0, 100_000, vocab, marks)
                for marks in (False, True)
            )
            mixed = Mixed([plain, Chunks(data.tokens, s, 0, None, False)], [0.7, 0.3])
            sources = {"": plain, ", documents marked": marked, ", two sources mixed": mixed}
            for what, source in sources.items():
                report(f"batches of {s}{what}", reading(source, 2**19 // s))
    versions = f"tokenizers {tokenizers.__version__}, numpy {np.__version__}"
    print(f"\n{os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}")
    print("| what | tokens/s |\n|---|---|")
    print("\n".join(f"| {what} | {value:,.0f} |" for what, value in rates.items()))


if __name__ == "__main__":
    main()
