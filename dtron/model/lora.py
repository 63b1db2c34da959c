"""LoRA for a model: which weights have a low-rank update, and the declaration of these weights.

``with_lora`` changes the declared tree of a model, and nothing else changes: initial weights,
sharding, ZeRO, the optimizer and checkpoints all follow from this tree. layers/lora.py has the
arithmetic.

Left out: several sets of updates that are trained at once on different data.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.dora import DoRA
from dtron.layers.lora import LoRA
from dtron.layers.quantized_weight import BLOCK, QuantizedWeight, declare_quantized
from dtron.params import Dims, WeightSpec, zeros
from dtron.rules import place, rules_for
from dtron.tree import flat, map_units, nodes, tree_map


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): train a low-rank update of some weights, and no other weight."""

    rank: int = 0
    """rank of the updates; 0: train the whole model"""
    alpha: float = 0.0
    """factor of the updates, divided by the rank; 0: twice the rank"""
    targets: str = "*"
    """weights with an update, as patterns of their paths in a block: 'attention.*,mlp.w_up'. The
    weights of matmuls in blocks can have one"""
    dora: bool = False
    """DoRA (arXiv:2402.09353): also train the magnitude of each output of an updated weight"""
    trained: str = ""
    """weights to train whole beside the updates, as patterns of their paths: 'embedding.*,*norm*'
    (empty: none)"""
    quantize_base: Literal["none", "nf4", "fp8"] = "none"
    """format of the frozen weights of matmuls in blocks: nf4 has 4 bits (QLoRA), fp8 has 8"""
    adapter: str = ""
    """folder of PEFT adapter files with the initial updates of the --init-from model; it gives
    rank, alpha and targets"""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"--lora.rank {self.rank}: must not be negative; use --lora.rank 16")
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise UserError(
                f"--lora.alpha {self.alpha}: must be a number from 0; use --lora.alpha 32"
            )
        if not self.target_patterns:
            raise UserError("--lora.targets '': names no weight; use --lora.targets '*'")

    @property
    def target_patterns(self) -> tuple[str, ...]:
        return _patterns(self.targets)

    @property
    def trained_patterns(self) -> tuple[str, ...]:
        return _patterns(self.trained)

    @property
    def scale(self) -> float:
        """The factor of an update."""
        return (self.alpha or 2.0 * self.rank) / self.rank


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


NO_LORA = LoraConfig()


def with_lora(spec: Any, config: LoraConfig) -> Any:
    """Return the declared tree in which the targets have updates and the other weights are frozen,
    but for those of ``config.trained``. Without a rank the tree stays as it is.

    ``spec``: the tree of the model, or the trees of some stages."""
    if not config.rank:
        return spec

    def changed(w: WeightSpec) -> Any:
        if w.buffer:
            return w
        if is_target(w, config):
            return declare_lora(w, config)
        return w if _matches(w, config.trained_patterns) else _frozen(w, config)

    return tree_map(changed, spec)


def without_updates(weights: Any) -> Any:
    """Return the weights of the model as it was before training: the frozen weights alone."""

    def frozen(unit: Any) -> Any:
        while isinstance(unit, (LoRA, DoRA)):
            unit = unit.base
        return unit

    return map_units(frozen, weights)


def is_update(w: WeightSpec) -> bool:
    """Whether a weight belongs to an update."""
    return "rank" in w.axes or w.derived


def is_target(w: WeightSpec, config: LoraConfig) -> bool:
    """Whether a weight has an update: a pattern names it, and it can have one."""
    return config.rank > 0 and can_update(w) and _matches(w, config.target_patterns)


def can_update(w: WeightSpec) -> bool:
    """Whether a weight can have an update: a weight of a matmul, in a block."""
    return w.summed > 0 and in_block(w) is not None


