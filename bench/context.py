"""Time long sequences with and without context parallelism. Prints one JSON line for each case.

    python bench/context.py --gpus 2                # 8k to 128k, cp=1 and cp=2, every method
    python bench/context.py --gpus 2 --layers 2 --tokens 65536    # mostly attention
    python bench/context.py --longest               # the longest sequence that fits one GPU

Every case runs bench/train.py in its own processes. A case that runs out of memory does not affect
the other cases; its line has the error. A step has ``--tokens`` tokens on each GPU, in rows of the
sequence length. A longer sequence is one row. Needs torch and numpy, nothing else."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

from cases import command

from dtron.runtime.exit import Parser, run_cli


def run(flags: dict[str, object], gpus: int, timeout_seconds: int) -> dict:
    """Return the line that bench/train.py printed, or the case and its error."""
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
    """Yield each length without cp on one GPU, then on all GPUs with every method."""
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
    """Yield the results of a search for the longest sequence that fits.

    The length doubles while it fits. Then the search bisects between the longest length that fits
    and the shortest that does not, until they differ by an eighth."""
    fits, too_long, seq_len = 0, 0, min(o.seq_lens)
    while not too_long or too_long - fits > fits // 8:
        flags = {"model": o.model, "recompute": o.recompute, "steps": 1, "rows": 1}
        line = run(flags | {"seq_len": seq_len}, 1, o.timeout_seconds)
        yield line
        fits, too_long = (fits, seq_len) if "error" in line else (seq_len, too_long)
        if not fits:
            return
        seq_len = 2 * seq_len if not too_long else (fits + too_long) // 2 // 1024 * 1024


def main(argv: list[str]) -> int:
    p = Parser(description="Time long sequences with and without cp; JSON lines.")
    p.add_argument("--model", default="bench-1.3b", help="a preset")
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--tokens", type=int, default=16384, help="tokens of a step on each GPU (16384)")
    p.add_argument("--layers", type=int, default=0, help="number of blocks (the preset's number)")
    p.add_argument("--recompute", default="full")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--timeout-seconds", type=int, default=600, help="limit for one case (600)")
    p.add_argument("--methods", nargs="+", default=["ring", "ulysses", "allgather"])
    p.add_argument("--seq-lens", nargs="+", type=int, default=[2**n for n in range(13, 18)])
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument(
        "--longest", action="store_true", help="search for the longest sequence that fits one GPU"
    )
    o = p.parse_args(argv)
    measured = (run(flags, gpus, o.timeout_seconds) for flags, gpus in cases(o))
    for line in longest(o) if o.longest else measured:
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
