"""The rates of a GPU and of its links, measured once and kept in a file.

``gpu/NAME.json`` has the rates with the versions that they were measured with (bench/calibrate.py).
A file for a GPU that nobody has may be written by hand: a number may be in the place of a table. A
file may be ``based_on`` another one and have the entries that differ.

A GPU that trains runs at its power limit. Its clock is then as high as the power allows: matmuls
take more power than attention, and attention takes more than kernels that wait for memory. So the
file has rates at one clock, and the power of each kind of work. ``Gpu.clock`` is the clock of a
mix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.planner.operators import Operator
from dtron.planner.rate_table import along, nearest, rate

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

    ``matmul``: for each number of bits, TFLOP/s by M, N and K (rate_table.py).
    ``batched_matmul``: rows of batch, M, N, K and TFLOP/s, in 16 bits.
    ``grouped_matmul``: TFLOP/s of experts' matmuls, by the rows of all experts, N and K.
    ``attention``, ``flex_attention``: rows of head dim, sequence, and TFLOP/s in forward and in
        backward.
    ``memory_gbs``: GB/s of a large kernel that reads and writes.
    ``memory``: rows of bytes and GB/s, by access (``Operator.access``).
    ``gap_us``: idle microseconds between two kernels of a recorded step.
    ``beside_nccl``: how many times longer kernels take beside a kernel of NCCL.
    ``overhead_gib``: memory that is no tensor, such as the workspaces of libraries.
    ``ghz``: the clock of the rates.
    ``max_ghz``: the highest clock.
    ``watts``: "limit", "idle", and by kind of work the watts at 1 GHz. They grow with the cube of
        the clock. Empty: the clock is that of the rates."""

    name: str
    memory_gib: float
    peak_tflops: float
    overhead_gib: float
    matmul: dict[str, Any]
    grouped_matmul: Any
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
    batched_matmul: list[list[float]] = field(default_factory=list)
    memory: dict[str, list[list[float]]] = field(default_factory=dict)
    ghz: float = 1.0
    max_ghz: float = 1.0
    watts: dict[str, float] = field(default_factory=dict)

    @cached_property
    def links(self) -> dict[str, Link]:
        return {x: Link(**getattr(self, x)) for x in ("nvlink", "copy_engines", "network")}

    def seconds(self, op: Operator, ghz: float | None = None) -> float:
        """Return the time of a kernel, without the gap after it.

        ``ghz``: the clock; the clock of the rates if not given."""
        memory = (op.read + op.written) / self._bandwidth(op) * 1e-9
        faster = 1e12 * (ghz or self.ghz) / self.ghz
        if op.kind == "matmul":
            return max(memory, op.flops / self._matmul_rate(op) / faster)
        if op.kind == "attention":
            table = self.flex_attention if "flex" in op.name else self.attention
            forward, backward = _attention_rates(table, op.size[3], op.size[2])
            tflops = backward if "backward" in op.name else forward
            return max(memory, op.flops / tflops / faster)
        return memory

    def clock(self, busy: Mapping[str, float], waiting: float) -> float:
        """Return the clock in GHz at which a mix of work takes the power limit.

        ``busy``: seconds by ``work_of``, at the clock of the rates.
        ``waiting``: seconds without work."""
        low, high = 0.1, self.max_ghz
        if not self.watts or self.power(busy, waiting, high) <= self.watts["limit"]:
            return high if self.watts else self.ghz
        for _ in range(40):
            middle = (low + high) / 2
            over = self.power(busy, waiting, middle) > self.watts["limit"]
            low, high = (low, middle) if over else (middle, high)
        return low

    def power(self, busy: Mapping[str, float], waiting: float, ghz: float) -> float:
        """Return the mean watts of a mix of work at a clock; 0 if the file has no watts."""
        if not self.watts:
            return 0.0
        took = {k: t if k == "elementwise" else t * self.ghz / ghz for k, t in busy.items()}
        total = sum(took.values()) + waiting
        work = sum(self.watts[k] * t for k, t in took.items())
        return self.watts["idle"] + (work * ghz**3 / total if total else 0.0)

    def _bandwidth(self, op: Operator) -> float:
        rows = self.memory.get(op.access) or self.memory.get("stream")
        return along(rows, op.read + op.written)[0] if rows else self.memory_gbs

    def _matmul_rate(self, op: Operator) -> float:
        batch, m, n, k = op.size
        if "grouped" in op.name:
            return rate(self.grouped_matmul, "", (m, n, k))
        if batch > 1 and op.bits == 16 and self.batched_matmul:
            return nearest(self.batched_matmul, op.size)
        table = self.matmul.get(str(op.bits)) or self.matmul["16"]
        return rate(table, op.layout, (batch * m, n, k))


def work_of(op: Operator) -> str:
    """Return the kind of a kernel's work, as ``Gpu.watts`` has it."""
    if op.kind == "matmul":
        return "matmul 8" if op.bits == 8 else "matmul 16"
    return "attention" if op.kind == "attention" else "elementwise"


def _attention_rates(rows: list[list[float]], head_dim: int, length: int) -> list[float]:
    best = min({row[0] for row in rows}, key=lambda d: abs(d - head_dim))
    return [*along([row[1:] for row in rows if row[0] == best], length)]


def known_gpus() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def rates_file(name: str) -> Path:
    """Return the file of a name such as h200, or of a path."""
    return Path(name) if name.endswith(".json") else FOLDER / f"{name.lower()}.json"


def load_gpu(name: str) -> Gpu:
    """Read a file of rates: a name such as h200, or a path. Raises UserError if there is no such
    file or if it lacks a rate."""
    try:
        return Gpu(**_entries(name))
    except FileNotFoundError:
        names = ", ".join(known_gpus())
        raise UserError(f"--gpu {name}: no such file of rates; use {names} or a path") from None
    except (OSError, ValueError, TypeError) as error:
        why = str(error).replace("Gpu.__init__() ", "")
        raise UserError(f"--gpu {name}: not a file of rates ({why})") from None


def _entries(name: str) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(rates_file(name).read_text())
    base = entries.pop("based_on", None)
    return {**_entries(base), **entries} if base else entries
