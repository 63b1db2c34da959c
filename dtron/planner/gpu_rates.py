"""The rates of a GPU and of its links, measured once and kept in a file.

``gpu/NAME.json`` has the rates with the versions that they were measured with. A file for a GPU
that nobody has may be written by hand. The rates are those of a GPU under load: its clock is then
lower than the clock of its data sheet.

A matmul's rate depends on its shape. It is the rate of the measured shape that is nearest, in the
logarithms of M, N and K. Attention is as fast as at the nearest head dim and sequence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.planner.operators import Operator

FOLDER = Path(__file__).parent / "gpu"


@dataclass(frozen=True)
class Link:
    """A way between GPUs.

    ``gbs``: gigabytes per second in one direction.
    ``us``: microseconds of a message of no bytes."""

    gbs: float
    us: float

    def seconds(self, nbytes: float) -> float:
        return self.us * 1e-6 + nbytes / self.gbs * 1e-9


@dataclass(frozen=True)
class Gpu:
    """The rates of one GPU.

    ``matmul``: for each number of bits, rows of M, N, K and TFLOP/s.
    ``attention``, ``flex_attention``: rows of head dim, sequence, and TFLOP/s in forward and in
        backward.
    ``gap_us``: idle microseconds between two kernels of a recorded step.
    ``beside_nccl``: how many times longer kernels take beside a kernel of NCCL.
    ``overhead_gib``: memory that is no tensor, such as the workspaces of libraries."""

    name: str
    memory_gib: float
    peak_tflops: float
    overhead_gib: float
    matmul: dict[str, list[list[float]]]
    grouped_matmul: float
    attention: list[list[float]]
    flex_attention: list[list[float]]
    memory_gbs: float
    gap_us: float
    nvlink: dict[str, float]
    copy_engines: dict[str, float]
    network: dict[str, float]
    host_gbs: float
    beside_nccl: float
    gpus_of_a_host: int
    measured: dict[str, str]

    @cached_property
    def links(self) -> dict[str, Link]:
        return {x: Link(**getattr(self, x)) for x in ("nvlink", "copy_engines", "network")}

    def seconds(self, op: Operator) -> float:
        """Return the time of a kernel, without the gap after it."""
        memory = (op.read + op.written) / self.memory_gbs * 1e-9
        if op.kind == "matmul":
            return max(memory, op.flops / self._matmul_rate(op) * 1e-12)
        if op.kind == "attention":
            table = self.flex_attention if "flex" in op.name else self.attention
            _, _, forward, backward = _nearest(table, (op.size[3], op.size[2]))
            rate = backward if "backward" in op.name else forward
            return max(memory, op.flops / rate * 1e-12)
        return memory

    def _matmul_rate(self, op: Operator) -> float:
        if "grouped" in op.name:
            return self.grouped_matmul
        batch, m, n, k = op.size
        table = self.matmul.get(str(op.bits)) or self.matmul["16"]
        return _nearest(table, (batch * m, n, k))[-1]


def _nearest(table: Sequence[Sequence[float]], point: Sequence[float]) -> Sequence[float]:
    def distance(row: Sequence[float]) -> float:
        pairs = zip(row, point, strict=False)
        return sum(math.log(max(a, 1) / max(b, 1)) ** 2 for a, b in pairs)

    return min(table, key=distance)


def known_gpus() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def rates_file(name: str) -> Path:
    """Return the file of a name such as h200, or of a path."""
    return Path(name) if name.endswith(".json") else FOLDER / f"{name.lower()}.json"


def load_gpu(name: str) -> Gpu:
    """Read a file of rates: a name such as h200, or a path. Raises UserError if there is no such
    file or if it lacks a rate."""
    path = rates_file(name)
    try:
        entries: Any = json.loads(path.read_text())
        return Gpu(**entries)
    except FileNotFoundError:
        names = ", ".join(known_gpus())
        raise UserError(f"--gpu {name}: no such file of rates; use {names} or a path") from None
    except (OSError, ValueError, TypeError) as error:
        why = str(error).replace("Gpu.__init__() ", "")
        raise UserError(f"--gpu {name}: not a file of rates ({why})") from None
