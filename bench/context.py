"""Time long sequences with and without context parallelism; a JSON line for each case.

    python bench/context.py --gpus 2                # 8k to 128k, cp=1 and cp=2, every method
    python bench/context.py --gpus 2 --layers 2 --tokens 65536      # what differs is attention
    python bench/context.py --longest               # the longest sequence that fits one GPU

Every case is bench/train.py in processes of its own, so that one that runs out of memory spoils no
other; it is a line too, with its error. The tokens of a step are the same in all cases of one
number of GPUs per row of the table: ``--tokens`` on each GPU, in rows as long as the sequence; a
sequence longer than that is one row. Needs torch and numpy alone."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cases import command

sys.path.insert(0, str(Path(__file__).parents[1]))
from dtron.runtime.exit import Parser, run_cli


def run(flags: dict[str, object], gpus: int, timeout_seconds: int) -> dict:
    """What bench/train.py printed, or the case and its error."""
    named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    argv = [flag if value is True else f"{flag}={value}" for flag, value in named.items()]
    try:
        done = subprocess.run(
            command(argv, gpus), capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return {**flags, "gpus": gpus, "error": f"took longer than {timeout_seconds} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    error = [line for line in done.stderr.splitlines() if "Error" in line]
    return {
        **flags,
        "gpus": gpus,
        "error": (error or done.stderr.splitlines() or ["no output"])[0][:300],
    }


def cases(o: argparse.Namespace) -> Iterator[tuple[dict[str, object], int]]:
    """Without cp on one GPU, then on all of them with every method."""
    common = {"model": o.model, "recompute": o.recompute, "steps": o.steps}
    common |= {"layers": o.layers} if o.layers else {}
    common |= {"eager": True} if o.eager else {}
    for seq_len in o.seq_lens:
        alone = {**common, "seq_len": seq_len, "rows": max(1, o.tokens // seq_len)}
        yield alone, 1
        if o.gpus == 1:
            continue
        together = {**alone, "mesh": f"cp={o.gpus}", "rows": max(1, o.gpus * o.tokens // seq_len)}
        for method in o.methods:
            yield {**together, "cp_method": method}, o.gpus


def longest(o: argparse.Namespace) -> Iterator[dict]:
    """Doubles the sequence while it fits, then halves the gap to what does not, down to an eighth
    of it."""
    fits, too_long, seq_len = 0, 0, min(o.seq_lens)
    while not too_long or too_long - fits > fits // 8:
        flags = {
            "model": o.model,
            "recompute": o.recompute,
            "steps": 1,
            "seq_len": seq_len,
            "rows": 1,
        }
        line = run(flags, 1, o.timeout_seconds)
        yield line
        fits, too_long = (fits, seq_len) if "error" in line else (seq_len, too_long)
        if not fits:
            return
        seq_len = 2 * seq_len if not too_long else (fits + too_long) // 2 // 1024 * 1024


def main(argv: list[str]) -> int:
    p = Parser(description="Time long sequences with and without cp; JSON lines.")
    p.add_argument("--model", default="bench-1.3b", help="a preset")
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--tokens", type=int, default=16384, help="of a step, on each GPU")
    p.add_argument("--layers", type=int, default=0, help="fewer than the preset has")
    p.add_argument("--recompute", default="full")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--timeout-seconds", type=int, default=600, help="seconds for one case")
    p.add_argument("--methods", nargs="+", default=["ring", "ulysses", "allgather"])
    p.add_argument("--seq-lens", nargs="+", type=int, default=[2**n for n in range(13, 18)])
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument("--longest", action="store_true", help="on one GPU, by trying")
    o = p.parse_args(argv)
    for line in (
        longest(o)
        if o.longest
        else (run(flags, gpus, o.timeout_seconds) for flags, gpus in cases(o))
    ):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
