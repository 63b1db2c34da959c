"""Disturb runs under Slurm at random moments, and compare their ends with that of an undisturbed
run.

    python bench/kills.py --runs 50 --nodes 2 --out /shared/kills

Each run is a job of examples/cluster/slurm.sbatch, and is disturbed once:

- ``rank``: a rank is killed.
- ``launcher``: a torchrun is killed.
- ``node``: all processes of a node are killed, slurmd too. Slurm gives the job another node.
- ``preemption``: Slurm asks the job to end, as before a time limit.

The loss of the last step must be that of the undisturbed run, to the bit. One JSON line is printed
for each run, with the seconds that the disturbance has cost. Needs Slurm with all nodes on this
machine (several slurmd, each started by ``slurmd -N NAME``, and one more than a run has), and the
rights to kill them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("rank", "launcher", "node", "preemption")
STEPS = 60
FLAGS = f"--mesh dp=2 --device cpu --steps {STEPS} --save-every 10 --eval-every 0 --sample-tokens 0"


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def submit(out: Path, nodes: int) -> str:
    """Submit a run, and return its job's number."""
    script, rest = str(ROOT / "examples" / "cluster" / "slurm.sbatch"), f"--run-dir {out}".split()
    where = ["--chdir", str(ROOT), "--output", f"{out}.log", "--nodes", str(nodes)]
    return slurm("sbatch", "--parsable", *where, script, *FLAGS.split(), *rest)


def state(job: str) -> tuple[str, str]:
    """Return the state of a job, and the reason of a job that waits."""
    text = slurm("scontrol", "show", "job", job)
    found = re.search(r"JobState=(\S+) Reason=(\S+)", text)
    assert found is not None, text
    return found[1], found[2]


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_loss(out: Path) -> float | None:
    losses = [row["loss"] for row in metrics(out) if row.get("step") == STEPS and "loss" in row]
    return losses[-1] if losses else None


def processes(job: str, node: str) -> dict[int, dict[str, str]]:
    """Return the environment of each process of a job on a node, by its id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                raw = (folder / "environ").read_bytes().decode(errors="replace")
            except OSError:  # it has ended
                continue
            pairs = dict(x.split("=", 1) for x in raw.split("\0") if "=" in x)
            if pairs.get("SLURM_JOB_ID") == job and pairs.get("SLURMD_NODENAME") == node:
                found[int(folder.name)] = pairs
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def daemon_of(node: str) -> list[int]:
    """Return the processes of a node's slurmd."""
    lines = subprocess.run(["pgrep", "-af", "slurmd"], capture_output=True, text=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return [int(row[0]) for row in rows if row[1].endswith("slurmd") and row[-1] == node]


def disturb(job: str, kind: str, node: str) -> None:
    """Disturb a job that runs."""
    if kind == "preemption":
        slurm("scancel", "--signal", "USR1", "--batch", job)
        return
    own = processes(job, node)
    if kind == "node":
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in own]
        parents = {int(stat.rsplit(")", 1)[1].split()[1]) for stat in stats}
        steps = [pid for pid in parents if "slurmstepd" in command_of(pid)]
        kill([*daemon_of(node), *steps, *own])
        return
    ranks = [pid for pid, pairs in own.items() if "LOCAL_RANK" in pairs]
    launchers = [pid for pid in own if pid not in ranks and "torchrun" in command_of(pid)]
    kill(ranks[:1] if kind == "rank" else launchers)


def finish(job: str, limit: float) -> str:
    """Wait until a job has ended, and return its state."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        now, reason = state(job)
        if now in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            return now
        if now == "PENDING" and reason == "BeginTime":  # Slurm waits two minutes before it restarts
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)
    slurm("scancel", job)
    return "too long"


def one_run(out: Path, nodes: int, kind: str | None, wait: float, limit: float) -> dict:
    """Run a job, disturbed by ``kind`` some seconds after its first step (None: not at all)."""
    start, job, node = time.monotonic(), submit(out, nodes), ""
    if kind is not None:
        while not metrics(out):
            if time.monotonic() - start > limit:
                raise UserError(f"{out}.log: the job has made no step; read it")
            time.sleep(0.2)
        time.sleep(wait)
        text = slurm("squeue", "--noheader", "--jobs", job, "--format", "%N")
        node = random.choice(slurm("scontrol", "show", "hostnames", text).split())
        disturb(job, kind, node)
    ended = finish(job, limit)
    seconds = time.monotonic() - start
    if kind == "node":
        subprocess.run(["slurmd", "-N", node], check=True)
    return {"kind": kind, "state": ended, "seconds": round(seconds, 1), "loss": last_loss(out)}


def main(argv: list[str]) -> int:
    p = Parser(description="Disturb runs under Slurm, and compare their ends.")
    p.add_argument("--runs", type=int, default=50, help="number of disturbed runs (50)")
    p.add_argument("--nodes", type=int, default=2, help="nodes of a run (2)")
    p.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="disturbances (all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=float, default=300, help="most seconds of a run (300)")
    o = p.parse_args(argv)
    random.seed(o.seed)
    o.out.mkdir(parents=True, exist_ok=True)
    whole = one_run(o.out / "undisturbed", o.nodes, None, 0, o.limit)
    print(json.dumps(whole), flush=True)
    lost, wrong = [], 0
    for i in range(o.runs):
        kind = o.kinds[i % len(o.kinds)]
        found = one_run(o.out / f"run-{i}", o.nodes, kind, 8 * random.random(), o.limit)
        found["same"] = found["state"] == "COMPLETED" and found["loss"] == whole["loss"]
        wrong += not found["same"]
        lost.append(found["seconds"] - whole["seconds"])
        print(json.dumps(found), flush=True)
    if lost:
        print(f"{o.runs} runs, {wrong} differ; seconds lost, median {statistics.median(lost):.1f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
