"""A stranger's tokenizer.json in the ``tokenizers`` library: what the library would not survive.

The library runs no code of a tokenizer.json. But some files make it panic (the Rust library behind
it stops with an error of its own kind, and prints lines), and others make it write text without
end: sixty normalizers that double each letter. `read_tokenizer` refuses both, and `library` makes
one line of an error that a text brings about later.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec
from tokenizers import Tokenizer

from dtron.data.files import one_line
from dtron.errors import UserError
from dtron.json_files import read_bytes

LARGEST = 1 << 28  # bytes; published files have less than a quarter of it
_MOST_GROWTH = 256  # times, of a text in one part of a tokenizer
_MOST_STEPS = 64  # in one part of a tokenizer
_PROBES = ("", "aa bb", " a\tB1 é😀\r\n\n<s> ~")


class _Parts(msgspec.Struct):
    """The parts of a tokenizer that may lengthen a text."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


@contextlib.contextmanager
def library(what: str, remedy: str) -> Iterator[None]:
    """Make one line of every error of the library.

    In the main thread, what a panic prints is hidden. A thread that reads data while the run trains
    would hide messages of other threads too.

    ``what``: says what failed. The error follows in parentheses."""
    main = threading.current_thread() is threading.main_thread()
    try:
        with _quiet() if main else contextlib.nullcontext():
            yield
    except BaseException as error:
        if isinstance(error, UserError) or not (isinstance(error, Exception) or _panic(error)):
            raise
        raise UserError(f"{what} ({one_line(error)}); {remedy}") from error


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises an exception, of this or the library's own kinds, for a file
    that is none, that is too large, or that the library would not survive."""
    data = read_bytes(file, LARGEST)
    try:
        with _quiet():
            tokenizer = Tokenizer.from_buffer(data)
            _check_growth(data)
            for text in _PROBES:
                _probe(tokenizer, text)
    except BaseException as error:
        if not _panic(error):
            raise
        raise ValueError(str(error)) from error
    return tokenizer


def _probe(tokenizer: Tokenizer, text: str) -> None:
    """Let the library panic now, if it does so with any text. It may lack a token for this text."""
    try:
        tokenizer.encode(text, add_special_tokens=False)
        tokenizer.decode(tokenizer.encode(text).ids[:64])
    except Exception:
        return


def _panic(error: BaseException) -> bool:
    """Whether the Rust library stopped. Its error is no ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what a panic prints: the library writes to descriptor 2. Lines of Python, of any thread,
    go on to where descriptor 2 led."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    python = sys.stderr
    try:
        if python is not None and _descriptor(python) == 2:
            sys.stderr = os.fdopen(
                kept, "w", encoding=python.encoding, errors=python.errors, closefd=False
            )
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        sys.stderr = python
        os.close(kept)


def _descriptor(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return -1


def _check_growth(data: bytes) -> None:
    """Raise UserError for a tokenizer whose parts may lengthen a text without bound."""
    parts = msgspec.json.decode(data, type=_Parts)
    for name in parts.__struct_fields__:
        factors = list(_factors(getattr(parts, name)))
        if len(factors) > _MOST_STEPS or math.prod(factors) > _MOST_GROWTH:
            raise UserError(
                f"its {name} has {len(factors)} steps and may make a text {math.prod(factors):.0f} "
                f"times as long; at most {_MOST_STEPS} steps and {_MOST_GROWTH} times are allowed"
            )


def _factors(part: Any) -> Iterator[float]:
    """Yield for each step how much longer it may make a text."""
    if isinstance(part, list):
        for entry in part:
            yield from _factors(entry)
    if not isinstance(part, dict):
        return
    match part:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            yield max(1.0, len(new) / max(1, len(old)))
        case {"type": "Replace", "content": str(new)}:  # a regular expression
            yield max(1.0, len(new))
        case {"type": "ByteLevel"} | {"type": "Precompiled"}:
            yield 2.0
        case {"type": "TemplateProcessing", "single": list(pieces)}:
            yield max(1.0, sum("Sequence" in piece for piece in pieces))
        case {"type": _}:
            yield 1.0
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        yield from _factors(part.get(name))
