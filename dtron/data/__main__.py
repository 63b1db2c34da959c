"""``python -m dtron.data prepare`` makes token files from text; ``info`` describes token files;
``show`` prints samples of a run, with the tokens that are learned.

python -m dtron.data prepare corpus.jsonl --tokenizer tokenizer.json --out corpus
python -m dtron.data info corpus
python -m dtron.data show --data.path pairs.jsonl --data.kind preference --rows 2
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from dtron.data.cache import cache_dir
from dtron.data.config import DataConfig
from dtron.data.documents import Documents
from dtron.data.files import expand, find_files
from dtron.data.indexed import NAMES, Indexed, Writer, prefix_of, token_dtype
from dtron.data.open import Turns, beside, open_data
from dtron.data.prepare import prepare
from dtron.data.show_rows import shown
from dtron.data.special_tokens import CONFIG, end_id, file_beside, save_tokenizer
from dtron.data.tokenization import get_tokenizer, load_tokenizer, text_of, vocab_of
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.runtime.exit import Parser, run_cli

_PIECE = 1 << 24  # tokens read at once


def run_prepare(o: Namespace, console: Console) -> int:
    if o.workers is not None and o.workers < 1:
        raise UserError(
            f"--workers {o.workers}: at least 1 process has to work; raise it, or leave it out"
        )
    Writer(o.out, token_dtype(0), o.overwrite)  # refuses existing files before any work is done
    kept = beside(expand(o.out))
    taken = [file for file in (kept, file_beside(kept, CONFIG)) if file.exists()]
    if taken and not o.overwrite:
        raise UserError(
            f"--out {o.out!r}: {str(taken[0])!r} exists; choose another name, or --overwrite"
        )
    try:
        found = {path: find_files(path) for path in o.paths}
        files = list(chain.from_iterable(found[path].files for path in o.paths))
        tokenizer = _tokenizer(o)
        end = end_id(tokenizer, o.tokenizer, o.end_token)
        if end is None:
            raise UserError(
                f"--tokenizer {o.tokenizer!r}: no file beside it names a token that ends a "
                "document, and its vocabulary has no well-known one; name one of its tokens by "
                "--end-token"
            )
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=sum(file.stat().st_size for file in files), status="")

            def progress(read: int, tokens: int) -> None:
                rate = tokens / max(bar.tasks[0].elapsed or 0, 1e-9)
                status = f"{tokens:,} tokens, {rate / 1e6:.2f}M/s"
                bar.update(task, completed=read, status=status)

            done = prepare(files, tokenizer, o.out, o.column, o.workers, o.overwrite, progress, end)
    except ValueError as error:  # the messages name flags of train.py; replace them
        message = str(error).replace("--data.path ", "").replace("--data.path", "PATH")
        message = message.replace("--data.", "--").replace("--model.", "--")
        raise UserError(message) from error
    prefix = expand(o.out)
    save_tokenizer(tokenizer, kept, end)
    for line in filter(None, (f.skipped_line(path) for path, f in found.items())):
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"{prefix}.bin, .idx and {kept.name}: {done.documents:,} documents, "
        f"{done.tokens:,} tokens in {done.seconds:.1f} s, {done.rate / 1e6:.2f}M tokens/s",
        soft_wrap=True,
    )
    return 0


def _tokenizer(o: Namespace) -> Tokenizer:
    if o.tokenizer is not None:
        return load_tokenizer(o.tokenizer)
    cache = cache_dir()
    docs = [Documents(path, o.column, cache, streaming=True) for path in o.paths]
    return get_tokenizer(None, docs[0] if len(docs) == 1 else Turns(docs), o.vocab, cache)


def run_info(o: Namespace, console: Console) -> int:
    """Describe the contents of a pair of files. Every token is read."""
    prefix = prefix_of(o.path)
    if prefix is None:
        raise UserError(
            f"{o.path!r}: no {o.path}.idx and no {o.path}.bin there; give the name before .idx"
        )
    data = Indexed(prefix)
    low, high = np.inf, -np.inf
    for start in range(0, len(data.tokens), _PIECE):
        data.check_uncut()
        piece = data.tokens[start : start + _PIECE]
        low, high = min(low, piece.min()), max(high, piece.max())
    sizes = np.add.reduceat(np.append(data.lengths, 0), data.documents[:-1], dtype=np.int64)
    empty = data.documents[1:] == data.documents[:-1]
    sizes[empty] = 0  # reduceat gives an empty document the length of the next sequence
    total = int(data.lengths.sum(dtype=np.int64))
    lines = {
        "files": f"{data.bin} ({data.bin.stat().st_size:,} bytes), {data.idx.name}",
        "documents": f"{len(sizes):,}",
        "sequences": f"{len(data):,}",
        "tokens": f"{total:,} of type {NAMES[data.code]}",
        "tokens of a document": f"{np.median(sizes):g} in the middle, {sizes.mean():.1f} on "
        f"average, {sizes.max():,} at most",
        "token ids": f"{low} to {high}",
    }
    if beside(prefix).is_file():
        tokenizer = load_tokenizer(str(beside(prefix)))
        lines["tokenizer"] = f"{beside(prefix).name}, {vocab_of(tokenizer):,} words"
        first = next(i for i in range(len(data)) if data.lengths[i])
        lines["begins"] = repr(text_of(tokenizer, data.sequence(first)[:24].tolist()))
        if high >= vocab_of(tokenizer):
            raise UserError(
                f"{str(data.bin)!r} holds the token id {high}, and {beside(prefix).name} has "
                f"{vocab_of(tokenizer)} words; prepare it again, or put the right tokenizer beside "
                "it"
            )
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)
    return 0


@dataclass(frozen=True)
class ShowRowsConfig:
    """Print the first samples of a run, with the tokens that are learned: in colour on a terminal,
    between [[ and ]] elsewhere."""

    rows: int = 2
    """number of samples"""
    seed: int = 0
    """random seed of the run"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


