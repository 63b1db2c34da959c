"""Documents of text: from a file, a folder, or by default the source code of Python's own library.

The default corpus needs no download: every machine that can run dtron has some ten megabytes of
well-written Python on its disk. Otherwise give a .txt file (one document), a .jsonl / .json /
.parquet / .arrow file (one document a row), or a folder of such files. The documents become a
`datasets.Dataset`, which is an Arrow file mapped into memory, so a corpus may be larger than RAM.
Or the documents are streamed: they are read from their files on each iteration, which takes no disk
space and no time before the first document.

`Documents` delays reading. It lists the files and computes a key from them at once, which is cheap.
It reads text only on iteration. A start whose tokens are cached under this key never imports
`datasets`.

`files` finds the files, and `formats` parses them. Left out: the Hub and every other remote source
(download first). Rows without text (null, empty or only white space) are not documents and are
skipped.
"""

import os
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtron.data.cache import SealedFile, cache_dir, cached, check_room, digest, read_sealed
from dtron.data.files import GIVE, find_files, grouped
from dtron.data.formats import least_size, texts, understood
from dtron.errors import UserError

if TYPE_CHECKING:
    import datasets

_BATCH = 1 << 20  # characters

# Installed packages and test suites differ from one installation to the next; the other files
# hardly differ.
_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
}


class Documents:
    """The documents at `path`, each a string, in an order that is the same in every process.

    `skipped` is a line that names the files of the folder that are not read.
    `key` names their content. For the default corpus the key is a hash of the files' bytes. A
    user's files may be too large to read at each start, so their key is a hash of their absolute
    paths, sizes and modification times."""

    def __init__(
        self,
        path: str | None = None,
        column: str = "text",
        cache: Path | None = None,
        streaming: bool = False,
    ) -> None:
        self.path, self.column, self.streaming = path, column, streaming
        self.cache = cache if cache is not None else cache_dir()
        if path is None:
            self.files, self.skipped = _library_files(), None
        else:
            found = find_files(path)
            self.files, self.skipped = found.files, found.skipped_line(path)

    @cached_property
    def key(self) -> str:
        if self.path is None:
            root = _library()
            parts = [
                part
                for f in self.files
                for part in (f.relative_to(root).as_posix(), f.read_bytes())
            ]
            return digest(["library", *parts])
        stats = [(file.absolute(), file.stat()) for file in self.files]
        return digest(
            [self.column, *(f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in stats)]
        )

    def __iter__(self) -> Iterator[str]:
        return self._rows() if self.streaming else (row["text"] for row in self.dataset)

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """All documents, one a row, in the column "text"."""
        target = self.cache / f"documents-{self.key}.arrow"
        return cached(target, _read_arrow, self._write_arrow)

    def _write_arrow(self, file: Path) -> None:
        """Write the documents as an Arrow stream, sealed: a cached text is compared with its
        CRC-32, as all cached files are."""
        import pyarrow

        check_room(file.parent, sum(least_size(f, self.column) for f in self.files), self._where)
        # large_string: 64-bit offsets, since many long documents together pass 2 GiB.
        schema = pyarrow.schema([("text", pyarrow.large_string())])
        with SealedFile(file) as out, pyarrow.ipc.new_stream(out, schema) as stream:
            for batch in grouped(self._rows(), len, _BATCH):
                stream.write_batch(
                    pyarrow.record_batch([pyarrow.array(batch, schema[0].type)], schema=schema)
                )

    @property
    def _where(self) -> str:
        return "Python's standard library" if self.path is None else f"--data.path {self.path!r}"

    def _rows(self) -> Iterator[str]:
        """Read the documents from their files."""
        empty = True
        for file in self.files:
            try:
                with understood(file):
                    for text in texts(file, self.column):
                        if text.strip():
                            empty = False
                            yield text
            except ValueError as error:
                # Of the library's files, those that are not UTF-8 are passed over.
                if self.path is not None or not isinstance(error.__cause__, UnicodeError):
                    raise
        if empty:
            raise UserError(f"{self._where} holds no text at all; {GIVE} with some text in it")


def _read_arrow(file: Path) -> "datasets.Dataset | None":
    import pyarrow

    content = read_sealed(file)
    if content is None:
        return None
    return _import_datasets().Dataset.from_buffer(pyarrow.py_buffer(content))


def documents(
    path: str | None = None, column: str = "text", cache: Path | None = None
) -> "datasets.Dataset":
    """Return the documents at `path` as a `datasets.Dataset` with the column "text". None is the
    default corpus."""
    return Documents(path, column, cache).dataset


def _import_datasets() -> Any:
    # Nothing here uses the network, and these variables keep `datasets` from using it. `datasets`
    # reads them once, on import. Variables that the user has set stay unchanged. Libraries that are
    # imported later are not affected.
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    ours = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "1"))
    try:
        import datasets
    finally:
        for name in ours:
            del os.environ[name]

    datasets.disable_progress_bars()
    return datasets


# ---------------------------------------------------------------------------- listing files


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_files() -> list[Path]:
    root, found = _library(), []
    for folder, folders, names in os.walk(root):
        # config-* and _sysconfigdata* hold the paths and flags of this interpreter's own build.
        folders[:] = [
            name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")
        ]
        kept = (n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata"))
        found += [Path(folder, name) for name in kept]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())
