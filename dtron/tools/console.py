"""The console of programs that print tables."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Return the standard output. A file gets 150 columns at least, so that no table is wrapped."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 150))
