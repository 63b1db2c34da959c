"""train.py with one rank that leaves, or hangs, in the middle of a step."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import dtron.training.pipeline  # noqa: E402
import train  # noqa: E402
from dtron.runtime.exit import run_cli  # noqa: E402

stage, calls = dtron.training.pipeline.stage, []


def dying(*args, **kwargs):
    calls.append(1)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if os.environ["RANK"] == os.environ["DIES"] and len(calls) == 6 and first:
        if os.environ["HOW"] == "leaves":
            os._exit(9)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun would wait half a minute for it
        time.sleep(600)
    return stage(*args, **kwargs)


def main(argv: list[str]) -> int:
    dtron.training.pipeline.stage = dying
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