def declare_lora(w: WeightSpec, config: LoraConfig) -> Any:
    """Return the declarations of a frozen weight and of its update."""
    experts = w.axes[0] == "experts"
    first = int(experts) + w.summed
    ahead, rank = int(experts), config.rank
    of_a, of_b = (*w.axes[:first], "rank"), (*w.axes[:ahead], "rank", *w.axes[first:])
    shapes = (*w.shape[:first], rank), (*w.shape[:ahead], rank, *w.shape[first:])
    a = WeightSpec(f"{w.path}.lora_a", of_a, shapes[0], rows_uniform)
    b = WeightSpec(f"{w.path}.lora_b", of_b, shapes[1], zeros)
    leaves: Any = {"base": _frozen(w, config), "lora_a": a, "lora_b": b}
    node = LoRA(**leaves, scale=config.scale, first=first, experts=experts)
    if not config.dora:
        return node
    axes, shape = (*w.axes[:ahead], *w.axes[first:]), (*w.shape[:ahead], *w.shape[first:])
    magnitude: Any = WeightSpec(
        f"{w.path}.magnitude", axes, shape, zeros, decays=False, derived=True
    )
    return DoRA(node, magnitude)


def _frozen(w: WeightSpec, config: LoraConfig) -> Any:
    """Return the declaration of a weight that is frozen."""
    if config.quantize_base == "none" or not can_update(w):
        return replace(w, frozen=True)
    return declare_quantized(w, config.quantize_base)


def rows_uniform(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw A from a uniform distribution between -1 / sqrt(I) and 1 / sqrt(I), as ``peft`` does
    (arXiv:1502.01852 with a slope of sqrt(5))."""
    bound = 1 / math.sqrt(math.prod(w.shape[int(w.axes[0] == "experts") : -1]))
    x = torch.empty(w.shape, device=generator.device)
    return x.uniform_(-bound, bound, generator=generator)


def check_lora(spec: Any, config: LoraConfig, shape: MeshShape, zero: int) -> None:
    """Raise UserError for a pattern that names no weight, and for weights that cannot be stored in
    the format of the config on this mesh.

    ``spec``: the declared tree of the whole model, without updates."""
    if not config.rank:
        return
    atoms = {axis: n for axis, n in shape.atoms.items() if axis != "pp"}
    for node in nodes(with_lora(spec, config), QuantizedWeight):
        w, last = cast(WeightSpec, node.base), node.shape[-1]
        at = place(rules_for(zero), list(atoms), *w.axes)
        sizes = zip(at, atoms.values(), strict=True)
        shards = math.prod(n for p, n in sizes if p.is_shard(len(w.shape) - 1))
        if last % (shards * BLOCK):
            raise UserError(
                f"--lora.quantize-base {config.quantize_base}: the last axis of {w.path} is "
                f"{last}, and its {shards} shards are not whole blocks of {BLOCK}; leave it out, "
                "or use another mesh"
            )
    targets = [w for w in flat(spec) if can_update(w)]
    _check("targets", config.target_patterns, targets)
    _check("trained", config.trained_patterns, flat(spec))


def _check(name: str, patterns: Sequence[str], weights: Sequence[WeightSpec]) -> None:
    for pattern in patterns:
        if not any(_matches(w, (pattern,)) for w in weights):
            known = list(dict.fromkeys(in_block(w) or w.path for w in weights))
            near = (difflib.get_close_matches(pattern, known, n=1, cutoff=0.0) or ["*"])[0]
            raise UserError(
                f"--lora.{name} {pattern!r}: names no weight that can have "
                f"{'an update' if name == 'targets' else 'a gradient'}; did you mean {near!r}?"
            )


def _matches(w: WeightSpec, patterns: Sequence[str]) -> bool:
    names = w.path, in_block(w) or w.path
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def in_block(w: WeightSpec) -> str | None:
    """Return the path of a weight inside its block, such as ``attention.w_q``; None if it is in no
    block."""
    found = re.fullmatch(r"(?:blocks|mtp)\.\d+\.(?:block\.)?(.+)", w.path)
    return None if found is None else found[1]
