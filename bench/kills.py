"""Disturb runs under Slurm at random moments, and compare their ends with that of an undisturbed
run.

    python bench/kills.py --runs 50 --nodes 2 --out /shared/kills --flags "--steps 60"

Each run is a job of examples/cluster/slurm.sbatch, and is disturbed once:

- ``rank``: a rank is killed.
- ``launcher``: a torchrun is killed.
- ``node``: all processes of a node are killed, slurmd too. Slurm gives the job another node.
- ``preemption``: Slurm asks the job to end, as before a time limit.
- ``network``: the link of a node is taken down for some seconds. All packets vanish, without an
  answer. The processes of the node live.

The loss of the last step must be that of the undisturbed run, to the bit. One JSON line is printed
for each run, and added to ``--results``, with the seconds that the disturbance has cost. Needs
Slurm with all nodes on this machine (several slurmd, each started by ``slurmd -N NAME``, and one
more than a run has), and root. For ``network``, each slurmd runs in a network namespace of its own
with one veth, whose other end is in the namespace of this program:

    ip link add link1 type veth peer name eth0 netns NAMESPACE
    nsenter --net=/run/netns/NAMESPACE unshare --uts sh -c 'hostname NAME; exec slurmd -N NAME'
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("rank", "launcher", "node", "preemption", "network")
OUTAGE = (5, 60)  # seconds without a network
FLAGS = "--mesh dp=2 --device cpu --save-every 10 --eval-every 0 --sample-tokens 0 --steps"


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Job:
    """What all runs share. ``limit``: most seconds of a run."""

    nodes: int
    steps: int
    flags: list[str]
    limit: float

    def submit(self, out: Path) -> str:
        """Submit a run, and return its job's number."""
        script = str(ROOT / "examples" / "cluster" / "slurm.sbatch")
        where = ["--chdir", str(ROOT), "--output", f"{out}.log", "--nodes", str(self.nodes)]
        flags = [*FLAGS.split(), str(self.steps), *self.flags, "--run-dir", str(out)]
        return slurm("sbatch", "--parsable", *where, script, *flags)

    def last_loss(self, out: Path) -> float | None:
        rows = [row for row in metrics(out) if row.get("step") == self.steps]
        return rows[-1]["loss"] if rows else None


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


def link_of(node: str) -> str:
    """Return the name of the end of a node's veth that is in the namespace of this program."""
    show = ["nsenter", f"--net=/proc/{daemon_of(node)[0]}/ns/net", "ip", "-j", "link", "show"]
    text = subprocess.run([*show, "type", "veth"], check=True, capture_output=True).stdout
    return socket.if_indextoname(json.loads(text)[0]["link_index"])


@contextmanager
def without_network(node: str, seconds: float) -> Iterator[None]:
    """Take the link of a node down for some seconds. On exit it is up."""
    turn = ["ip", "link", "set", link_of(node)]
    subprocess.run([*turn, "down"], check=True)
    later = threading.Timer(seconds, subprocess.run, [[*turn, "up"]])
    later.start()
    try:
        yield
    finally:
        later.cancel()
        subprocess.run([*turn, "up"], check=True)


