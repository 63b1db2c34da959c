"""One model family of Hugging Face: a record of tables. families.py lists the families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtron.hf.rope_config import RopeFormat
from dtron.hf.weight_tables import Row
from dtron.model.config import ModelConfig


def _no_fields(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_entries(m: ModelConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A model family of Hugging Face.

    ``kind``: the ``model_type`` in config.json.
    ``architecture``: the entry of ``architectures`` in config.json.
    ``weights``: the place of each weight.
    ``keys``: dtron's fields and the keys of config.json; ``a|b`` if a key has two names.
    ``defaults``: the values of keys that config.json lacks, in Hugging Face's names.
    ``fixed``: the fields that all models of the family share.
    ``demands``: keys for which dtron computes one value only. A missing key has this value.
    ``stacked``: the places of weights in the folders that have all experts in one tensor.
    ``ignored``: patterns of tensors that are no weights of the model. ``{later}`` is the number of
    a block after the model's last.
    ``aliases``: other values of ``model_type`` of the same model.
    ``container``: the ``model_type`` of folders with images too, whose config.json has this model
    in ``text_config``; empty: there are none.
    ``rope``: the RoPE entries that transformers reads.
    ``prefix``: the prefix of tensor names.
    ``renamed``: other names of the same tensors: regular expressions, each with its replacement.
    ``read(entries, fields)``: more fields, where the tables do not suffice. ``entries`` has the
    defaults of keys that config.json lacks.
    ``write(model)``: more entries of config.json, where the tables do not suffice."""

    kind: str
    architecture: str
    weights: Mapping[str, Row]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    stacked: Mapping[str, Row] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    aliases: tuple[str, ...] = ()
    container: str = ""
    rope: RopeFormat = RopeFormat()
    prefix: str = "model."
    renamed: tuple[tuple[str, str], ...] = ()
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = _no_fields
    write: Callable[[ModelConfig], dict[str, Any]] = _no_entries
