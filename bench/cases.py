"""Run many cases of bench/train.py: a batch compiles together, each case is timed alone.

    python bench/cases.py bench/results/cases.txt --gpus 2 | tee -a bench/results/results.jsonl
    python bench/cases.py bench/results/named_cases.txt --gpus 2 --only llama3.1-8b llama3.1-8b-fp8
    python bench/report.py --write docs/performance.md

A line of the file is a case: the flags of bench/train.py, after a name and a colon if the case has
a name. ``--only`` runs the cases of these names. The ranks of a case's ``--mesh`` are processes of
torchrun. An empty line ends a batch, and # begins a comment.

Compilation takes minutes of the host and hardly any time of the GPU; the timed steps take seconds.
So all cases of a batch start at the same time, wait after their first step, and continue one after
the other. First steps then take longer than alone, and all cases of a batch together must fit into
the GPUs' memory.

The line of each case goes to stdout. Other output of a case (the time breakdown of --profile, the
reason of a failure) goes to stderr. A failed case does not affect the others. Needs torch and
numpy, nothing else."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli

TRAIN = Path(__file__).with_name("train.py")


def command(flags: Sequence[str], ranks: int) -> list[str]:
    """Return the command of bench/train.py with these flags, with torchrun for several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(launch if ranks > 1 else []), str(TRAIN), *flags]


@dataclass
class Case:
    """One case. ``turn``: the file that its processes wait for."""

    flags: list[str]
    ranks: int
    turn: Path
    process: subprocess.Popen | None = None

    def start(self, gpus: Sequence[str]) -> None:
        argv = command([*self.flags, f"--turn={self.turn}"], self.ranks)
        with (
            self.turn.with_suffix(".out").open("w") as out,
            self.turn.with_suffix(".err").open("w") as err,
        ):
            own = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: self.ranks])}
            self.process = subprocess.Popen(argv, stdout=out, stderr=err, env=own)

    @property
    def waits(self) -> bool:
        """Whether all ranks wait for their turn, or the case has ended."""
        there = len(list(self.turn.parent.glob(f"{self.turn.name}.*.ready")))
        return there == self.ranks or self.process.poll() is not None

    def result(self) -> str | None:
        """Let the case take its turn and return its line. Returns None after a failure, and prints
        the reason to stderr."""
        self.turn.touch()
        failed = self.process.wait()
        printed, errors = (
            self.turn.with_suffix(x).read_text().splitlines() for x in (".out", ".err")
        )
        lines = [x for x in printed if x.startswith("{")]
        line = lines[-1] if lines and not failed else None
        print(shlex.join(self.flags), *(x for x in printed if x != line), sep="\n", file=sys.stderr)
        if line is None:  # torchrun's own error (ChildFailedError) is not the reason
            why = [x for x in errors if re.search("[Ee]rror:", x) and "ChildFailedError" not in x]
            print((why or errors or ["no output"])[-1][:300], file=sys.stderr)
        return line

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def read(path: Path, folder: Path, gpus: int, only: Sequence[str] = ()) -> list[list[Case]]:
    """Read the batches of a file. Raises UserError if the file cannot be read, if a case needs more
    than ``gpus`` GPUs, or for a name that no case has.

    ``only``: the names of the cases to read; all without names."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise UserError(f"{path}: cannot be read ({why}); give a file of cases") from error
    batches: list[list[Case]] = [[]]
    names = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            batches.append([])
        try:
            flags = shlex.split(line, comments=True)
            ranks = MeshShape.parse(mesh_of(flags), None).size
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if not flags:
            continue
        name = flags.pop(0)[:-1] if flags[0].endswith(":") else ""
        names.add(name)
        if only and name not in only:
            continue
        if ranks > gpus:
            raise UserError(
                f"{path}:{number}: {line!r} takes {ranks} GPUs of {gpus}; give more with --gpus"
            )
        batches[-1].append(Case(flags, ranks, folder / f"case{number}"))
    if unknown := set(only) - names:
        known = ", ".join(sorted(filter(None, names))) or "none"
        raise UserError(
            f"--only {' '.join(sorted(unknown))}: {path} has no such case; its names are {known}"
        )
    return [b for b in batches if b]


def mesh_of(flags: list[str]) -> str:
    """Return the value of ``--mesh``, or an empty string if the flag is missing."""
    for flag, value in pairwise([*flags, ""]):
        if flag == "--mesh" or flag.startswith("--mesh="):
            return value if flag == "--mesh" else flag.removeprefix("--mesh=")
    return ""


def main(argv: list[str]) -> int:
    p = Parser(description="Run cases of bench/train.py; a JSON line for each.")
    p.add_argument("file", type=Path, help="file with one case per line")
    p.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="number of GPUs to use; the first ones of CUDA_VISIBLE_DEVICES if it is set",
    )
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run the cases named so")
    o = p.parse_args(argv)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus, failed = visible.split(",") if visible else [str(i) for i in range(o.gpus)], 0
    if len(gpus) < o.gpus:
        raise UserError(
            f"--gpus {o.gpus}: CUDA_VISIBLE_DEVICES={visible} has {len(gpus)}; give fewer"
        )
    with tempfile.TemporaryDirectory() as folder:
        for batch in read(o.file, Path(folder), o.gpus, o.only):
            try:
                for case in batch:
                    case.start(gpus)
                while not all(case.waits for case in batch):
                    time.sleep(0.1)
                for case in batch:
                    line = case.result()
                    failed += line is None
                    if line is not None:
                        print(line, flush=True)
            finally:
                for case in batch:
                    case.end()
    return 1 if failed else 0


def exit_on_signal(*_) -> None:
    """Exit through the ``finally`` blocks that end the cases."""
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, exit_on_signal)
    sys.exit(run_cli(main, sys.argv[1:]))
