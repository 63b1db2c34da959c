"""Let a case wait for its turn: a batch compiles together, each case is timed alone (cases.py)."""

import os
import sys
import time
from pathlib import Path


def await_turn(turn: str) -> None:
    """Wait until the file ``turn`` exists; cases.py creates it. An empty ``turn`` waits for
    nothing.

    A file beside it, ``TURN.RANK.ready``, tells cases.py that this rank waits. The process exits if
    the folder is gone: then cases.py has ended."""
    if not turn:
        return
    Path(f"{turn}.{os.environ.get('RANK', 0)}.ready").touch()
    while not Path(turn).exists():
        if not Path(turn).parent.exists():
            sys.exit(f"{turn}: cases.py has ended")
        time.sleep(0.05)
