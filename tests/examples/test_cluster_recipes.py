"""The recipes of examples/cluster can be read, and their flags are flags of train.py."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dtron.errors import UserError
from dtron.runtime.cli import parse

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
SCRIPTS = ("slurm.sbatch", "ssh.sh", "spare_nodes.sh")


def flags_of(words: list[str]) -> list[str]:
    """The flags after ``train.py``, or after ``dtron train``, in a command of torchrun."""
    at = words.index("train.py" if "train.py" in words else "train")
    return words[at + 1 :]


def of_kubernetes() -> list[str]:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return container["command"]


def of_skypilot() -> list[str]:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    return shlex.split(task["run"])


def of_script(name: str) -> list[str]:
    """The command in the comment at the top of a script."""
    text = (FOLDER / name).read_text()
    *_, command = re.findall(r"^#   (.*examples/cluster/.*(?:\n#       .*)?)$", text, re.MULTILINE)
    words = shlex.split(command.replace("#", "").replace("\\\n", " "))
    return words[words.index(f"examples/cluster/{name}") + 1 :]


def check(flags: list[str]) -> None:
    config = parse(["--resume", "auto", *flags])
    assert config.resume == "auto" and config.run_dir


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_read(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    check(of_script(name))


@pytest.mark.parametrize("command", [of_kubernetes, of_skypilot])
def test_flags_are_flags_of_train(command):
    check([word for word in flags_of(command()) if word not in ("--resume", "auto")])


def test_a_wrong_flag_is_noticed():
    with pytest.raises(UserError, match="--meshes"):
        check([*of_script("ssh.sh"), "--meshes", "dp=2"])
