"""Follows a run in the terminal: ``dtron watch runs/a``.

A terminal shows a table that is renewed. Other output has a line for each look with a new step. The
program ends when the run ends, or with Ctrl-C, and the run does not notice it: the files of the run
directory are only read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dtron.errors import UserError
from dtron.json_files import open_regular
from dtron.runtime.exit import Parser
from dtron.runtime.run_directory import read_config
from dtron.runtime.run_lock import holder_lives
from dtron.runtime.step_records import METRICS, parse_objects
from dtron.tools.run_record import count_text, is_number, time_text

TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read, some hundred steps


@dataclass(frozen=True)
class Look:
    """What a run has written so far.

    ``steps``: the last step of the run.
    ``recent``: the records of the newest steps.
    ``ended``: whether the run has ended."""

    steps: int
    recent: list[dict[str, Any]]
    ended: bool

    @property
    def step(self) -> int:
        return self.recent[-1]["step"] if self.recent else 0

    def newest(self, name: str) -> float | None:
        """Return the newest finite number of this name; None if no recent step has one."""
        return next((x[name] for x in reversed(self.recent) if is_number(x.get(name))), None)

    @property
    def seconds_left(self) -> float | None:
        """The seconds of the steps that are left, at the mean speed of recent steps."""
        took = [x["step_seconds"] for x in self.recent if is_number(x.get("step_seconds"))]
        return (self.steps - self.step) * sum(took) / len(took) if took else None

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the text of each number."""
        yield "step", f"{self.step:,} of {self.steps:,}"
        formats: tuple[tuple[str, str, Callable[[float], str]], ...] = (
            ("loss", "loss", "{:.4f}".format),
            ("validation_loss", "validation loss", "{:.4f}".format),
            ("grad_norm", "grad norm", "{:.3f}".format),
            ("lr", "lr", "{:.2e}".format),
            ("tokens", "tokens", count_text),
            ("tokens_per_s", "tokens/s", count_text),
            ("mfu", "mfu", "{:.1%}".format),
            ("peak_memory_gib", "GiB", "{:.1f}".format),
            ("data_wait_ratio", "waiting for data", "{:.1%}".format),
            ("gpu.temperature_c", "hottest GPU, C", "{:.0f}".format),
            ("joules_per_token", "J/token", "{:.3g}".format),
        )
        for name, shown, text in formats:
            if (x := self.newest(name)) is not None:
                yield shown, text(x)
        if not self.ended and (left := self.seconds_left) is not None:
            yield "left", time_text(left / 3600)


def look(run_dir: Path, steps: int) -> Look:
    """Read what a run has written. Raises UserError for a file that cannot be read."""
    lives = holder_lives(run_dir)  # first: what the run writes at its end is then read
    recent = [x for x in parse_objects(_tail(run_dir / METRICS)) if isinstance(x.get("step"), int)]
    found = Look(steps, recent, not lives)
    return Look(steps, recent, found.ended or found.step >= steps)


def _tail(path: Path) -> bytes:
    """Return the end of a file; nothing if there is no file. Its first line may be half a line."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); make it readable") from error


def follow(run_dir: Path, steps: int, wait: Callable[[], None]) -> Iterator[Look]:
    """Yield a look at a run again and again, until the run has ended.

    ``wait``: called between two looks."""
    while True:
        found = look(run_dir, steps)
        yield found
        if found.ended:
            return
        wait()


def table(name: str, found: Look) -> Table:
    """Return what a terminal shows."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(name, ProgressBar(max(found.steps, 1), found.step, width=40))
    for key, text in found.rows():
        grid.add_row(key, text)
    return grid


def show(looks: Iterator[Look], name: str, console: Console) -> Look | None:
    """Print looks at a run, and return the last one."""
    last = None
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for last in looks:
                live.update(table(name, last), refresh=True)
        return last
    for found in looks:
        if found.recent and (last is None or found.step != last.step):
            text = "  ".join(f"{key} {value}" for key, value in found.rows())
            console.print(text, soft_wrap=True)
        last = found
    return last


def main(argv: list[str]) -> int:
    parser = Parser(prog="dtron watch", description="Follow a run in the terminal.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="the time between two looks"
    )
    o = parser.parse_args(argv)
    if not 0.1 <= o.every <= 3600:
        raise UserError(f"--every {o.every:g}: must be from 0.1 to 3600 seconds; change it")
    config = read_config(o.run)
    console = Console(highlight=False, markup=False)
    try:
        looks = follow(o.run, config.steps, lambda: time.sleep(o.every))
        last = show(looks, str(o.run), console)
    except KeyboardInterrupt:
        return 0
    if last is not None:
        end = "is finished" if last.step >= last.steps else "does not train"
        at = f"step {last.step:,} of {last.steps:,}"
        console.print(f"{o.run} {end}: {at}", soft_wrap=True)
    return 0
