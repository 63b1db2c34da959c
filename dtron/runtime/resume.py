"""Resume: the config of the run goes on, and flags override it.

``--resume`` reads ``config.json`` of the run directory. So the command need not repeat the flags of
the first start. A flag that is given overrides the config, and a line says so. What defines the run
(the model, the text, the seed) is compared with the checkpoint when it is loaded
(runtime/initial_state.py): there another value is refused.

``--resume auto`` is the command of a requeued job. It begins the run, goes on, or has nothing to
do, whichever is due.

A process that torchrun has started again keeps the flags that it was started with: they are the
flags of the run.

Left out: a choice of the checkpoint. ``--resume`` takes the newest one. To go on from an earlier
one, move the later ones away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dtron import checkpoint
from dtron.checkpoint.storage import AnyPath, any_path
from dtron.errors import UserError
from dtron.hf.source_files import ORIGIN
from dtron.renamed import dotted
from dtron.runtime.config import RunConfig
from dtron.training.lr_schedule import learning_rate

# These flags describe this start, and not the run. A run directory may have been moved.
OF_THE_START = ("resume", "run_dir")
SCHEDULE = ("lr", "schedule", "warmup", "min_lr_ratio", "wsd_decay_ratio")


def with_value(argv: Sequence[str]) -> list[str]:
    """Return the arguments with ``--resume on`` for ``--resume`` without a value."""
    found: list[str] = []
    for word, following in pairwise([*argv, "--"]):
        found.append(word)
        if word == "--resume" and following.startswith("-"):
            found.append("on")
    return found


def same_folder(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and Path(a).resolve() == Path(b).resolve())


def check_source(given: str | None, previous: RunConfig) -> None:
    """Raise UserError if ``--init-from`` is not the folder that the run began from. The weights
    come from the checkpoint, so another folder would have no effect."""
    if given is not None and not same_folder(given, previous.init_from):
        began = previous.init_from or "random weights"
        raise UserError(
            f"--init-from {given}: this run began from {began}, and goes on from its checkpoint; "
            "drop --init-from, or begin another run with another --run-dir"
        )


def changes(previous: RunConfig, config: RunConfig, step: int, samples: int) -> list[str]:
    """Return a line for each value that differs from the config of the run, and a line about the
    learning rate if its schedule has changed.

    ``step``, ``samples``: the steps that are done, and the samples that they have used."""
    before, now = dotted(asdict(previous)), dotted(asdict(config))
    lines = [
        f"--{name.replace('_', '-')}: {_shown(before.get(name))} -> {_shown(value)}"
        for name, value in now.items()
        if value != before.get(name) and name not in OF_THE_START
    ]
    old, new = previous.optim, config.optim
    progress = previous.progress(step, samples), config.progress(step, samples)
    if any(getattr(old, name) != getattr(new, name) for name in SCHEDULE) or (
        progress[0] != progress[1] and new.schedule != "constant"
    ):
        rates = learning_rate(old, progress[0]), learning_rate(new, progress[1])
        lines.append(
            f"the learning-rate schedule has changed: step {step + 1} has the rate "
            f"{rates[1]:.3e}, before the change {rates[0]:.3e}"
        )
    return lines


def _shown(value: Any) -> str:
    return str(value) if value != "" else "''"


def place_of_run(store: str | None, run_dir: Path) -> AnyPath:
    """Return where the checkpoints of a run are. ``store``: the value of ``--checkpoint-store``.
    Raises UserError for a store that cannot be opened."""
    return run_dir if store in (None, "None") else any_path(store, "--checkpoint-store")


def finished(config: RunConfig, newest: AnyPath) -> bool:
    """Whether the newest checkpoint is the end of the run."""
    return checkpoint.read_meta(newest).step >= config.steps


def of_this_start(previous: RunConfig, run_dir: str) -> RunConfig:
    """Return the config of a run as the default of this start. The tokenizer of ``--init-from`` is
    the run's own copy, if the folder is gone."""
    data, copy = previous.data, Path(run_dir) / ORIGIN / "tokenizer.json"
    if previous.init_from and data.tokenizer and not Path(data.tokenizer).exists():
        of_source = Path(data.tokenizer) == Path(previous.init_from) / copy.name
        if of_source and copy.is_file():
            data = replace(data, tokenizer=str(copy))
    return replace(previous, resume="off", run_dir=run_dir, data=data)