def run_show(argv: Sequence[str], console: Console) -> int:
    from dtron.runtime.cli import parse  # the other commands need no flags of train.py

    o = parse(argv, ShowRowsConfig(), prog="python -m dtron.data show")
    if o.rows < 1:
        raise UserError(f"--rows {o.rows}: must be at least 1; use --rows 1")
    data = open_data(o.data, o.model.vocab, o.seed, o.rows)
    rows = data.train.rows(0, o.rows)
    if o.data.masked and not o.data.learn_next_document:
        rows = rows.within_documents()
    for line in data.notes:
        console.print(line, soft_wrap=True, markup=False)
    for text in shown(rows, data.decode, console.is_terminal):
        console.print(text, soft_wrap=True)
    return 0


def parser() -> Parser:
    made = Parser(prog="python -m dtron.data", description="Make and describe token files.")
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("prepare", help="text to OUT.bin, OUT.idx and OUT.tokenizer.json")
    add = make.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help=".jsonl, .json, .parquet, .arrow or .txt files, or folders",
    )
    add("--out", required=True, help="name of the files to write, without .bin and .idx")
    add(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json, or a folder with one (trained on the text)",
    )
    add(
        "--end-token",
        metavar="TOKEN",
        help="the token that ends a document (the tokenizer's eos_token)",
    )
    add(
        "--vocab",
        type=int,
        default=4096,
        metavar="N",
        help="words of the tokenizer, if it is trained (4096)",
    )
    add("--column", default="text", help="field or column with the text (text)")
    add("--workers", type=int, metavar="N", help="number of processes (one per core)")
    add("--overwrite", action="store_true", help="replace OUT's files")
    look = commands.add_parser("info", help="describe a pair of files")
    look.add_argument("path", help="the OUT of prepare")
    commands.add_parser("show", help="print samples of a run; takes the --data flags of train.py")
    return made


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "show":  # its flags are those of train.py
        return run_show(list(argv[1:]), Console(highlight=False))
    o = parser().parse_args(list(argv))
    return {"prepare": run_prepare, "info": run_info}[o.command](o, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
