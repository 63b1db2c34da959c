"""Names that have changed, old to new: flags, fields of a config, metrics.

``RENAMED`` is the only place with old names. Two readers use it:

- A command line refuses an old flag and prints the new flag with its value (``refuse_old_flags``).
- Files of older versions are read under the new names (``current``): a run's config.json and
  metrics.jsonl, the identity in a checkpoint, the lines of benchmarks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dtron.errors import UserError


@dataclass(frozen=True)
class Renamed:
    """A row of the table. Names are dotted paths, as in ``optim.lr`` (the flag ``--optim.lr``).

    ``old``, ``new``: the names. ``*`` stands for a number.
    ``values``: new names and values for an old value. None: the value stays the same.
    ``switch``: the old flag took no value; ``--no-NAME`` turned it off."""

    old: str
    new: str
    values: Callable[[Any], dict[str, Any]] | None = None
    switch: bool = False

    def now(self, value: Any, number: str = "") -> dict[str, Any]:
        """Return the new names and values for an old value. ``number``: replaces the ``*``."""
        if self.values is not None:
            return self.values(value)
        return {self.new.replace("*", number): value}


def _reduce_dtype(in_bfloat16: bool) -> dict[str, Any]:
    return {"reduce_dtype": "bfloat16" if in_bfloat16 else "float32"}


def _no_graph(_: bool) -> dict[str, Any]:
    return {"cuda_graph": "off"}


def _resume(value: Any) -> dict[str, Any]:
    """Give the switch of older versions its value of today."""
    return {"resume": {True: "on", False: "off"}[value] if isinstance(value, bool) else value}


def _no_resume(_: bool) -> dict[str, Any]:
    return {"resume": "off"}


def _track(tensorboard: bool) -> dict[str, Any]:
    return {"track": "tensorboard" if tensorboard else "none"}


def _recompute(value: Any) -> dict[str, Any]:
    """Split ``budget=0.5`` into the policy and its share. Other values stay the same."""
    policy, _, share = str(value).partition("=")
    if policy != "budget" or not share:
        return {"recompute": value}
    try:
        return {"recompute": policy, "recompute_budget": float(share)}
    except ValueError:  # a flag with a value that was no number; the new flag refuses it too
        return {"recompute": policy, "recompute_budget": share}


RENAMED = (
    # fields of the config of a run, and so flags
    Renamed("schedule", "pipeline.schedule"),
    Renamed("pipeline.virtual", "pipeline.stages_per_rank"),
    Renamed("pipeline.split", "pipeline.layers"),
    Renamed("pipeline.gather", "zero3_gather"),
    Renamed("cp", "cp_method"),
    Renamed("dispatch", "moe_dispatch"),
    Renamed("attention", "attention_kernel"),
    Renamed("graph", "cuda_graph"),
    Renamed("reduce_bf16", "reduce_dtype", _reduce_dtype, switch=True),
    Renamed("fp8_ends", "fp8_first_last", switch=True),
    Renamed("fp8_smallest", "fp8_min_weights"),
    Renamed("max_skips", "max_nonfinite_steps"),
    Renamed("sample", "sample_tokens"),
    Renamed("timeout", "timeout_seconds"),
    Renamed("recompute", "recompute", _recompute),
    Renamed("resume", "resume", _resume),
    Renamed("no_resume", "resume", _no_resume, switch=True),
    Renamed("tensorboard", "track", _track, switch=True),
    Renamed("optim.min_lr", "optim.min_lr_ratio"),
    Renamed("optim.decay", "optim.wsd_decay_ratio"),
    Renamed("optim.clip", "optim.max_grad_norm"),
    Renamed("model.moe.capacity", "model.moe.capacity_factor"),
    Renamed("data.sequence", "data.seq_len"),
    Renamed("data.validation", "data.validation_ratio"),
    # flags of other commands and of benchmarks, and what benchmarks print
    Renamed("sequence", "seq_len"),
    Renamed("sequences", "seq_lens"),
    Renamed("virtual", "stages_per_rank"),
    Renamed("split", "pipeline.layers"),
    Renamed("reduce", "reduce_dtype"),
    Renamed("no_graph", "cuda_graph", _no_graph, switch=True),
    # metrics
    Renamed("ahead.*.loss", "mtp.*.loss"),
    Renamed("data_wait", "data_wait_ratio"),
    Renamed("memory_gib", "peak_memory_gib"),
    Renamed("save_seconds", "checkpoint_stall_seconds"),
    Renamed("skipped", "skipped_steps"),
)


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted name under their new names. New names stay as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        row = _row(re.sub(r"\.\d+\.", ".*.", name))
        number = re.search(r"\.(\d+)\.", name)
        found |= row.now(value, number[1] if number else "") if row else {name: value}
    return found


def current_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same for nested values, as in config.json."""
    return nested(current(dotted(values)))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name: ``{"optim": {"lr": 1}}`` is ``{"optim.lr": 1}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= dotted(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``dotted``."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return found


def refuse_old_flags(argv: Sequence[str], known: Collection[str]) -> None:
    """Raise UserError for the first old flag. The message has the new flag with its value.

    ``known``: the flags of this command. An old flag is left alone if its new name is no flag of
    this command."""
    for word, following in pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag[2:].replace("-", "_")
        row, on = _row(name), True
        if row is None:
            row, on = _row(re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name), switch=True), False
        if row is None:
            continue
        alone = row.switch or equals or following.startswith("--")
        typed = word if alone else f"{word} {following}".rstrip()
        now = row.now(on if row.switch else value if alone else following)
        if now.keys() != {name} and all(_flag(new) in known for new in now):
            written = " ".join(_written(new, v) for new, v in now.items())
            raise UserError(f"{typed}: was replaced; use {written}")


def last_component(flag: str) -> str | None:
    """Return the last component of the new flag, given the last component of the old flag:
    ``max-grad-norm`` for ``clip``. None if no flag ended so."""
    ends = {row.old.rpartition(".")[2]: row.new.rpartition(".")[2] for row in RENAMED}
    new = ends.get(flag.replace("-", "_"))
    return new and new.replace("_", "-")


def _row(old: str, switch: bool = False) -> Renamed | None:
    """Return the row of an old name. ``switch``: only if it was a switch."""
    return next((row for row in RENAMED if row.old == old and row.switch >= switch), None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _written(name: str, value: Any) -> str:
    """Return a flag with its value, as a shell takes it."""
    if isinstance(value, bool):
        group, dot, last = name.rpartition(".")
        return _flag(name if value else f"{group}{dot}no_{last}")
    return f"{_flag(name)} {shlex.quote(str(value))}" if value != "" else _flag(name)
