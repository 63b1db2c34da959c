"""The optimizers by name, and the flags of the optimizer and of its learning rate."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from dtron.bounds import from_to, under
from dtron.errors import UserError
from dtron.training.adamw import AdamW
from dtron.training.lion import Lion
from dtron.training.low_bit_state import LowBitState, Masters, Moments
from dtron.training.muon import Muon
from dtron.training.offloaded_state import OffloadedState
from dtron.training.optimizer import Optimizer
from dtron.training.parameter_groups import ParameterGroups, parse_groups
from dtron.training.qk_clip import QKClip
from dtron.training.sgd import SGD
from dtron.training.weight_average import WeightAverage

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "lion": Lion, "sgd": SGD}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = "adamw"
    """the optimizer, by its name in training/optim_config.py"""
    options: str = ""
    """options that only this optimizer has, as momentum=0.9,nesterov=true"""
    groups: str = ""
    """other options for some weights, named by a logical axis or a pattern of paths:
    'vocab: lr=0.5x; blocks.0.*: lr=0.1x, weight_decay=0'"""
    lr: float = 1e-3
    """learning rate after warm-up"""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """after warm-up: constant; linear or cosine: down to min_lr_ratio * lr by the last step; wsd:
    constant, then a decay"""
    warmup: int = 20
    """number of steps from 0 to lr"""
    min_lr_ratio: float = 0.1
    """learning rate of the last step, as a share of lr"""
    wsd_decay_ratio: float = 0.2
    """wsd: share of steps, at the end, in which the rate decays"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the second moment's root"""
    weight_decay: float = 0.1
    """weight decay of matrices; norms and biases have none"""
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """constant; linear or cosine: from weight_decay to final_weight_decay by the last step"""
    final_weight_decay: float | None = None
    """weight decay of the last step; for weight_decay_schedule linear or cosine"""
    moments: Moments = "float32"
    """format of the optimizer's state of matrices: float32; bfloat16, rounded at random; or float8,
    in blocks of 32 with a scale"""
    master_weights: Masters = "float32"
    """format of the weights that are updated: float32 beside the bfloat16 weights that compute;
    split: only the 16 bits that bfloat16 lacks are stored beside these, and nothing is lost"""
    offload_state: bool = False
    """keep the optimizer's state in host memory, and copy it to the device chunk by chunk"""
    max_grad_norm: float = 1.0
    """largest global gradient norm; 0: do not clip"""
    skip_grad_norm: float = 0.0
    """a step with a larger gradient norm is skipped: it changes no weight; 0: no limit"""
    qk_clip: float = 0.0
    """largest attention logit: heads with a larger one get smaller query and key weights; 0: no
    limit"""
    ema: float = 0.0
    """decay of an average of the weights, which is validated and saved too; 0: no average"""

    def __post_init__(self) -> None:
        inf = float("inf")
        from_to(self, "optim", {"min_lr_ratio": (0, 1), "wsd_decay_ratio": (0, 1)})
        sizes = ("lr", "warmup", "max_grad_norm", "skip_grad_norm", "qk_clip")
        under(self, "optim", {name: inf for name in sizes})
        under(self, "optim", {"ema": 1})
        constant, final = self.weight_decay_schedule == "constant", self.final_weight_decay
        if constant and final is not None:
            raise UserError(
                f"optim.final_weight_decay={final}: a constant weight decay has no other value at "
                "the end; use --optim.weight-decay-schedule linear, or leave it out"
            )
        if not constant and final is None:
            raise UserError(
                f"optim.weight_decay_schedule={self.weight_decay_schedule}: goes to a value at the "
                "end of the run; give it by --optim.final-weight-decay"
            )
        if final is not None:
            under(self, "optim", {"final_weight_decay": inf})
        build_optimizer(self)  # checks the options

    @property
    def largest_weight_decay(self) -> float:
        """The largest weight decay of the run. It is the optimizer's option ``weight_decay``. A
        schedule multiplies it by a factor from 0 to 1 (lr_schedule.py). So a run may begin without
        weight decay."""
        return max(self.weight_decay, self.final_weight_decay or 0.0)


def build_optimizer(config: OptimConfig, mup: bool = False) -> Optimizer:
    """Return the optimizer that the flags name. An option of the optimizer (a field of its class)
    has the value of the flag of the same name; if there is none, ``options`` gives the value.

    ``mup``: see ``ParameterGroups``.

    Raises UserError for a name or an option that does not exist."""
    if config.name not in OPTIMIZERS:
        raise UserError(
            f"optim.name={config.name}: there is no such optimizer; use {' or '.join(OPTIMIZERS)}"
        )
    chosen: Any = OPTIMIZERS[config.name]  # a dataclass
    flags = {f.name for f in fields(config)}
    names = [f.name for f in fields(chosen) if f.compare]  # a compiled kernel is not an option
    values = {name: getattr(config, name) for name in names if name in flags}
    if "weight_decay" in values:
        values["weight_decay"] = config.largest_weight_decay
    elif config.weight_decay_schedule != "constant":
        raise UserError(
            f"optim.weight_decay_schedule={config.weight_decay_schedule}: {config.name} has no "
            "weight decay; leave it out"
        )
    optimizer = chosen(**values, **_options(config, [name for name in names if name not in flags]))
    rows = parse_groups(config.groups, optimizer, partial(_option, config))
    optimizer = ParameterGroups(optimizer, rows, mup) if rows or mup else optimizer
    if (config.moments, config.master_weights) != ("float32", "float32"):
        optimizer = LowBitState(optimizer, config.moments, config.master_weights)
    optimizer = QKClip(optimizer) if config.qk_clip else optimizer
    optimizer = WeightAverage(optimizer, config.ema) if config.ema else optimizer
    return OffloadedState(optimizer) if config.offload_state else optimizer


def _options(config: OptimConfig, names: list[str]) -> dict[str, Any]:
    values = {}
    for part in filter(None, config.options.split(",")):
        name, _, text = (word.strip() for word in part.partition("="))
        where = f"optim.options={config.options}"
        values[name] = _option(config, name, text, names, where, " beside the flags")
    return values


def _option(
    config: OptimConfig, name: str, text: str, names: list[str], where: str, beside: str = ""
) -> Any:
    """Return the value of an option of the optimizer.

    ``names``: the options that it may have.
    ``where``: what the user has given, for errors."""
    if name not in names:
        has = f"has {', '.join(names)}" if names else "has none"
        raise UserError(f"{where}: {config.name} has no option {name!r}{beside}; it {has}")
    kind = typing.get_type_hints(OPTIMIZERS[config.name])[name]
    try:
        return _PARSERS[kind](text)
    except (KeyError, ValueError):
        raise UserError(
            f"{where}: {name} must be a {kind.__name__}, not {text!r}; change it"
        ) from None


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: {"true": True, "false": False}.__getitem__,
}
