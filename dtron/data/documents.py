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
import shutil
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtron.data.cache import cache_dir, digest, unwritable
from dtron.data.files import GIVE, find_files
from dtron.data.formats import texts, understood
from dtron.errors import UserError

if TYPE_CHECKING:
    import datasets

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
        rows = _rows(**self._reading) if self.streaming else self.dataset
        return (row["text"] for row in rows)

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """All documents, one a row, in the column "text"."""
        import pyarrow

        folder = self.cache / "datasets" / self.key
        try:
            return self._generate(folder)
        except (OSError, pyarrow.ArrowException):
            # Errors in the text are UserErrors, so this is a damaged cache of `datasets`.
            shutil.rmtree(folder, ignore_errors=True)
        try:
            return self._generate(folder)
        except OSError as error:
            raise unwritable(folder, error) from error

    @property
    def _reading(self) -> dict[str, Any]:
        """The arguments of `_rows`."""
        where = "Python's standard library" if self.path is None else f"--data.path {self.path!r}"
        # A tuple, because `datasets` would split a list into shards.
        return {
            "files": tuple(self.files),
            "column": self.column,
            "where": where,
            "strict": self.path is not None,
        }

    def _generate(self, folder: Path) -> "datasets.Dataset":
        datasets = _import_datasets()
        try:
            return datasets.Dataset.from_generator(
                _rows,
                # large_string: 64-bit offsets, since many long documents together pass 2 GiB.
                features=datasets.Features({"text": datasets.Value("large_string")}),
                cache_dir=str(folder),
                gen_kwargs=self._reading,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, (UserError, OSError, MemoryError)):
                raise error.__cause__ from None  # from _rows with a full message, or from writing
            raise


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


# ---------------------------------------------------------------------------- reading files


def _rows(
    files: tuple[Path, ...], column: str, where: str, strict: bool
) -> Iterator[dict[str, str]]:
    """Yield the rows that `datasets` stores. `strict`: a file that is not UTF-8 is an error;
    otherwise it is skipped."""
    empty = True
    for file in files:
        try:
            with understood(file):
                for text in texts(file, column):
                    if text.strip():
                        empty = False
                        yield {"text": text}
        except ValueError as error:
            if strict or not isinstance(error.__cause__, UnicodeError):
                raise
    if empty:
        raise UserError(f"{where} holds no text at all; {GIVE} with some text in it")
