"""A run's directory: its resolved config, its checkpoints, and a record of every start.

``RunDirectory`` is the directory that a run writes. ``read_run`` is for
programs that read the directory of another run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dtron import checkpoint
from dtron.checkpoint.files import clear_parts
from dtron.checkpoint.storage import AnyPath, storage_of
from dtron.data import Data
from dtron.data.special_tokens import save_tokenizer
from dtron.errors import LostRank, UserError
from dtron.hf import keep_origin
from dtron.hf.config import CONFIG
from dtron.json_files import is_there, read_bytes
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.runtime.output import append_line, replace_file, writing
from dtron.runtime.resume import changes, finished, place_of_run
from dtron.runtime.run_lock import LOCK, RunLock
from dtron.runtime.step_records import STARTS
from dtron.training.config import RunPlan

RESTART_PATIENCE = 30.0  # seconds for rank 0 of the attempt before to end


@dataclass
class RunDirectory:
    """The directory that a run writes to. The body of ``with`` has the only run there.

    ``checkpoints``: where its checkpoints are.
    ``resumed``: the checkpoint to resume from, or None.
    ``previous``: the config of the run that is resumed; None if its file is gone.
    ``finished``: the run has reached its last step, and ``--resume auto`` has nothing to do.
    ``start``: the record of this start, a line of ``starts.jsonl``; ``begin`` makes it."""

    path: Path
    checkpoints: AnyPath
    resumed: AnyPath | None
    previous: RunConfig | None = None
    finished: bool = False
    start: dict[str, Any] = field(default_factory=dict)
    _lock: RunLock | None = None
    _written: dict[Path, bytes] = field(default_factory=dict)

    @classmethod
    def open(cls, config: RunConfig) -> RunDirectory:
        """Create and lock the directory, and find the checkpoint to resume from: with --resume, or
        if torchrun has started this process again. Raises UserError if the directory cannot be
        written, belongs to a run that trains now, has nothing to resume, or holds another run that
        training would overwrite."""
        path = Path(config.run_dir)
        place = place_of_run(config.checkpoint_store, path)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if config.resume == "on" and not (checkpoint.newest(place) or os.path.lexists(path / LOCK)):
            raise _nothing_to_resume(place)  # a directory that the user mistyped is not created
        lock = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if int(os.environ.get("RANK", 0)) == 0:
                lock = RunLock(path, RESTART_PATIENCE if restarted else 0.0)
                check_store(config.checkpoint_store, place)
            with tempfile.TemporaryFile(dir=path):
                pass
            # Not earlier: until the lock is held, another run may write checkpoints.
            return cls._locked(config, path, place, restarted, lock)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                locked = error.filename == str(path / LOCK)
                raise UserError(
                    f"--run-dir {path}: {f'{LOCK} in it ' if locked else ''}cannot be written "
                    f"({error.strerror}); allow this user to write there, or choose another"
                ) from error
            raise

    @classmethod
    def _locked(
        cls, config: RunConfig, path: Path, place: AnyPath, restarted: bool, lock: RunLock | None
    ) -> RunDirectory:
        newest = checkpoint.newest(place)
        if config.resume == "on" and not newest:
            raise _nothing_to_resume(place)
        if newest and config.resume == "off" and not restarted:
            flag = "--run-dir" if config.checkpoint_store is None else "--checkpoint-store"
            raise UserError(
                f"{flag} {place}: holds checkpoints of another run, up to {newest.name}; go on "
                f"from there with --resume, choose another {flag}, or delete it"
            )
        if not newest:
            _refuse_foreign(path)
        previous, over = None, False
        if newest and (path / CONFIG).is_file():
            with contextlib.suppress(*cli.UNREADABLE):  # --resume has read the file, or refused it
                previous = cli.load(path / CONFIG)
        if newest and config.resume == "auto":
            over = finished(config, newest)
        return cls(path, place, newest, previous, over, _lock=lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Give the lock back. If a rank is lost, a thread may still be saving: then the lock stays
        until the process ends, which is soon."""
        lost = isinstance(error, LostRank) or (
            isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ
        )
        if self._lock is not None and not lost:
            self._lock.release()

    def begin(
        self, config: RunConfig, plan: RunPlan, data: Data, step: int, samples: int
    ) -> tuple[str, ...]:
        """Write the files that are known before the first step: the resolved config, the tokenizer
        with its end token, the small files of ``config.init_from``, and a line of ``starts.jsonl``.
        Return lines for the log: what differs from the config of the run.

        ``step``, ``samples``: the steps that are done, and the samples that they have used."""
        clear_parts(self.checkpoints)
        self._write(self.path / CONFIG, cli.text(config).encode())
        with writing(self.path):
            if config.init_from and not self.resumed:
                keep_origin(Path(config.init_from), self.path)
        if data.tokenizer is not None:
            self._write_tokenizer(data.tokenizer, data.end)
        starts = self.path / STARTS
        with writing(starts):
            self.start = _start(plan, step)
            append_line(starts, json.dumps(self.start))
            self._written[starts] = read_bytes(starts)
        notes = [] if self._lock is None or self._lock.warning is None else [self._lock.warning]
        if self.previous is not None:
            notes += changes(self.previous, config, step, samples)
        return tuple(notes)

    def restore(self) -> list[str]:
        """Write the files of ``begin`` again that someone has deleted: without them a checkpoint
        cannot be resumed or exported. Return a warning for each."""
        warnings = []
        for path, content in list(self._written.items()):
            if path.is_file():
                continue
            problem = "was deleted; it is written again"
            try:
                replace_file(path, content)
            except OSError as error:
                problem = f"is no file, and cannot be written again ({error.strerror})"
                del self._written[path]  # one warning is enough
            warnings.append(f"warning: {path}: {problem}; training goes on")
        return warnings

    def _write_tokenizer(self, tokenizer: Tokenizer, end: int | None) -> None:
        file = self.path / "tokenizer.json"
        with writing(file):
            for path in save_tokenizer(tokenizer, file, end):
                self._written[path] = path.read_bytes()

    def _write(self, path: Path, content: bytes) -> None:
        with writing(path):
            replace_file(path, content)
        self._written[path] = content


