"""Copies in memory: which files a new start takes, and that they give the same bits again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dtron.checkpoint import TrainState, copy_files, memory_copies
from dtron.checkpoint.copy_files import HEAD_BYTES, Head, Held, holders, whole, write
from dtron.checkpoint.memory_copies import MemoryCopies
from dtron.errors import UserError
from dtron.params import WeightSpec, zeros
from dtron.testing import assert_caught
from dtron.training.optimizer import OptimizerState
from tests.helpers.train_cli import SIX, losses, refused, run

# ---- which files


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Held], list[int], list[int]]:
    """Files that hosts of two ranks hold, some of another size or of a rank that is no more."""
    hosts = draw(st.sampled_from([[0, 0], [0, 0, 1, 1], [0, 0, 1, 1, 2, 2]]))
    ranks = range(len(hosts))
    size = st.sampled_from([8, 8, 8, 4])
    one = st.tuples(st.integers(1, 3), st.integers(0, len(hosts)), size, st.sampled_from(ranks))
    drawn = draw(st.lists(one, max_size=30))
    drawn += [(2, r, 8, draw(st.sampled_from(ranks))) for r in ranks if draw(st.integers(0, 7))]
    held = [Held(Head(step, r, 0, 0, n, "key"), by) for step, r, n, by in drawn]
    return held, [8] * len(hosts), hosts


def assert_newest(choose: Callable, held: Sequence[Held], sizes: list[int], hosts: list[int]):
    fits = {(h.step, h.rank, by) for h, by in held if h.size == 8}
    has = lambda step, r: any((step, r, by) in fits for by in range(len(hosts)))
    steps = [step for step in (1, 2, 3) if all(has(step, r) for r in range(len(hosts)))]
    found = choose(held, sizes, hosts)
    assert (found and found[0]) == (steps[-1] if steps else None)
    for r, by in found[1].items() if found else ():
        assert (found[0], r, by) in fits
        near = any((found[0], r, p) in fits for p in range(len(hosts)) if hosts[p] == hosts[r])
        assert (hosts[by] == hosts[r]) == near
    assert found is None or sorted(found[1]) == list(range(len(hosts)))


@given(tables())
def test_the_newest_step_that_is_whole(table):
    assert_newest(holders, *table)


def test_mutants_of_the_choice_are_caught():
    heads = {(s, r): Head(s, r, 0, 0, 8, "key") for s in (1, 2) for r in range(4)}
    held = [Held(heads[1, r], by) for r in range(4) for by in (3, r)]
    held += [Held(heads[2, r], r) for r in range(3)]
    anyone = lambda held, *_: (1, {h.rank: by for h, by in held[::-1] if h.step == 1})
    newest = lambda held, *_: (2, {h.rank: by for h, by in held if h.step == 2})
    for mutant in (anyone, newest):
        assert_caught(lambda mutant=mutant: assert_newest(mutant, held, [8] * 4, [0, 0, 1, 1]))
    assert_newest(holders, held, [8] * 4, [0, 0, 1, 1])


# ---- files


HEAD = Head(3, 1, 24, 3, 12, "key")


def test_a_changed_file_is_not_whole(tmp_path):
    data = bytes(range(12))
    head = write(tmp_path, HEAD, [memoryview(data[:5]), memoryview(data[5:])])
    file = tmp_path / head.name
    assert whole(file) == head != HEAD and not list(tmp_path.glob("*.part"))
    good = file.read_bytes()
    for bad in (good[:-1], good + b"x", good[:100], b"", b"[]" + good):
        file.write_bytes(bad)
        assert whole(file) is None
    for place in (HEAD_BYTES, HEAD_BYTES + 11, 10):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert whole(file) is None
    file.write_bytes(good)
    assert whole(file.rename(file.with_name("step-00000004-rank-00001"))) is None


def test_a_full_folder_takes_all_parts(tmp_path):
    """Another rank sends them, and must not wait for ever."""
    taken = []

    def parts():
        for n in range(3):
            taken.append(n)
            yield memoryview(b"1234")

    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    opened = mock.MagicMock()
    opened.__enter__.return_value.write = full
    patches = (
        mock.patch.object(Path, "open", return_value=opened),
        mock.patch.object(Path, "unlink"),
    )
    with patches[0], patches[1], pytest.raises(OSError, match="No space"):
        write(tmp_path, HEAD, parts())
    assert taken == [0, 1, 2]


def test_a_folder_without_room_is_refused(tmp_path):
    copy_files.check_room(tmp_path, 1, "--memory-copies-dir")
    with pytest.raises(UserError, match=r"take 1,024.00 GiB, and .* are free; make the tmpfs"):
        copy_files.check_room(tmp_path, 1 << 40, "--memory-copies-dir")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        copy_files.check_room(tmp_path / "file" / "below", 1, "--memory-copies-dir")


# ---- hosts

SPEC = [WeightSpec(name, ("embed",), (15,), zeros) for name in ("a", "b")]


def state_of(step: int, r: int) -> TrainState:
    """A state whose numbers say the step and the rank. A tensor is a view with gaps."""
    numbers = torch.arange(30.0).view(3, 10)[:, ::2].T + 1000 * r + step
    params = [numbers, torch.full((2,), step, dtype=torch.bfloat16)]
    moments = [numbers * 2, None]
    return TrainState(step, 8 * step, params, OptimizerState(step - 1, {"m": moments}))


def flat_of(state: TrainState) -> list[torch.Tensor]:
    return memory_copies.tensors(state, SPEC)


def copies_of(folder: Path, on_host: int, group: Any, resumes: bool = True) -> MemoryCopies:
    return MemoryCopies(folder, 2, "key", SPEC, resumes, group, on_host)


def lost(folder: str, on_host: int, gone: str, mutant: str = "") -> tuple[Any, list[str]]:
    """Save the states of six steps, lose something, start again, and return what is there."""
    r, group = dist.get_rank(), dist.new_group(backend="gloo")
    own = Path(folder) / f"host-{r // on_host}"
    patches = {
        "": mock.patch.object(memory_copies, "KEPT", 2),
        "not sent": mock.patch.object(MemoryCopies, "_exchange", lambda *_: None),
    }
    with patches[mutant]:
        copies = copies_of(own, on_host, group)
        for step in range(1, 7):
            copies.save(state_of(step, r))
        copies.wait()
    dist.barrier()
    names = sorted(path.name for path in own.iterdir())
    dist.barrier()
    newest = own / f"step-00000006-rank-{r:05d}"
    if gone == "host 0" and r == 0:
        shutil.rmtree(own)
    elif gone == "a byte" and r == 1:
        newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    elif gone == "a file" and r % on_host == 0:
        for file in Path(folder).glob("host-*/step-00000006-rank-00002"):
            file.unlink(missing_ok=True)
    dist.barrier()
    state = state_of(1, r)
    found = copies_of(own, on_host, group).resume(state, 1)
    if found is not None:
        want = state_of(found.step, r)
        same = all(torch.equal(a, b) for a, b in zip(flat_of(found), flat_of(want), strict=True))
        assert same and found.samples == want.samples and found.opt.step == want.opt.step
    with copies_of(own, on_host, group):
        pass
    dist.barrier()
    assert not own.exists()
    return found and found.step, names


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("on_host", "gone", "step"),
    [
        (4, "nothing", 6),
        (4, "a byte", 4),
        (2, "host 0", 6),
        (2, "a byte", 6),  # the other host has it too
        (2, "a file", 4),
        (1, "host 0", 6),
    ],
)
def test_what_is_lost_comes_from_another_host(pool, tmp_path, on_host, gone, step):
    found = pool.run(lost, str(tmp_path), on_host, gone)
    assert [at for at, _ in found] == [step] * 4
    files = 2 * on_host * (1 if on_host == 4 else 2)  # two steps
    assert all(len(names) == files for _, names in found)


@pytest.mark.xdist_group("pool")
def test_a_file_that_is_not_sent_is_noticed(pool, tmp_path):
    assert_caught(
        lambda: test_what_is_lost_comes_from_another_host(
            mock.Mock(run=lambda *x: pool.run(*x, "not sent")), tmp_path, 2, "host 0", 6
        )
    )


def test_copies_of_another_run_are_not_read(tmp_path):
    with copies_of(tmp_path / "a", 1, None) as copies:
        copies.save(state_of(2, 0))
        copies.wait()
        other = MemoryCopies(tmp_path / "a", 2, "another key", SPEC)
        assert other.resume(state_of(1, 0), -1) is None
        assert copies.resume(state_of(1, 0), 2) is None  # the checkpoint is as new
        assert copies.resume(state_of(1, 0), 1).step == 2
        assert copies_of(tmp_path / "a", 1, None, resumes=False).resume(state_of(1, 0), -1) is None
        assert copies.resume(state_of(1, 0), 1) is None  # a run that begins anew deletes them


# ---- runs


def test_a_run_goes_on_from_its_copies(run_dir, monkeypatch, capsys):
    """Killed after the step 5: the newest checkpoint is of step 3."""
    folder = run_dir.with_name("memory")
    flags = [*SIX, "--save-every=3", "--memory-copies-every=1", f"--memory-copies-dir={folder}"]
    want = losses(run(run_dir.with_name("whole"), *SIX))
    save = MemoryCopies.save

    def dies(copies: MemoryCopies, state: TrainState) -> None:
        save(copies, state)
        if state.step == 5:
            copies.wait()
            raise RuntimeError("killed")

    with mock.patch.object(MemoryCopies, "save", dies), pytest.raises(RuntimeError, match="killed"):
        run(run_dir, *flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert losses(run(run_dir, *flags)) == want
    out = capsys.readouterr().out
    assert "resumed at step 5" in out and f"step 5 is loaded from the copies in {folder}" in out
    assert not folder.exists()


def test_flags(run_dir, capsys):
    said = refused(capsys, f"--run-dir={run_dir}", "--memory-copies-every=1", "--simulate")
    assert "--memory-copies-every has no effect with --simulate" in said
    said = refused(capsys, f"--run-dir={run_dir}", "--memory-copies-dir=/tmp/x")
    assert "give --memory-copies-every too" in said
    assert "--memory-copies-every -1: must be at least 0" in refused(
        capsys, "--memory-copies-every=-1"
    )
