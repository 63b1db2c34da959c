"""Run many cases of bench/train.py on one machine: a batch compiles together, then each case is timed alone.

    python bench/cases.py bench/cases.txt --gpus 2 | tee -a bench/results.jsonl
    python bench/report.py --write docs/performance.md

A line of the file is a case, the flags of bench/train.py; ranks of its ``--mesh`` are processes of torchrun.
An empty line ends a batch, # begins a remark. Compiling takes minutes of the host and hardly any of the GPU,
being timed some seconds; so all cases of a batch start at once, stop behind their first step, and go on one
after the other. First steps then take longer than alone, and what the cases hold must fit the GPUs together.
What a case prints beside its line (with --profile, where its time went) goes to stderr, and so does why it
failed, which spoils no other. Needs torch and numpy alone."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dtron.entry import run_cli
from dtron.shape import MeshShape

TRAIN = Path(__file__).with_name("train.py")


@dataclass
class Case:
    flags: list[str]
    ranks: int
    turn: Path  # what it waits for
    process: subprocess.Popen | None = None

    def start(self, gpus: Sequence[int]) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        argv = [sys.executable, *(launch if self.ranks > 1 else []), str(TRAIN), *self.flags]
        with self.turn.with_suffix(".out").open("w") as out, self.turn.with_suffix(".err").open("w") as err:
            self.process = subprocess.Popen(
                [*argv, f"--turn={self.turn}"],
                stdout=out,
                stderr=err,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus[: self.ranks]))},
            )

    @property
    def waits(self) -> bool:
        """Whether all its ranks have come to where they wait, or it has ended."""
        there = len(list(self.turn.parent.glob(f"{self.turn.name}.*.ready")))
        return there == self.ranks or self.process.poll() is not None

    def result(self) -> str | None:
        """Its turn: the line it prints, or None and a word on stderr."""
        self.turn.touch()
        failed = self.process.wait()
        printed = self.turn.with_suffix(".out").read_text().splitlines()
        lines = [x for x in printed if x.startswith("{")]
        for x in (shlex.join(self.flags), *printed):
            if x not in lines:
                print(x, file=sys.stderr)
        if not failed and lines:
            return lines[-1]
        said = self.turn.with_suffix(".err").read_text().splitlines()
        why = [x for x in said if "Error" in x] or said or ["no output"]
        print(f"{shlex.join(self.flags)}: {why[-1][:300]}", file=sys.stderr)
        return None


def read(path: Path, folder: Path, gpus: int) -> list[list[Case]]:
    """The batches of a file. Raises ValueError for one that cannot be read, and for a case too large."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file of cases") from error
    batches: list[list[Case]] = [[]]
    for number, line in enumerate(text.splitlines(), 1):
        flags = shlex.split(line, comments=True)
        if not line.strip():
            batches.append([])
        if not flags:
            continue
        p = argparse.ArgumentParser(add_help=False)
        p.add_argument("--mesh", default="")
        ranks = MeshShape.parse(p.parse_known_args(flags)[0].mesh, None).size
        if ranks > gpus:
            raise ValueError(f"{path}:{number}: {line!r} takes {ranks} GPUs of {gpus}; give more with --gpus")
        batches[-1].append(Case(flags, ranks, folder / f"case{number}"))
    return [b for b in batches if b]


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description="Run cases of bench/train.py; a JSON line for each.")
    p.add_argument("file", type=Path, help="a case a line")
    p.add_argument("--first", type=int, default=0, help="the first GPU to use")
    p.add_argument("--gpus", type=int, default=1, help="how many from there on")
    o = p.parse_args(argv)
    gpus, failed = range(o.first, o.first + o.gpus), 0
    with tempfile.TemporaryDirectory() as folder:
        for batch in read(o.file, Path(folder), o.gpus):
            for case in batch:
                case.start(gpus)
            try:
                while not all(case.waits for case in batch):
                    time.sleep(0.1)
                for case in batch:
                    line = case.result()
                    failed += line is None
                    if line is not None:
                        print(line, flush=True)
            finally:
                for case in batch:
                    case.process.terminate()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
