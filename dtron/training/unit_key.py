"""The keys of traced functions: in this process, and in torch's cache of compiled code on disk.

A traced function (traced_function.py) is determined by the plain values in its arguments, by the
mesh with this rank's place in it, and by the shapes of its tensors. ``describe`` makes a text of
plain values, which differs for all different values. On disk the code of dtron is part of the key,
too. What else torch's graphs depend on (shapes, settings, versions) is in torch's own key.

A key must never be too small: two different graphs with one key would be a silent error. An object
that has no text, such as a function whose code is not part of dtron, is told from others by its
address in this process, and has no key on disk. Such a function is traced at every start.
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


def describe(*values: Any) -> tuple[str, list[Any]]:
    """Return a text of these values, and the objects that the text names by their addresses. The
    text is a key as long as these objects live."""
    unknown: list[Any] = []
    return "\n".join([_text(x, unknown) for x in values]), unknown


def disk_key(*values: Any) -> str | None:
    """Return the key of a function that depends on these values, or None if one has no text."""
    text, unknown = describe(*values)
    return None if unknown else hashlib.sha256(f"{_code()}\n{text}".encode()).hexdigest()


def _text(x: Any, unknown: list[Any]) -> str:
    """Return a text of a value that differs for all different values."""
    inside = partial(_text, unknown=unknown)
    if isinstance(x, (*_PLAIN, Shard, Replicate, Partial)):
        return f"{type(x).__name__}:{x!r}"
    if isinstance(x, (torch.Size, tuple, list)):
        return f"{_name(type(x), unknown)}({','.join(map(inside, x))})"
    if isinstance(x, Mapping):
        return "{" + ",".join([f"{inside(k)}:{inside(v)}" for k, v in x.items()]) + "}"
    if isinstance(x, partial):
        return f"partial({inside(x.func)},{inside(x.args)},{inside(x.keywords)})"
    if isinstance(x, DeviceMesh):
        groups = [x.get_group(i).group_name for i in range(x.ndim)]
        shape = (tuple(x.shape), x.mesh_dim_names, tuple(x.get_coordinate() or ()), groups)
        return f"mesh({x.device_type},{inside(shape)})"
    if isinstance(x, types.MethodType):
        return f"{_name(x.__func__, unknown)} of {inside(x.__self__)}"
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        values = inside((x.__defaults__, x.__kwdefaults__, cells))
        return f"{_name(x, unknown)}({values})"
    if isinstance(x, type):
        return _name(x, unknown)
    if is_dataclass(x):
        values = inside({f.name: getattr(x, f.name) for f in fields(x)})
        return f"{_name(type(x), unknown)}{values}"
    return _address(x, unknown)


def _name(x: Any, unknown: list[Any]) -> str:
    """Return the name of a function or class whose code is part of the key on disk."""
    if x.__module__.partition(".")[0] in ("dtron", "builtins", "torch", "functools"):
        return f"{x.__module__}.{x.__qualname__}"
    return _address(getattr(x, "__code__", x), unknown)  # each call may make the function anew


def _address(x: Any, unknown: list[Any]) -> str:
    unknown.append(x)
    return f"{type(x).__name__} at {id(x)}"


@cache
def _code() -> str:
    """Return a hash of dtron's code."""
    folder = Path(dtron.__file__).parent
    text = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        text.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return text.hexdigest()
