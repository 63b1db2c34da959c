"""PEFT adapter files: the low-rank updates of a model, without the model.

A folder has ``adapter_config.json`` (rank, alpha) and ``adapter_model.safetensors``, with two
matrices for each updated layer: ``lora_A.weight [rank, inputs]`` and ``lora_B.weight [outputs,
rank]``, and with DoRA a vector ``lora_magnitude_vector [outputs]``. Their places follow from the
family's table of weights (weight_tables.py): the pattern of A is that of the weight with the axis
``rank`` in the place of the outputs, and the pattern of B has it in the place of the inputs.

Left out: layers that hold several dtron weights in one matrix (``qkv_proj`` of Phi-3, ``c_attn`` of
GPT-2, experts in one tensor). There the updates of dtron have an A each, and PEFT has one A.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.checkpoint.safetensors import TensorReader, header
from dtron.checkpoint.safetensors_writer import write_file
from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.hf.family import Family
from dtron.hf.load import Place, place, rotary_columns
from dtron.hf.tensor_pattern import halves, pairs, pattern
from dtron.hf.weight_files import some
from dtron.json_files import read_object
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.lora import LoraConfig, can_update, in_block, with_lora
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec
from dtron.tree import Adapted, flat, units

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What a folder may say without a change of the result, and with which values.
_REFUSED = {
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "alora_invocation_tokens": None,
}


class FactorPlace(NamedTuple):
    """The place of A, of B or of the magnitude of a weight: the names of its tensors, one or one
    for each expert, and the pattern of each."""

    names: tuple[str, ...]
    place: Place
    experts: bool


def places(w: WeightSpec, family: Family, m: ModelConfig, dora: bool) -> list[FactorPlace] | None:
    """Return the places of A and B of a weight, and with ``dora`` of its magnitude; None if PEFT
    has no place for them.

    ``w``: the declaration of the weight, which can have an update."""
    whole = place(w, family, m)
    left, _, right = (part.strip() for part in whole.row.pattern.partition("->"))
    theirs, ours = re.findall(r"\([^)]*\)|\S+", left), re.findall(r"\([^)]*\)|\S+", right)
    ahead = int(w.axes[0] == "experts")
    first = ahead + w.summed
    groups = {_letters(group): group for group in theirs}
    ins, outs = _letters(" ".join(ours[ahead:first])), _letters(" ".join(ours[first:]))
    if {*groups} != {ins, outs} or any(mark in left for mark in "+/:"):
        return None
    experts, inputs, outputs = (
        " ".join(part) for part in (ours[:ahead], ours[ahead:first], ours[first:])
    )
    module, paired = whole.row.name.removesuffix(".weight"), whole.row.paired
    rows = [
        (f"rank {groups[ins]} -> {experts} {inputs} rank", "lora_A.weight", False),
        (f"{groups[outs]} rank -> {experts} rank {outputs}", "lora_B.weight", paired),
    ]
    if dora:
        rows.append((f"{groups[outs]} -> {experts} {outputs}", "lora_magnitude_vector", paired))
    made = []
    for text, factor, is_paired in rows:
        name = f"{_PREFIX}{module}.{factor}"
        row = whole.row._replace(name=name, pattern=text, paired=is_paired)
        at = Place(row, whole.sizes)
        made.append(FactorPlace(tuple(at.names()), at, bool(whole.outside)))
    return made


def _letters(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


class Adapter:
    """A folder of adapter files, opened and checked.

    ``config``: rank, alpha and targets of its updates."""

    def __init__(self, folder: str | Path, family: Family, m: ModelConfig):
        """Open the folder. Raises UserError if it holds anything but updates of this model."""
        self.folder, self._m = Path(folder), m
        self._reader = TensorReader(header(self.folder / WEIGHTS))
        said = read_object(self.folder / CONFIG)
        self._check(said)
        rank, alpha = said.get("r"), said.get("lora_alpha")
        if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
            raise UserError(
                f"{self.folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; they must be "
                "numbers of a LoRA"
            )
        if said.get("use_rslora"):  # arXiv:2312.03732: alpha / sqrt(rank)
            alpha *= math.sqrt(rank)
        dora = bool(said.get("use_dora"))
        self._places = {
            w.path: (w, at)
            for w in flat(declare_model(m))
            if can_update(w) and (at := places(w, family, m, dora)) is not None
        }
        targets = self._targets(rank)
        self.config = LoraConfig(rank, float(alpha), targets, dora, adapter=str(folder))

    def _check(self, said: dict[str, Any]) -> None:
        file = self.folder / CONFIG
        if said.get("peft_type") != "LORA":
            raise UserError(f"{file}: peft_type is {said.get('peft_type')!r}; dtron has LORA alone")
        for name, usual in _REFUSED.items():
            if (value := said.get(name, usual)) != usual and value:
                raise UserError(
                    f"{file}: {name} is {value!r}, which dtron has not; merge the adapter into "
                    "its model with peft, and give the model"
                )
        for name in ("rank_pattern", "alpha_pattern"):
            if said.get(name):
                raise UserError(
                    f"{file}: {name} gives layers other ranks or alphas, and dtron has one of "
                    "each; merge the adapter into its model with peft, and give the model"
                )

    def _targets(self, rank: int) -> str:
        """Return the patterns of the updated weights."""
        have = self._reader.entries
        by_path = {
            path: [n for factor in at for n in factor.names]
            for path, (_, at) in self._places.items()
        }
        known = {name for names in by_path.values() for name in names}
        if extra := [name for name in have if name not in known]:
            raise UserError(
                f"{self.folder / WEIGHTS}: has {some(extra)}, which is no update of this model; "
                "give the adapter of this model"
            )
        targets = [path for path, names in by_path.items() if any(n in have for n in names)]
        for path in targets:
            if lost := [name for name in by_path[path] if name not in have]:
                raise UserError(f"{self.folder / WEIGHTS}: lacks {some(lost)}; copy it again")
            for factor in self._places[path][1]:
                sizes = {**factor.place.sizes, "rank": rank}
                shape = pattern(factor.place.row.pattern).shape(sizes)
                for name in factor.names:
                    if have[name].shape != shape:
                        raise UserError(
                            f"{self.folder / WEIGHTS}: {name} is {list(have[name].shape)}, and "
                            f"for this model and r={rank} must be {list(shape)}; give the adapter "
                            "of this model"
                        )
        names = {path: in_block(w) or path for path, (w, _) in self._places.items()}
        return ",".join(_shortest(targets, names))

    def weight(self, w: WeightSpec, layout: Layout, dtype: torch.dtype, device: str) -> Tensor:
        """Load A, B or the magnitude of a weight. Not differentiable.

        ``w``: its declaration; see ``model.lora.declare_lora``."""
        path, _, factor = w.path.rpartition(".")
        at = self._places[path][1][("lora_a", "lora_b", "magnitude").index(factor)]
        with paused(), torch.no_grad():  # simulated ranks share the weights that are read
            x = torch.stack([self._read(name, at, w) for name in at.names])
            x = x if at.experts else x[0]
            x = x.to(device, dtype)
        return layout.shard(x, *w.axes)

    def _read(self, name: str, at: FactorPlace, w: WeightSpec) -> Tensor:
        p, sizes = pattern(at.place.row.pattern), {**at.place.sizes, "rank": self.config.rank}
        inside = [n for axes, n in zip(p.dims, w.shape, strict=True) if axes[0] not in p.outside]
        out = torch.empty(inside)
        ranges = {axis: (0, sizes[axis]) for axis in p.axes}
        out.copy_(p.take(self._reader.read(name), ranges, sizes))
        return halves(out, rotary_columns(self._m)) if at.place.row.paired else out


def _shortest(chosen: Collection[str], every: Mapping[str, str]) -> list[str]:
    """Return names that stand for these members and no others: a short name if all that have it are
    chosen, else the whole names.

    ``every``: the short name of each member."""
    by_name: dict[str, list[str]] = {}
    for member, name in every.items():
        by_name.setdefault(name, []).append(member)
    names = []
    for name, members in by_name.items():
        some_of = [member for member in members if member in chosen]
        names += [name] if len(some_of) == len(members) else some_of
    return names


def write_adapter(
    out: Path,
    m: ModelConfig,
    family: Family,
    config: LoraConfig,
    read: Callable[[WeightSpec], Tensor],
    base: str,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write the updates of a model as adapter files, and return their number. Raises UserError for
    a weight that PEFT has no place for.

    ``out``: a folder that exists.
    ``read``: reads a whole A or B.
    ``base``: the name of the model's folder."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    whole = replace(config, quantize_base="none")
    for node in units(with_lora(declare_model(m), whole)):
        if not isinstance(node, Adapted):
            continue
        w, *factors = flat(node)
        at = places(w, family, m, config.dora)
        if at is None:
            raise UserError(
                f"{w.path}: a {family.kind} has it in one matrix with other weights, and adapter "
                "files have no place for its update; export the merged model, without --adapter"
            )
        for spec, factor in zip(factors, at, strict=True):
            sizes = {**factor.place.sizes, "rank": config.rank}
            shape = pattern(factor.place.row.pattern).shape(sizes)
            for e, name in enumerate(factor.names):
                tensors[name] = dtype, shape
                expert = e if factor.experts else None
                makers[name] = _maker(m, factor.place, spec, sizes, read, expert)
    write_file(out / WEIGHTS, tensors, lambda name: makers[name](), {"format": "pt"})
    text = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": 0.0,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _shortest({*map(_module, tensors)}, _last_names(m, family)),
        "inference_mode": True,
    }
    (out / CONFIG).write_text(json.dumps(text, indent=2) + "\n")
    return len(tensors)


def _module(name: str) -> str:
    """Return the name of the layer of an update's matrix."""
    return name.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _last_names(m: ModelConfig, family: Family) -> dict[str, str]:
    """Return the last part of the name of every layer that can have an update. With experts it is
    the whole name: there PEFT takes a last part for the experts, too."""
    found = [places(w, family, m, False) for w in flat(declare_model(m)) if can_update(w)]
    modules = [_module(name) for at in found if at is not None for name in at[0].names]
    return {name: name if m.moe.experts else name.rpartition(".")[2] for name in modules}


def _maker(
    m: ModelConfig,
    at: Place,
    spec: Any,
    sizes: dict[str, int],
    read: Callable[[WeightSpec], Tensor],
    expert: int | None,
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        x = read(spec)
        x = x if expert is None else x[expert]
        x = pairs(x, rotary_columns(m)) if at.row.paired else x
        p = pattern(at.row.pattern)
        out = torch.empty(p.shape(sizes))
        p.put(out, x.float(), sizes)
        return out

    return make
