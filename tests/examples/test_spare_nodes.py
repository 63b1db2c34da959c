"""Nodes of examples/cluster/spare_nodes.sh on this machine: a spare node takes the place of a lost
one, and a node that joins later is used."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.ranks import Ranks
from tests.helpers.texts import corpus
from tests.helpers.train_cli import TINY, enter, losses, records

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("program")]
SCRIPT = ROOT / "examples" / "cluster" / "spare_nodes.sh"
NODE = "DTRON_TEST_NODE"  # a variable that all processes of a node have


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    enter(corpus(tmp_path).parent, monkeypatch)
    return tmp_path / "run"


@contextmanager
def script(name: str, output: Path, *argv: str, **more: str) -> Iterator[subprocess.Popen]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", NODE: name, **more}
    with output.open("w") as said:
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *argv], env=environment, stdout=said, stderr=said
        )
    try:
        yield process
    finally:
        kill(name)
        process.wait()


def kill(name: str) -> None:
    """Kill all processes of a node at once."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):
            if folder.name.isdigit() and f"{NODE}={name}" in (
                (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            ):
                os.kill(int(folder.name), signal.SIGKILL)


class Cluster(ExitStack):
    """The store, and nodes of one rank. ``nodes``: how many train."""

    def __init__(self, run_dir: Path, nodes: str, *flags: str) -> None:
        super().__init__()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._store = f"127.0.0.1:{free.getsockname()[1]}"
        self._run_dir, self._nodes, self._flags = run_dir, nodes, flags
        output = self.output("store")
        self.enter_context(script(f"{run_dir}-store", output, "store", STORE=self._store))
        self.until(lambda: "is there" in output.read_text())

    def output(self, node: str) -> Path:
        return self._run_dir.with_name(f"{node}.txt")

    def start(self, node: str) -> subprocess.Popen:
        memory = f"--memory-copies-dir={self._run_dir.with_name(f'memory-{node}')}"
        argv = [*TINY, *self._flags, f"--run-dir={self._run_dir}", memory]
        argv += [f"--data.path={self._run_dir.with_name('corpus.jsonl')}"]
        more = {"STORE": self._store, "NODES": self._nodes}
        return self.enter_context(script(self.name(node), self.output(node), *argv, **more))

    def name(self, node: str) -> str:
        return f"{self._run_dir}-{node}"

    def rows(self) -> int:
        file = self._run_dir / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def until(self, holds, *processes: subprocess.Popen) -> None:
        while not holds():
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                said = "".join(p.read_text() for p in self._run_dir.parent.glob("*.txt"))
                assert process.returncode is None, said


FLAGS = ["--steps=150", "--eval-every=0", "--sample-tokens=0", "--save-every=100"]
COPIES = ["--memory-copies-every=2", "--timeout-seconds=60"]


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_spare_node_takes_over(run_dir, lost):
    """The run ends as an undisturbed one, to the bit. Rank 0 may be on the lost node."""
    with Cluster(run_dir, "2", *FLAGS, *COPIES, "--mesh=dp=2") as cluster:
        nodes = {node: cluster.start(node) for node in ("a", "b")}
        cluster.until(lambda: cluster.rows() > 5, *nodes.values())
        nodes["spare"] = cluster.start("spare")
        cluster.until(lambda: cluster.rows() > 20, *nodes.values())
        kill(cluster.name(lost))
        nodes.pop(lost)
        codes = [process.wait(300) for process in nodes.values()]
        said = "".join(cluster.output(node).read_text() for node in nodes)
    assert codes == [0, 0], said
    assert "is loaded from the copies in" in said
    whole = Ranks(
        [*TINY, *FLAGS, "--mesh=dp=2", f"--run-dir={run_dir.with_name('whole')}"],
        2,
        run_dir.with_name("whole.txt"),
    )
    assert whole.codes() == [0, 0]
    assert losses(records(run_dir)) == losses(records(run_dir.with_name("whole")))


def test_a_node_that_joins_later_is_used(run_dir):
    with Cluster(run_dir, "1:2", *FLAGS, *COPIES, "--steps=1500") as cluster:
        nodes = [cluster.start("a")]
        cluster.until(lambda: cluster.rows() > 5, *nodes)
        nodes.append(cluster.start("b"))
        codes = [process.wait(300) for process in nodes]
        said = "".join(cluster.output(node).read_text() for node in ("a", "b"))
    assert codes == [0, 0], said
    assert "on dp=2" in said and "resumed at step" in said
    assert [record["step"] for record in records(run_dir)] == list(range(1, 1501))
