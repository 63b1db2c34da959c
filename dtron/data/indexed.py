"""Token files in Megatron's indexed format: ``corpus.bin`` holds tokens, ``corpus.idx`` the index.

The .bin holds only token ids, one sequence after the other. The .idx, all of it little-endian:

    bytes       type      content
    0           9 bytes   MMIDIDX\\0\\0
    9           u64       version, 1
    17          u8        type of a token: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    18          u64       S, number of sequences
    26          u64       D, documents + 1
    34          i32[S]    tokens of each sequence
    then        i64[S]    start of each sequence in the .bin, in bytes
    then        i64[D]    first sequence of each document, and S at the end

A sequence begins where the one before it ends, and the .bin has no other bytes. A document has one
sequence, unless its sentences were stored separately. Both files are mapped into
memory. Opening reads the .idx alone, and pages of the .bin are read from disk on access. So a
corpus may be as large as the disk, and all processes of a host share one copy. Left out: remote
files. Also left out: writing the bytes that some multimodal files have after the last document
(reading skips them).
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np

from dtron.data.files import expand
from dtron.data.mapped import check_uncut, map_file
from dtron.errors import UserError

MAGIC, VERSION, HEADER = b"MMIDIDX\0\0", 1, struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
NAMES = {1: "u8", 2: "i8", 3: "i16", 4: "i32", 5: "i64", 6: "f64", 7: "f32", 8: "u16"}

_FOLDERS = ("", "..")  # names that no file has: of a root, of ".", and of the folder above
_AGAIN = (
    "make it again with `python -m dtron.data prepare`, or copy it again from where it was made"
)


def token_dtype(vocab: int) -> np.dtype:
    """Return the type for ids of a vocabulary: u16 below 65,500 words, else i32."""
    return np.dtype(DTYPES[8 if vocab < 65500 else 4])


def prefix_of(path: str | Path) -> Path | None:
    """Return ``corpus`` for ``corpus``, ``corpus.bin`` or ``corpus.idx`` if one of the two files
    exists, else None."""
    file = expand(path)
    if file.name in _FOLDERS:
        return None
    prefix = file.with_suffix("") if file.suffix in (".bin", ".idx") else file
    return prefix if any(_beside(prefix, suffix).is_file() for suffix in (".bin", ".idx")) else None


def _beside(prefix: Path, suffix: str) -> Path:
    if prefix.name in _FOLDERS:
        raise UserError(
            f"{str(prefix)!r} is a folder; give the name of files in it, without {suffix}"
        )
    return prefix.with_name(prefix.name + suffix)


class Indexed:
    """An open pair of files. All arrays are read-only.

    ``lengths``: [S]; tokens of each sequence.
    ``starts``: [S]; the start of each sequence in ``tokens``.
    ``documents``: [D]; the first sequence of each document.

    Raises UserError for a file that is missing, truncated or too long, or has impossible values."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = expand(prefix)
        self.idx, self.bin = _beside(self.prefix, ".idx"), _beside(self.prefix, ".bin")
        index, data = self._map(self.idx, self.bin), self._map(self.bin, self.idx)
        self.code, sequences, documents = self._header(index[: HEADER.size].tobytes())
        self.dtype = np.dtype(DTYPES[self.code])
        ends = HEADER.size + np.cumsum([4 * sequences, 8 * sequences, 8 * documents])
        if len(index) not in (ends[-1], ends[-1] + sequences):  # multimodal: a byte a sequence
            state = "cut short" if len(index) < ends[-1] else "too long"
            raise self._bad(
                self.idx,
                f"is {state}: {len(index)} bytes, where {sequences} sequences and {documents} "
                f"bounds of documents take {ends[-1]}",
            )
        self.lengths = index[HEADER.size : ends[0]].view("<i4")
        self.documents = index[ends[1] : ends[2]].view("<i8")
        self._check()
        step, stops = self.dtype.itemsize, np.cumsum(self.lengths, dtype=np.int64)
        total = int(stops[-1]) if sequences else 0
        if not total:
            raise self._bad(self.idx, "lists no token at all")
        self.starts = stops - self.lengths
        if (index[ends[0] : ends[1]].view("<i8") != self.starts * step).any():
            raise self._bad(
                self.idx,
                "is damaged: it has a sequence that does not begin where the one before it ends",
            )
        if len(data) != total * step:
            state = "cut short" if len(data) < total * step else "too long"
            raise self._bad(
                self.bin, f"is {state}: {len(data)} bytes, where its .idx says {total * step}"
            )
        self.tokens = data.view(self.dtype)

    def check_uncut(self) -> None:
        """Raise UserError if one of the two files has become shorter."""
        check_uncut(self.lengths)
        check_uncut(self.tokens)

    @staticmethod
    def _map(file: Path, other: Path) -> np.ndarray:
        try:
            return map_file(file)
        except FileNotFoundError as error:
            raise UserError(
                f"{str(file)!r} does not exist, beside {str(other)!r}; {_AGAIN}"
            ) from error
        except OSError as error:
            raise UserError(
                f"{str(file)!r} cannot be read ({error.strerror}); give a regular file that this "
                "user may read"
            ) from error

    def _header(self, data: bytes) -> tuple[int, int, int]:
        if not data.startswith(MAGIC[: len(data)]) or not data:
            raise self._bad(
                self.idx, f"is no index of tokens: it begins with {data[:9]!r}, not {MAGIC!r}"
            )
        if len(data) < HEADER.size:
            raise self._bad(
                self.idx, f"is cut short: {len(data)} bytes, and the header alone has {HEADER.size}"
            )
        _, version, code, sequences, documents = HEADER.unpack(data)
        if version != VERSION:
            raise self._bad(
                self.idx, f"has version {version}, and {VERSION} is the one that is known"
            )
        if code not in DTYPES:
            raise self._bad(self.idx, f"has tokens of type {code}, and only 1 to 8 are known")
        if max(sequences, documents) > 1 << 56:  # no sum below overflows
            raise self._bad(
                self.idx, f"speaks of {max(sequences, documents)} sequences, which cannot be"
            )
        return code, sequences, documents

    def _check(self) -> None:
        wrong = None
        documents = self.documents
        if not len(documents):
            wrong = "has no documents"
        elif documents[0] != 0 or documents[-1] != len(self.lengths):
            wrong = f"has documents that do not end with its {len(self.lengths)} sequences"
        elif (documents[1:] < documents[:-1]).any():
            wrong = "has a document that begins before the one ahead of it"
        elif len(self.lengths) and self.lengths.min() < 0:
            wrong = "has a sequence of negative length"
        if wrong:
            raise self._bad(self.idx, f"is damaged: it {wrong}")

    @staticmethod
    def _bad(file: Path, what: str) -> UserError:
        return UserError(f"{str(file)!r} {what}; {_AGAIN}")

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    def sequence(self, i: int) -> np.ndarray:
        """Return the tokens of sequence i, a view of the mapped file."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]


class Writer:
    """Writes a pair of files, as a context: ``with Writer("corpus", token_dtype(vocab)) as out``.

    The files are written under temporary names. They are moved into place when the block ends
    without an error, the .idx last. So an existing .idx always has a complete .bin. Raises
    UserError if one of the two files exists (unless ``overwrite``), or if they cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str, overwrite: bool = False) -> None:
        self.prefix, self.dtype = expand(prefix), np.dtype(dtype)
        self.finals = [_beside(self.prefix, suffix) for suffix in (".bin", ".idx")]
        for file in self.finals:
            if not overwrite and os.path.lexists(file):
                raise UserError(
                    f"--out {str(prefix)!r}: {str(file)!r} exists; choose another name, or replace "
                    "it with --overwrite"
                )
        tag = uuid4().hex
        self._parts = [file.with_name(f"{file.name}.{tag}.tmp") for file in self.finals]
        self.lengths, self.documents = array("i"), array("q", [0])

    def __enter__(self) -> Writer:
        with self._writing():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._parts[0].open("wb")
        return self

    def document(self, tokens: np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Add a document of one sequence, or of several sequences with these lengths. The lengths
        must sum to the length of ``tokens``."""
        lengths = [len(tokens)] if lengths is None else lengths
        if sum(lengths) != len(tokens):
            raise UserError(
                f"sequences of {sum(lengths)} tokens in a document of {len(tokens)}; make them "
                "equal"
            )
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        if limits and len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise UserError(
                f"a token id {tokens.min()} or {tokens.max()} is not in {self.dtype}; use a wider "
                "type, or the tokenizer that the vocabulary belongs to"
            )
        self._write(np.asarray(tokens, self.dtype).tobytes())
        self.lengths.extend(lengths)
        self.documents.append(len(self.lengths))

    def documents_of(self, data: bytes, lengths: np.ndarray) -> None:
        """Add several documents of one sequence each. ``data``: their tokens as bytes of
        ``dtype``."""
        self._write(data)
        first = len(self.lengths)
        self.lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.documents.extend(range(first + 1, len(self.lengths) + 1))

    def _write(self, data: bytes) -> None:
        with self._writing():
            self._file.write(data)

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with self._writing():
                self._file.close()
                if kind is None:
                    self._finish()
        finally:
            for part in self._parts:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def _finish(self) -> None:
        lengths = np.frombuffer(self.lengths, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        with self._parts[1].open("wb") as file:
            code = CODES[self.dtype]
            file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self.documents)))
            file.write(lengths.astype("<i4").tobytes())
            file.write(offsets.astype("<i8").tobytes())
            file.write(np.frombuffer(self.documents, np.int64).astype("<i8").tobytes())
        # Without fsync, a crash of the host could leave a file name without the written blocks.
        for part in self._parts:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        self.finals[1].unlink(missing_ok=True)  # an old .idx must never stand beside a new .bin
        for part, final in zip(self._parts, self.finals, strict=True):
            os.replace(part, final)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out {str(self.prefix)!r}: cannot be written ({error.strerror or error}); free "
                "space, or choose another place"
            ) from error
