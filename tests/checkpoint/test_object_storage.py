"""Checkpoints in an object store: the bits are those of a disk, a rank reads its ranges, and at
whatever moment a process dies, a reader sees a whole checkpoint."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from dtron import checkpoint
from dtron.checkpoint import AsyncSaver, ShardReader, files
from dtron.checkpoint.__main__ import main as inspect
from dtron.checkpoint.meta import META
from dtron.checkpoint.object_storage import ObjectPath, ObjectStorage, requests
from dtron.checkpoint.shards import Shard
from dtron.checkpoint.storage import any_path
from dtron.errors import UserError
from dtron.mesh import Layout
from tests.checkpoint.test_refused_checkpoints import SAME, SPEC, digests, fresh, used
from tests.helpers.texts import one_line

STATE = {"params.w": torch.arange(60.0).view(6, 10), "m.w": torch.ones(6, 10)}
HEAD = {"samples": 1, "updates": 1, "identity": {}}


@pytest.fixture
def store(tmp_path):
    """A place in an object store in memory."""
    return any_path(f"memory://{tmp_path.name}/runs/a")


def test_a_state_comes_back_to_the_bit(store, capsys):
    path = checkpoint.save(store, used(Layout()), SPEC, SAME)
    assert str(path) == f"{store}/checkpoints/step-00000007" and files.newest(store) == path
    state = checkpoint.load(path, fresh(Layout()), SPEC, SAME)
    assert digests(state) == digests(used(Layout())) != digests(fresh(Layout()))
    assert inspect(["inspect", str(store)]) == inspect(["inspect", str(path)]) == 0
    file = (path / next(iter(files.read_meta(path).files))).key
    path.storage.fs.pipe_file(file, path.storage.fs.cat_file(file)[:-1] + b"?")
    assert inspect(["inspect", str(store)]) == 1
    assert capsys.readouterr().out.count("damaged") == 1
    one_line(lambda: checkpoint.load(path, fresh(Layout()), SPEC, SAME), "its checksum is another")


def test_a_url_of_a_file_is_a_path():
    assert any_path("file:///a/b") == any_path("/a/b") == Path("/a/b")


def test_urls_that_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    one_line(lambda: any_path("gs://a/b"), "gs://a/b: needs a package", "gcsfs")
    one_line(lambda: any_path("s3://", "--checkpoint-store"), "--checkpoint-store s3://: has no")
    one_line(lambda: any_path("nothing://a/b"), "nothing://a/b: cannot be opened")


# ---- reads


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 99)), max_size=20),
    gap=st.integers(0, 30),
    largest=st.integers(1, 50),
)
def test_a_request_is_small_and_every_byte_is_in_one(sizes, gap, largest):
    """``sizes``: bytes to skip, and bytes to read."""
    ranges, at = [], 0
    for skipped, size in sizes:
        ranges.append((at + skipped, memoryview(bytearray(size))))
        at += skipped + size
    planned = list(requests(ranges, gap, largest))
    for request in planned:
        spans = [(first, first + len(memory)) for first, memory in request]
        assert spans[-1][1] - spans[0][0] <= largest
        assert all(0 <= b[0] - a[1] <= gap for a, b in zip(spans, spans[1:], strict=False))
    pieces = [piece for request in planned for piece in request]
    for first, memory in pieces:
        memory[:] = bytes((first + i) % 251 for i in range(len(memory)))
    for first, memory in ranges:
        assert bytes(memory) == bytes((first + i) % 251 for i in range(len(memory)))


class Counted(MemoryFileSystem):
    """Counts the bytes of the requests."""

    cachable = False
    read = 0

    def cat_file(self, path, start=None, end=None, **options):
        found = super().cat_file(path, start, end, **options)
        self.read += len(found)
        return found


def test_a_rank_reads_the_ranges_that_it_needs(store):
    big = torch.arange(2.0**20).view(1024, 1024)
    with AsyncSaver(store) as saver:
        saver.save(1, {"params.w": big}, HEAD)
    counted = Counted()
    path = ObjectPath(files.target(store, 1).key, ObjectStorage(counted, "memory"))
    meta = files.read_meta(path)
    counted.read = 0
    rows = Shard((1024, 1024), (512, 0), torch.empty(64, 1024))
    with ShardReader(path, meta) as reader:
        reader.read("params.w", rows)
    assert torch.equal(rows.local, big[512:576])
    assert 64 * 1024 * 4 <= counted.read < 64 * 1024 * 4 + 1000
    columns = Shard((1024, 1024), (0, 512), torch.empty(1024, 64))
    with ShardReader(path, meta) as reader:
        reader.read("params.w", columns)
    assert torch.equal(columns.local, big[:, 512:576])


# ---- a process that dies


class Dying(MemoryFileSystem):
    """Loses the connection after so many changes."""

    cachable = False

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def _change(self) -> None:
        if self.left == 0:
            raise ConnectionError("the connection is lost")
        self.left -= 1

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            self._change()
        return super()._open(path, mode, **options)

    def rm_file(self, path):
        self._change()
        super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path):
            self.rm_file(name)


class ListedLast(ObjectStorage):
    """A mutant: deletes ``meta.json`` after the other files."""

    def remove(self, checkpoint):
        for name in sorted(self._listed(checkpoint, "file"), key=lambda name: name == META):
            self.fs.rm_file((checkpoint / name).key)


class OneName(ObjectStorage):
    """A mutant: writes over the files of a checkpoint of the same step."""

    def file_name(self, rank):
        return f"rank-{rank:05d}-00000000.safetensors"


def whole_at_every_moment(name: str, kind: type[ObjectStorage], step: int) -> None:
    """Save step 2, and then another step, which fails at its first change, its second, and so on.

    ``step``: 2 replaces the checkpoint; 4 saves another one, and deletes the first."""
    for changes in count():
        fs = Dying(-1)
        place = ObjectPath(f"/{name}-{kind.__name__}-{step}-{changes}", kind(fs, "memory"))
        other = {key: x + 1 for key, x in STATE.items()}
        with AsyncSaver(place, keep=1) as saver:
            saver.save(2, STATE, HEAD)
        fs.left = changes
        saver = AsyncSaver(place, keep=1)
        saver.save(step, other, HEAD)
        saver.wait()
        ended = saver.failed is None and fs.left > 0
        fs.left = -1
        for found in files.whole(place):
            assert not files.damaged(found, files.read_meta(found)), changes
        read, rows = files.newest(place), Shard((6, 10), (0, 0), torch.empty(6, 10))
        with ShardReader(read, files.read_meta(read)) as reader:
            reader.read("params.w", rows)
        assert any(torch.equal(rows.local, x["params.w"]) for x in (STATE, other)), changes
        files.clear_parts(place)
        with AsyncSaver(place, keep=1) as saver:
            saver.save(step, other, HEAD)
        saved = files.target(place, step)
        left = {found.rpartition("/")[2] for found in fs.find(files.folder(place).key)}
        assert left == {META, *files.read_meta(saved).files}  # nothing of the failed saves
        if ended:
            assert changes > 2
            return


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_is_whole_or_absent_at_every_moment(tmp_path, step):
    whole_at_every_moment(tmp_path.name, ObjectStorage, step)


@pytest.mark.parametrize(("mutant", "step"), [(ListedLast, 4), (OneName, 2)])
def test_mutants_leave_a_checkpoint_that_is_not_whole(tmp_path, mutant, step):
    with pytest.raises((AssertionError, UserError)):
        whole_at_every_moment(tmp_path.name, mutant, step)


def test_what_a_run_did_not_write_is_not_deleted(store):
    fs, at = store.storage.fs, files.folder(store)
    fs.pipe_file((at / "step-00000003" / "notes.txt").key, b"mine")
    fs.pipe_file((at / "step-00000003" / "rank-00000-0123abcd.safetensors").key, b"half")
    files.clear_parts(store)
    names = [name.rpartition("/")[2] for name in fs.find(at.key)]
    assert names == ["notes.txt"]
    fs.pipe_file((at / "step-00000004" / META).key, b"of another program")
    saver = AsyncSaver(store)
    saver.save(4, STATE, HEAD)
    one_line(saver.close, "is there already, and is no checkpoint")
    assert fs.cat_file((at / "step-00000004" / META).key) == b"of another program"
