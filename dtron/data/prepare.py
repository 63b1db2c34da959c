"""Makes indexed token files from text, on all CPU cores: ``python -m dtron.data prepare``.

Tokenisation is CPU work, and documents do not depend on each other. The main process reads files in
blocks of about a megabyte. The blocks of a .jsonl file are raw lines that are not parsed there. The
main process hands each block to a worker process and writes the results in the order of the
documents, so the files are the same for any number of workers. A worker parses a block, encodes its
documents as one batch, and returns the bytes to write. So two bytes a token pass between processes,
and not a list of Python integers. Few blocks are in flight at once, and memory holds twelve bytes a
document, whatever the size of the corpus.

Documents and tokens are the same as in ``dtron.data.tokenization``: rows without text are skipped,
every document ends with the tokenizer's end token, and special tokens that are spelled out are
plain text.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Tokenizer

from dtron.data.files import is_compressed, opened, suffix_of
from dtron.data.formats import lines_of, texts, texts_of_lines, understood
from dtron.data.indexed import Writer, token_dtype
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import encoded, encoder_of, vocab_of
from dtron.errors import UserError

BLOCK = 1 << 20  # bytes or characters

# A file, the number of the block's first line, and lines. Or a file, 0, and documents.
Block = tuple[Path, int, list[bytes] | list[str]]


@dataclass(frozen=True)
class Done:
    """Size and time of a finished preparation."""

    documents: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    out: str,
    column: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    end: int | None = None,
) -> Done:
    """Write ``out.bin`` and ``out.idx`` from the documents of ``files``.

    ``end``: the token that ends each document; None: the token that `end_id` finds in the
    vocabulary.
    ``progress``: called with the bytes read and the tokens written so far.

    Raises UserError if something cannot be read or written. Then no file is left."""
    dtype = token_dtype(vocab_of(tokenizer))
    end = end_id(tokenizer) if end is None else end
    if end is None:
        raise UserError(
            "the tokenizer has no token that ends a document, so documents would run into each "
            "other; name one of its tokens by --end-token"
        )
    workers = workers or _cores()
    start, tokens, read = time.perf_counter(), 0, 0
    with Writer(out, dtype, overwrite) as writer:
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), _start, (tokenizer.to_str(), end, column, dtype.str)
        )
        try:
            for size, future in _ahead(pool, _blocks(files, column), 2 * workers):
                data, lengths = _result(future)
                writer.documents_of(data, lengths)
                tokens, read = tokens + int(lengths.sum()), read + size
                if progress is not None:
                    progress(read, tokens)
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers {workers}: a worker process was ended, for lack of memory it may be; "
                "use fewer"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if not tokens:
            raise UserError(
                f"{', '.join(map(str, files[:3]))}: holds no text at all; give files with some"
            )
    return Done(len(writer.documents) - 1, tokens, time.perf_counter() - start)


def _cores() -> int:
    """Return the number of CPU cores that this process may use, if the system reports it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(files: list[Path], column: str) -> Iterator[tuple[int, Block]]:
    """Yield blocks of work, each with the number of bytes of its file that it covers."""
    for file in files:
        with understood(file):
            if suffix_of(file) == ".jsonl":
                packed = is_compressed(file)  # then the share of the file that is read is not known
                with opened(file) as lines:
                    number, size, some = 1, 0, []
                    for line in chain(lines_of(file, lines), [b""]):  # empty: the end
                        some.append(line)
                        size += len(line)
                        if size >= BLOCK or not line:
                            yield 0 if packed else size, (file, number, some)
                            number, size, some = number + len(some), 0, []
                if packed:
                    yield file.stat().st_size, (file, number, [])
                continue
            docs: list[str] = []
            size = 0
            for text in texts(file, column):
                docs.append(text)
                size += len(text)
                if size >= BLOCK:
                    yield 0, (file, 0, docs)
                    docs, size = [], 0
            yield file.stat().st_size, (file, 0, docs)


def _ahead(
    pool: ProcessPoolExecutor, blocks: Iterable[tuple[int, Block]], most: int
) -> Iterator[tuple[int, Future]]:
    """Yield the blocks' futures in order. At most ``most`` of them are in flight at once."""
    waiting: deque[tuple[int, Future]] = deque()
    for size, block in blocks:
        waiting.append((size, pool.submit(_encode, block)))
        if len(waiting) >= most:
            yield waiting.popleft()
    yield from waiting


def _result(future: Future) -> tuple[bytes, np.ndarray]:
    result = future.result()
    if isinstance(result, str):  # an error message
        raise UserError(result)
    return result


# ---------------------------------------------------------------------------- in a worker

_worker: tuple[Tokenizer, int, str, np.dtype]


def _start(tokenizer: str, end: int, column: str, dtype: str) -> None:
    global _worker  # every block needs these values; they are sent once per process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores already
    _worker = encoder_of(tokenizer), end, column, np.dtype(dtype)


def _encode(block: Block) -> tuple[bytes, np.ndarray] | str:
    """Return the tokens of a block's documents as bytes, and the length of each document; or the
    error message."""
    encoder, end, column, dtype = _worker
    file, first, rows = block
    try:
        with understood(file):
            if first:
                docs = texts_of_lines(file, cast("list[bytes]", rows), first, column)
            else:
                docs = cast("list[str]", rows)
            docs = [text for text in docs if text.strip()]
        parts, lengths, length = [], [], 0
        for ids, last in encoded(docs, encoder, end, dtype):
            parts.append(ids.tobytes())
            length += len(ids)
            if last:
                lengths.append(length)
                length = 0
    except ValueError as error:
        return str(error)
    return b"".join(parts), np.array(lengths, np.int32)