def _refuse_foreign(path: Path) -> None:
    """Raise UserError if the directory has files of the names that a run writes, and no run wrote
    them: it may be the folder of a model."""
    if (path / CONFIG).is_file():
        if is_run(path):
            return
    elif not (path / "tokenizer.json").is_file():
        return
    name = CONFIG if (path / CONFIG).is_file() else "tokenizer.json"
    raise UserError(
        f"--run-dir {path}: holds a {name} that no run wrote, and training would replace it; "
        "choose another --run-dir, or move the file away"
    )


def check_store(store: str | None, place: AnyPath) -> None:
    """Raise UserError if checkpoints cannot be written to the store of a run: hours may pass before
    the first save.

    ``store``: the value of ``--checkpoint-store``; None: the run directory, which is checked
    already."""
    if store is None:
        return
    storage = storage_of(place)
    try:
        storage.check(place)
    except OSError as error:
        raise UserError(
            f"--checkpoint-store {store}: cannot be written ({error.strerror}); {storage.remedy}"
        ) from error


def _nothing_to_resume(path: AnyPath) -> UserError:
    return UserError(
        f"--resume: {path} has no checkpoint; drop --resume, train with --save-every, or use "
        "--resume auto"
    )


def _start(plan: RunPlan, step: int) -> dict[str, Any]:
    """Return the record of a start: time, step, versions, mesh, device and dtypes."""
    gpu = plan.device.startswith("cuda")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "commit": _commit(),
        "dtron": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mesh": str(plan.shape),
        "device": torch.cuda.get_device_name(plan.device) if gpu else "cpu",
        "compute": str(plan.compute).removeprefix("torch."),
        "master": str(plan.master).removeprefix("torch."),
    }


def _version() -> str | None:
    """Return dtron's version. None if it is not installed, only on the path."""
    try:
        return version("dtron")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of dtron's checkout, with ``-dirty`` if files differ from it. None outside
    a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def is_run(folder: Path) -> bool:
    """Whether the folder has the config of a run. A model's folder has one of another form."""
    try:
        cli.load(folder / CONFIG)
    except cli.UNREADABLE:
        return False
    return True


def read_config(run_dir: Path) -> RunConfig:
    """Return the config of a run. Raises UserError for a folder that is no run directory."""
    if not is_there(run_dir / CONFIG):
        raise UserError(
            f"{run_dir}: has no {CONFIG}, it is no run directory; give one that train.py wrote"
        )
    try:
        return cli.load(run_dir / CONFIG)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{run_dir / CONFIG}: is no config of a run ({error}); give a run directory"
        ) from error


def read_run(run_dir: Path) -> tuple[RunConfig, AnyPath]:
    """Return the config and the newest whole checkpoint of a run."""
    config = read_config(run_dir)
    newest = checkpoint.newest(place_of_run(config.checkpoint_store, run_dir))
    if newest is None:
        raise UserError(
            f"{run_dir}: the run has no checkpoint yet; wait for its first one, or train with "
            "--save-every"
        )
    return config, newest
