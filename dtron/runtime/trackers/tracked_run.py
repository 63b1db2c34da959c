"""Feeds the trackers of a run from a thread: a slow network does not slow down training.

The file ``trackers.json`` in the run directory has the ids under which the trackers know the run.
So a run that goes on continues the same tracked run.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.json_files import read_object
from dtron.runtime.output import replace_file, writing
from dtron.runtime.trackers.tracker import About, Ending, Tracker, open_tracker

FILE = "trackers.json"
MOST = 100  # records that are written at once


class TrackedRun:
    """The trackers of a run. Raises UserError for a tracker that cannot be opened.

    A tracker that fails later is reported once, and training goes on.

    ``opened``: opens a tracker."""

    def __init__(
        self,
        names: Sequence[str],
        about: About,
        opened: Callable[[str, About], Tracker] = open_tracker,
    ) -> None:
        ids = _ids(about.run_dir) if about.step else {}
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            own = replace(about, known_as=ids.get(name))
            self._trackers[name] = _open(opened, name, own)
        self._messages = [f"tracked by {name}: {x.place}" for name, x in self._trackers.items()]
        self._reported: set[str] = set()
        self._queue: queue.SimpleQueue[Mapping[str, Any] | Ending] = queue.SimpleQueue()
        found = {name: x.known_as for name, x in self._trackers.items() if x.known_as}
        if found:
            file = about.run_dir / FILE
            with writing(file):
                replace_file(file, (json.dumps(ids | found) + "\n").encode())
        # A daemon: a server that does not answer must not keep the program from its end.
        self._thread = threading.Thread(target=self._feed, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand over the record of a step. Nothing waits here."""
        if self._trackers:
            self._queue.put(dict(record))

    def drain_messages(self) -> list[str]:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def close(self, ending: Ending, seconds: float = 60.0) -> None:
        """Wait until everything is written, at most for so long."""
        if not self._trackers:
            return
        self._queue.put(ending)
        self._thread.join(seconds)
        if self._thread.is_alive():
            names = ", ".join(self._trackers)
            self._messages.append(f"warning: {names}: the last records may not have been sent")

    def _feed(self) -> None:
        ending: Ending | None = None
        while ending is None:
            items: list[Any] = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < MOST:
                    items.append(self._queue.get_nowait())
            records = [x for x in items if not isinstance(x, str)]
            if len(records) < len(items):
                ending = items[-1]  # nothing follows an ending
            for name, tracker in self._trackers.items():
                if records:
                    self._try(name, partial(tracker.write, records))
                if ending is not None:
                    self._try(name, partial(tracker.close, ending))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Call a tracker, and report its first error."""
        try:
            call()
        except Exception as error:  # of a package that may raise anything
            if name not in self._reported:
                self._reported.add(name)
                self._messages.append(
                    f"warning: {name}: cannot be written ({_line(error)}); training goes on"
                )


def _open(opened: Callable[[str, About], Tracker], name: str, about: About) -> Tracker:
    try:
        return opened(name, about)
    except Exception as error:  # of a package that may raise anything
        offline = ", or use WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(
            f"--track {name}: cannot be opened ({_line(error)}); mend it{offline}, or leave it out"
        ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _ids(run_dir: Path) -> dict[str, str]:
    """Return the ids of an earlier start; none if the file is gone or is no such file."""
    with contextlib.suppress(OSError, ValueError):
        found = read_object(run_dir / FILE)
        return {name: x for name, x in found.items() if isinstance(x, str)}
    return {}