@contextmanager
def without_node(job: str, node: str) -> Iterator[None]:
    """Kill all processes of a node. On exit the node has a slurmd again, in its namespaces."""
    daemon, own = daemon_of(node), processes(job, node)
    spaces = [os.open(f"/proc/{daemon[0]}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in own]
    parents = {int(stat.rsplit(")", 1)[1].split()[1]) for stat in stats}
    steps = [pid for pid in parents if "slurmstepd" in command_of(pid)]
    kill([*daemon, *steps, *own])
    try:
        yield
    finally:
        net, uts = (f"/proc/{os.getpid()}/fd/{space}" for space in spaces)
        enter = ["nsenter", f"--net={net}", f"--uts={uts}"]
        subprocess.run([*enter, "slurmd", "-N", node], check=True)
        for space in spaces:
            os.close(space)


@contextmanager
def disturbed(job: str, kind: str, node: str, seconds: float) -> Iterator[None]:
    """Disturb a job that runs. The node is whole again on exit."""
    if kind == "network":
        with without_network(node, seconds):
            yield
        return
    if kind == "node":
        with without_node(job, node):
            yield
        return
    own = processes(job, node)
    ranks = [pid for pid, pairs in own.items() if "LOCAL_RANK" in pairs]
    launchers = [pid for pid in own if pid not in ranks and "torchrun" in command_of(pid)]
    if kind == "preemption":
        slurm("scancel", "--signal", "USR1", "--batch", job)
    else:
        kill(ranks[:1] if kind == "rank" else launchers)
    yield


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


def first_error(out: Path) -> str:
    """Return the first error that dtron has printed, without its run directory."""
    text = Path(f"{out}.log").read_text(errors="replace")
    found = re.search(r"^.*error: .*(?:died|hangs|answer|another run|has ended).*$", text, re.M)
    return found[0].replace(str(out), out.name) if found else ""


def one_run(run: Job, out: Path, kind: str | None, wait: float, outage: float) -> dict[str, Any]:
    """Run a job, disturbed by ``kind`` some seconds after its first step (None: not at all).

    ``outage``: seconds without a network."""
    start, job = time.monotonic(), run.submit(out)
    row: dict[str, Any] = {"kind": kind}
    with ExitStack() as stack:
        if kind is not None:
            while not metrics(out):
                if time.monotonic() - start > run.limit:
                    raise UserError(f"{out}.log: the job has made no step; read it")
                time.sleep(0.2)
            time.sleep(wait)
            text = slurm("squeue", "--noheader", "--jobs", job, "--format", "%N")
            node = random.choice(slurm("scontrol", "show", "hostnames", text).split())
            row |= {"node": node, "after_step": metrics(out)[-1]["step"]}
            if kind == "network":
                row["outage"] = round(outage, 1)
            stack.enter_context(disturbed(job, kind, node, outage))
        row["state"] = finish(job, run.limit)
        row["seconds"] = round(time.monotonic() - start, 1)
    restarts = re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", job))
    return row | {
        "requeued": int(restarts[1]) if restarts else 0,
        "loss": run.last_loss(out),
        "error": first_error(out),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the seconds that the runs have lost, by kind of disturbance."""
    lines = []
    for kind in KINDS:
        lost = [row["lost"] for row in rows if row["kind"] == kind]
        if lost:
            lines.append(f"{kind}: {len(lost)} runs, median {statistics.median(lost):.1f} s lost")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    p = Parser(description="Disturb runs under Slurm, and compare their ends.")
    p.add_argument("--runs", type=int, default=50, help="number of disturbed runs (50)")
    p.add_argument("--nodes", type=int, default=2, help="nodes of a run (2)")
    p.add_argument("--steps", type=int, default=60, help="steps of a run (60)")
    p.add_argument("--flags", default="", help="more flags of train.py")
    p.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    p.add_argument("--results", type=Path, help="file to which each run adds a line of JSON")
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="disturbances (all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=float, default=300, help="most seconds of a run (300)")
    o = p.parse_args(argv)
    random.seed(o.seed)
    o.out.mkdir(parents=True, exist_ok=True)
    run = Job(o.nodes, o.steps, o.flags.split(), o.limit)
    rows: list[dict[str, Any]] = []
    whole: dict[str, Any] = {}
    for i in range(o.runs + 1):
        kind = o.kinds[i % len(o.kinds)] if i else None
        wait, outage = 8 * random.random(), random.uniform(*OUTAGE)
        row = one_run(run, o.out / f"seed-{o.seed}-run-{i}", kind, wait, outage)
        whole = whole or row
        row["same"] = row["state"] == "COMPLETED" and row["loss"] == whole["loss"]
        row["lost"] = round(row["seconds"] - whole["seconds"], 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if o.results is not None:
            with o.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    wrong = sum(not row["same"] for row in rows)
    print(f"{table(rows)}\n{o.runs} disturbed runs, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
