"""Readers of one column of a file: one reader for each format, chosen by the suffix.

    .jsonl             one object per line
    .json              one object per line, or one array of objects
    .parquet, .arrow   columns
    .txt               one row: the whole file

The readers of `datasets` are not used, so that an error can name the line and the file. Files may
be compressed (files.py). Left out: columns inside columns.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from dtron.data.files import COLUMNS, Growth, one_line, opened, suffix_of
from dtron.errors import UserError

LONGEST_LINE = 1 << 31  # bytes; a file of zeros is one line without end


def texts(file: Path, column: str) -> Iterator[str]:
    """Yield the non-empty strings of a column. Raises UserError for a value that is no string."""
    if suffix_of(file) in COLUMNS:
        for kind, columns in _columns(file, column):
            if not _is_text(kind):
                raise _not_text(repr(str(file)), column, str(kind))
            yield from (text for text in columns[column].to_pylist() if text)
        return
    yield from _strings(cells(file, column), column)


def _is_text(kind: Any) -> bool:
    """Whether a pyarrow type is one of strings, or a dictionary of strings."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    views = types.is_string_view(kind)  # polars writes them
    return views or types.is_string(kind) or types.is_large_string(kind)


def texts_of_lines(file: Path, lines: Iterable[bytes], first: int, column: str) -> Iterator[str]:
    """Yield the texts of some lines of a .jsonl file.

    ``first``: the number of the first line, from 1."""
    rows = _objects(file, _line_rows(file, lines, first), column)
    return _strings(((where, row[column]) for where, row in rows), column)


def _strings(found: Iterable[tuple[str, Any]], column: str) -> Iterator[str]:
    for where, text in found:
        if text is not None and not isinstance(text, str):
            raise _not_text(where, column, type(text).__name__)
        if text:
            try:
                text.encode()
            except UnicodeError as error:
                lone = (
                    ascii(text[error.start])[1:-1] if isinstance(error, UnicodeEncodeError) else ""
                )
                raise UserError(
                    f"{where} has {lone}, half of a surrogate pair, which is valid JSON and no "
                    "text; write the whole pair, or drop it"
                ) from error
            yield text


