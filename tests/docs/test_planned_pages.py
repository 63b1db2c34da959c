"""Every model on every mesh that a command of a page names can be trained, and fits the GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.losses.config import LossConfig
from dtron.planner.gpu_rates import load_gpu
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.testing import assert_caught
from dtron.tools.plan import compiled_plan, plan_config, quiet
from tests.helpers.pages import CONFIGS, FENCE, PAGES, Command, commands, main_of, parsed

pytestmark = pytest.mark.xdist_group("pages")

BENCH = "bench/train.py"
FROM_FILES = {"--resume", "--from", "--init-from", "--help"}  # a model that is not on the page
LONG = 65_536  # tokens of a sequence whose plan takes many seconds
DEEP = 24  # blocks, the same
GPU = "h200"  # the only GPU that the pages name


def named(page: str) -> Iterator[Command]:
    """Yield the commands of a page that name a mesh or a model. Commands in fences of text are
    among them, which are too slow to be run by a test."""
    shown = [code for language, code in FENCE.findall(page) if language == "text"]
    lines = "\n".join(shown).replace("\\\n", " ").splitlines()
    slow = [c for line in lines if line.startswith("dtron plan") for c in parsed(line)]
    for command in (*commands(page), *slow):
        names = {word.partition("=")[0] for word in command.args}
        if not command.script and {"--mesh", "--model"} & names and not FROM_FILES & names:
            yield command


def config_of(command: Command) -> RunConfig | None:
    """Return the config of a command; None if it is no command of a step."""
    if command.program == BENCH:
        main_of(BENCH)  # loads step_flags, which is beside it
        flags = sys.modules["step_flags"]
        return flags.run_config(flags.arguments([*command.args]))
    if command.program not in ("train", "plan", "show", "verify") or "search" in command.args:
        return None
    found = cli.parse(command.args, CONFIGS[command.program]())
    same = {f.name: getattr(found, f.name) for f in fields(RunConfig) if hasattr(found, f.name)}
    if command.program in ("show", "verify"):  # they have no batch of a run
        same |= {"batch": MeshShape.parse(found.mesh).data, "micro_batch": 1}
    if command.program == "verify":  # it computes on a CPU, and draws what a loss needs
        same |= {"compile": "auto", "dtype": "auto", "loss": LossConfig()}
    return RunConfig(**same)


@cache
def steps() -> dict[str, tuple[Command, RunConfig]]:
    """Return the commands of all pages by their text, one of each config."""
    found: dict[str, tuple[Command, RunConfig]] = {}
    for page in PAGES:
        for command in named(page.read_text()):
            config = config_of(command)
            if config is not None and all(config != other for _, other in found.values()):
                found[command.text] = command, config
    return found


def assert_possible(config: RunConfig) -> None:
    compiled_plan(config, MeshShape.parse(config.mesh))


def assert_fits(config: RunConfig, gpu: str = GPU) -> None:
    quiet()
    plan = plan_config(config, gpu)
    assert plan.fits, f"{plan.gib:.1f} GiB"


def marks(command: Command, config: RunConfig) -> list[pytest.MarkDecorator]:
    """Run by default: the commands that need a GPU, if their plan takes a few seconds."""
    large = config.model.layers > DEEP or config.data.seq_len >= LONG
    return [pytest.mark.slow] if large or command.needs is None else []


def test_no_step_of_a_page_is_refused():
    assert len(steps()) > 30
    for text, (_, config) in steps().items():
        try:
            assert_possible(config)
        except UserError as error:
            pytest.fail(f"{text}: {error}")


@pytest.mark.parametrize(
    "config", [pytest.param(c, id=text, marks=marks(x, c)) for text, (x, c) in steps().items()]
)
def test_a_step_of_a_page_fits_the_gpu(config):
    assert_fits(config)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("dtron plan --model llama3-8b --mesh tp=16", "kv_heads"),
        ("dtron plan --model tiny --mesh dp=3 --batch 8", "3 data ranks"),
    ],
)
def test_a_step_that_is_refused_is_noticed(line, reason):
    (command,) = named(f"```text\n{line}\n```")
    with pytest.raises(UserError, match=reason):
        assert_possible(config_of(command))


def test_a_step_that_does_not_fit_is_noticed(monkeypatch):
    (command,) = named("```bash\ndtron plan --model tiny-moe --batch 2\n```")
    small = replace(load_gpu(GPU), memory_gib=0.1)
    monkeypatch.setattr("dtron.tools.plan.load_gpu", lambda name: small)
    assert_caught(lambda: assert_fits(config_of(command)))
