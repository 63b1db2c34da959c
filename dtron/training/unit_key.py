"""The key of a compiled unit in torch's cache of compiled code.

torch does not keep the traced graph of a unit, because some functions in the graph, such as our
``autograd.Function``s, are unknown to it. Without a graph, every start traces a unit's forward and
backward again. torch keeps such a graph if it is given a key that contains all that these functions
depend on. A graph is determined by the code of dtron, by the plain values in the unit's arguments,
by the mesh with this rank's place in it, and by what torch has in its own key: the tensors' shapes,
the settings, the versions.

A key must never be too small: two different graphs with one key would be a silent error. So
``unit_key`` has no key for a value that it does not know, and such a unit is traced at every start.

Left out: units on several ranks. torch cannot keep a graph with ``opaque`` functions
(torch_compile.py), because dynamo wraps each in a function that has no name.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

import dtron

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, Enum, attrgetter)


class UnknownValue(Exception):
    """A value of a unit's arguments that has no text."""


def unit_key(*values: Any) -> str | None:
    """Return the key of a unit with these plain values, or None if a value is unknown."""
    try:
        text = "\n".join((_code(), *map(_text, values)))
    except UnknownValue:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _text(x: Any) -> str:
    """Return a text of a value that differs for all different values."""
    if isinstance(x, (torch.Size, tuple, list)):
        return f"{_name(type(x))}({','.join(map(_text, x))})"
    if isinstance(x, (*_PLAIN, Shard, Replicate, Partial)):
        return f"{type(x).__name__}:{x!r}"
    if isinstance(x, Mapping):
        return "{" + ",".join(f"{_text(k)}:{_text(v)}" for k, v in x.items()) + "}"
    if isinstance(x, partial):
        return f"partial({_text(x.func)},{_text(x.args)},{_text(x.keywords)})"
    if isinstance(x, DeviceMesh):
        groups = [x.get_group(i).group_name for i in range(x.ndim)]
        shape = (tuple(x.mesh.shape), x.mesh_dim_names, tuple(x.get_coordinate() or ()), groups)
        return f"mesh({x.device_type},{_text(shape)})"
    if isinstance(x, types.MethodType):
        return f"{_name(x.__func__)} of {_text(x.__self__)}"
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return f"{_name(x)}({_text(x.__defaults__)},{_text(x.__kwdefaults__)},{_text(cells)})"
    if isinstance(x, type):
        return _name(x)
    if is_dataclass(x):
        values = {f.name: getattr(x, f.name) for f in fields(x)}
        return f"{_name(type(x))}{_text(values)}"
    raise UnknownValue(type(x))


def _name(x: Any) -> str:
    """Return the name of a function or class whose code is part of the key."""
    if x.__module__.partition(".")[0] not in ("dtron", "builtins", "torch", "functools"):
        raise UnknownValue(x)
    return f"{x.__module__}.{x.__qualname__}"


@cache
def _code() -> str:
    """Return a hash of dtron's code."""
    folder = Path(dtron.__file__).parent
    text = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        text.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return text.hexdigest()