def cells(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yield the place of each row (for error messages) and its value in the column."""
    yield from ((where, row[column]) for where, row in records(file, column))


def records(
    file: Path, column: str, optional: tuple[str, ...] = (), flag: str = "--data.column"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row (for error messages), and its values by column.

    ``optional``: more columns, which a file or a row may lack.
    ``flag``: the flag that names the column, for errors."""
    match suffix_of(file):
        case ".jsonl" | ".json":
            yield from _objects(file, _json_rows(file), column, flag)
        case ".parquet" | ".arrow":
            number = 0
            for _, columns in _columns(file, column, optional, flag):
                for values in zip(*(c.to_pylist() for c in columns.values()), strict=True):
                    number += 1
                    yield f"{str(file)!r} row {number}", dict(zip(columns, values, strict=True))
        case _:  # read as bytes, because text mode would change line endings
            with opened(file) as whole:
                yield repr(str(file)), {column: _decoded(file, whole.read())}


def _objects(
    file: Path, found: Iterable[tuple[str, Any]], column: str, flag: str = "--data.column"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows, each an object that has the column."""
    for where, row in found:
        where = f"{str(file)!r} {where}"
        if not isinstance(row, dict):
            raise _not_row(where, column, row)
        if column not in row:
            raise missing(where, column, list(row), flag)
        yield where, row


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield one value per line. If a .json file starts with "[", yield the values of its array."""
    array = suffix_of(file) == ".json" and _begins_array(file)
    with opened(file) as lines:
        if not array:
            yield from _line_rows(file, lines_of(file, lines), 1)
            return
        rows = _parse(_decoded(file, lines.read()), repr(str(file)))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def lines_of(file: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file. Raises UserError for a line without end."""
    for line in iter(partial(stream.readline, LONGEST_LINE + 1), b""):
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{str(file)!r} has a line of more than {LONGEST_LINE} bytes; write one object a "
                "line"
            )
        yield line


def _begins_array(file: Path) -> bool:
    with opened(file) as data:  # not every decompressor can seek, so the reader opens it again
        return data.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_rows(file: Path, lines: Iterable[bytes], first: int) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=first):
        text = _decoded(file, line, number)
        if text.strip():
            yield f"line {number}", _parse(text, f"{str(file)!r} line {number}")


def _decoded(file: Path, data: bytes, line: int = 1) -> str:
    """Decode UTF-8. Raises UserError with the line.

    ``line``: the number of the first line of ``data``."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise _not_utf8(f"{str(file)!r} line {number}", error) from error


def _not_utf8(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} is not UTF-8 text ({one_line(error)}); convert the file, for example with "
        "`iconv -t UTF-8`, or leave it out of --data.path"
    )


def _parse(source: str, where: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is malformed JSON ({error}); write one object a line, or one array of "
            "objects in a .json file"
        ) from error


def _columns(
    file: Path, column: str, optional: tuple[str, ...] = (), flag: str = "--data.column"
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield batches: the type of the column, and the columns by name. The types and the columns are
    pyarrow objects.

    ``optional``: more columns, which the file may lack."""
    from pyarrow import ipc, parquet

    growth = Growth(file)

    def batch_of(batch: Any) -> tuple[Any, dict[str, Any]]:
        if suffix_of(file) == ".arrow":  # nothing has looked at its numbers yet
            batch.validate(full=True)
        growth.add(sum(map(_text_size, batch.columns)))
        names = (column, *(name for name in optional if name in batch.schema.names))
        return batch.column(column).type, {name: batch.column(name) for name in names}

    # Opened here and not by pyarrow, so that a missing permission is not reported as damage.
    with file.open("rb") as source:
        if suffix_of(file) == ".parquet":
            with _reading(file, "Parquet"):
                table = parquet.ParquetFile(source)
                present = table.schema_arrow.names
                _has(file, table.schema_arrow, column, flag)
                names = [column, *(name for name in optional if name in present)]
                yield from map(batch_of, table.iter_batches(batch_size=256, columns=names))
            return
        with _reading(file, "Arrow"):
            # The random-access format begins with this magic. `datasets` writes the stream format.
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                table = ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                batches = table = ipc.open_stream(source)
            _has(file, table.schema, column, flag)
            yield from map(batch_of, batches)


def _text_size(column: Any) -> int:
    """Return the bytes of a pyarrow column. A word of a dictionary counts wherever it stands."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type) and _is_text(column.type):
        sizes = compute.binary_length(column.dictionary.cast("large_string"))
        return compute.sum(sizes.take(column.indices)).as_py() or 0
    return column.nbytes


def least_size(file: Path, column: str) -> int:
    """Return how many bytes of text a file has at least, as far as this is known before it is read:
    a .parquet file says how large its columns are. 0 for a file that cannot be read."""
    from pyarrow import ArrowException, parquet

    try:
        if suffix_of(file) != ".parquet":
            return file.stat().st_size
        with file.open("rb") as source:
            meta = parquet.read_metadata(source)
    except (OSError, ArrowException):  # the reader reports it
        return 0
    groups = (meta.row_group(i) for i in range(meta.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Convert errors in reading a file into UserErrors with a remedy."""
    try:
        yield
    except UnicodeError as error:
        raise _not_utf8(repr(str(file)), error) from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(
            f"{str(file)!r} cannot be read ({reason}); allow this user to read it, or leave it out "
            "of --data.path"
        ) from error


@contextmanager
def _reading(file: Path, name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{str(file)!r} is not a readable {name} file ({one_line(error)}); write it again "
            "or leave it out of --data.path"
        ) from error


def _has(file: Path, schema: Any, column: str, flag: str) -> None:
    if column not in schema.names:
        raise missing(repr(str(file)), column, schema.names, flag)
    if schema.names.count(column) > 1:
        raise UserError(
            f"{str(file)!r} has several columns {column!r}; give each column a name of its own"
        )


def _not_row(where: str, column: str, value: Any) -> UserError:
    return UserError(
        f"{where} is {str(value)[:40]!r}, and every row must be an object; write it as "
        f'{{"{column}": "..."}}, with --data.column naming the text'
    )


def missing(where: str, column: str, present: list[str], flag: str) -> UserError:
    """Return the error of a row without a column.

    ``flag``: the flag that names the column."""
    names = ", ".join(map(repr, present[:20])) or "none"
    return UserError(f"{where} has no column {column!r}; set {flag} to one that is there: {names}")


def _not_text(where: str, column: str, kind: str) -> UserError:
    return UserError(
        f"{where} holds {kind} in the column {column!r}, and documents must be strings; set "
        "--data.column to the column with the text"
    )
