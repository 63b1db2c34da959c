"""The format of checkpoints: nothing in it is executed, no bit changes unseen, anybody can read it,
and no folder is deleted that this program has not named."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron import checkpoint
from dtron.checkpoint import files
from dtron.checkpoint.__main__ import main as command
from dtron.checkpoint.local_storage import describe
from dtron.checkpoint.meta import META, Part, decode_meta, encode_meta
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.tree import flat
from tests.checkpoint.test_refused_checkpoints import SAME, SPEC, digests, fresh, saved, used
from tests.helpers.checkpoints import with_public_tools
from tests.helpers.paths import ROOT
from tests.helpers.texts import one_line


def loaded(path: Path) -> checkpoint.TrainState:
    return checkpoint.load(path, fresh(Layout()), SPEC, SAME)


def test_public_tools_read_it(tmp_path):
    got = with_public_tools(saved(tmp_path))
    state = used(Layout())
    want = dict(zip((f"params.{w.path}" for w in flat(SPEC)), flat(state.params), strict=True))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(got) == 3 * len(want)


# ---- nothing is executed


def test_no_code_of_the_package_unpickles():
    """Only the command that converts an older format does, and it is imported by that command
    alone."""
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    calls = {"torch.load", "pickle.load", "pickle.loads", "np.load", "dcp.load"}
    found = set()
    for path in (ROOT / "dtron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] in banned or name.startswith("torch.distributed.checkpoint"):
                    found.add((path.name, name))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                safe = any(
                    k.arg == "allow_pickle" and k.value.value is False for k in node.keywords
                )
                if not safe:
                    found.add((path.name, ast.unparse(node.func)))
    assert {file for file, _ in found} == {"convert.py"}
    users = [
        p.name for p in (ROOT / "dtron").rglob("*.py") if "checkpoint.convert" in p.read_text()
    ]
    assert users == ["__main__.py"]


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", [".metadata", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_read(tmp_path, name):
    """As a listed file with right size and checksum, and as a file that is not listed."""
    path, target = saved(tmp_path), tmp_path / "executed"
    (path / name).write_bytes(pickle.dumps(Attack(target)))
    meta = files.read_meta(path) if name == "rank-00001.safetensors" else None
    if meta is None:
        meta = decode_meta((path / META).read_bytes(), path)
        meta = with_files(meta, {**meta.files, name: describe(path / name)})
        (path / META).write_bytes(encode_meta(meta))
    command(["inspect", str(path)])
    if name == "rank-00000.safetensors":
        one_line(lambda: loaded(path), name, "no safetensors file")
    else:
        assert digests(loaded(path)) == digests(used(Layout()))
    assert not target.exists()


def with_files(meta, table):
    from msgspec.structs import replace as replaced

    return replaced(meta, files=table)


def test_an_older_format_is_read_by_no_program_on_its_way(tmp_path):
    path, target = saved(tmp_path), tmp_path / "executed"
    (path / ".metadata").write_bytes(pickle.dumps(Attack(target)))
    old = {"format": 3, "step": 7, "samples": 56, "updates": 7, "identity": {}, "files": {}}
    (path / META).write_text(json.dumps(old))
    one_line(lambda: loaded(path), "format 3", "convert it with")
    one_line(lambda: command(["convert", str(tmp_path)]), "can run any code", "--trust")
    one_line(lambda: command(["convert", str(tmp_path), "--trust"]), ".metadata", "lists")
    assert not target.exists()


def test_files_outside_the_folder_are_not_read(tmp_path):
    path = saved(tmp_path)
    file = path / "rank-00000.safetensors"
    away = tmp_path / "away.safetensors"
    shutil.copy(file, away)
    meta = files.read_meta(path)
    for name in ("../../away.safetensors", str(away), "..", "", META):
        bad = with_files(meta, {name: meta.files[file.name]})
        (path / META).write_bytes(encode_meta(bad))
        one_line(lambda: loaded(path), "not in its folder")
    (path / META).write_bytes(encode_meta(meta))
    file.unlink()
    file.symlink_to(away)
    one_line(lambda: loaded(path), file.name, "not whole")
    file.unlink()
    os.mkfifo(file)
    one_line(lambda: loaded(path), file.name, "not whole")
    (path / META).unlink()
    os.mkfifo(path / META)
    assert files.newest(tmp_path) is None
    one_line(lambda: files.read_meta(path), META, "no regular file")


# ---- no bit changes unseen


def test_every_flipped_bit_of_meta_is_found(tmp_path):
    """All of its single-bit flips, and every place where it may be cut."""
    path = saved(tmp_path)
    data = (path / META).read_bytes()
    want = decode_meta(data, path)
    for i in range(len(data)):
        for bit in range(8):
            flipped = data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
            with pytest.raises(UserError):
                decode_meta(flipped, path)
        with pytest.raises(UserError):
            decode_meta(data[:i], path)
    assert decode_meta(data, path) == want


def resealed(body: bytes) -> bytes:
    import zlib

    return body + f',\n"crc32": {zlib.crc32(body)}\n}}\n'.encode()


@settings(max_examples=200)
@given(data=st.data())
def test_any_content_with_a_right_checksum_is_one_line(tmp_path_factory, data):
    """Any value in the place of any other, with its checksum mended."""
    path = tmp_path_factory.mktemp("any") / "step-00000007"
    path.mkdir()
    meta = {
        "format": 4,
        "step": 7,
        "samples": 56,
        "updates": 7,
        "identity": {"text": "x"},
        "files": {"a": [0, 0]},
        "tensors": {"w": {"dtype": "F32", "shape": [2], "parts": [["a", [0], [2]]]}},
    }
    values = [None, -1, 1 << 70, "x", [], {}, True, 0.5, [["a", [0]]], {"w": 5}, [[[[]]]]]
    where = data.draw(
        st.sampled_from(["step", "samples", "updates", "identity", "files", "tensors"])
    )
    bad = meta | {where: data.draw(st.sampled_from(values))}
    body = json.dumps(bad).encode()[:-1]
    (path / META).write_bytes(resealed(body))
    (path / "a").write_bytes(b"")
    try:
        files.read_meta(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 500


def test_parts_that_do_not_fit(tmp_path):
    from msgspec.structs import replace as replaced

    path = saved(tmp_path)
    meta = files.read_meta(path)
    name, tensor = next((n, t) for n, t in meta.tensors.items() if len(t.shape) == 2)
    (part,) = tensor.parts
    for parts, said in (
        ((Part("other", part.start, part.shape),), "does not fit"),
        ((Part(part.file, (1, 0), part.shape),), "does not fit"),
        ((Part(part.file, (0,), part.shape),), "does not fit"),
        ((), "has 0 of"),
        ((part, part), "has"),
        ((Part(part.file, part.start, (part.shape[0] - 1, part.shape[1])),), "does not have"),
    ):
        table = {**meta.tensors, name: replaced(tensor, parts=parts)}
        (path / META).write_bytes(encode_meta(replaced(meta, tensors=table)))
        one_line(lambda: loaded(path), said, name)
    table = {n: t for n, t in meta.tensors.items() if n != name}
    (path / META).write_bytes(encode_meta(replaced(meta, tensors=table)))
    one_line(lambda: loaded(path), f"has no {name}")


# ---- found by its content


def test_a_renamed_or_copied_checkpoint_is_found_at_its_step_and_never_deleted(tmp_path):
    for step in (2, 10):
        state = replace(used(Layout()), step=step)
        checkpoint.save(tmp_path, state, SPEC, SAME)
    files.target(tmp_path, 10).rename(tmp_path / "checkpoints" / "step-best9")
    shutil.copytree(files.target(tmp_path, 2), tmp_path / "checkpoints" / "step-00000001")
    assert files.newest(tmp_path).name == "step-best9"
    assert loaded(files.newest(tmp_path)).step == 10
    files.prune(tmp_path, 20, 1, 0)
    checkpoint.save(tmp_path, replace(used(Layout()), step=20), SPEC, SAME)
    files.prune(tmp_path, 20, 1, 0)
    names = {path.name for path in files.whole(tmp_path)}
    assert names == {"step-best9", "step-00000001", "step-00000020"}


def test_what_is_saved_last_is_kept_beside_later_steps(tmp_path):
    for step in (10, 30):
        checkpoint.save(tmp_path, replace(used(Layout()), step=step), SPEC, SAME)
    files.prune(tmp_path, 10, 1, 0)
    assert [one.step for one in files.found(tmp_path)] == [10, 30]


def test_only_half_written_checkpoints_are_cleared(tmp_path):
    at = tmp_path / "checkpoints"
    kept = ["step-00000004", "step-notes", "step-00000006.part.bak", "notes.part", "step-x.part"]
    gone = ["step-00000008.part", "step-00000010.old.part"]
    for name in kept + gone:
        (at / name).mkdir(parents=True)
        (at / name / "notes.txt").write_text("mine")
    files.clear_parts(tmp_path)
    assert {path.name for path in at.iterdir()} == set(kept)
    with pytest.raises(UserError, match="step-00000004 is there already, and is no checkpoint"):
        checkpoint.save(tmp_path, replace(used(Layout()), step=4), SPEC, SAME)
    assert (at / "step-00000004" / "notes.txt").read_text() == "mine"


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    saved(tmp_path)

    def listdir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", listdir)
    one_line(lambda: files.newest(tmp_path), "cannot be listed", "Permission denied")


def test_one_rank_of_each_replica_writes(tmp_path):
    """No element is written twice: simulated ranks write whole tensors, and real ranks in
    test_checkpoint.py write parts that cover each tensor once."""
    with simulated(MeshShape.parse("dp=2,tp=2")) as mesh:
        path = checkpoint.save(tmp_path, used(Layout(mesh)), SPEC, SAME)
    meta = files.read_meta(path)
    assert all(len(t.parts) == 1 and t.parts[0].shape == t.shape for t in meta.tensors.values())
