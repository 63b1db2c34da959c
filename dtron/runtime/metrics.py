"""Metrics of a run: a progress line, ``metrics.jsonl`` for plots, and optionally TensorBoard.

``metrics.jsonl`` has one JSON object per step. An unknown number is null, such as the MFU of a
device with no listed peak. A resumed run first drops the steps after its checkpoint, so every step
is in the file once.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from dtron.errors import UserError
from dtron.renamed import current

if TYPE_CHECKING:
    from rich.console import Console

# Dense bf16 TFLOP/s from the vendors' datasheets, keyed by a substring of the device name.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "MI300X": 1307.0,
}


def peak_tflops(device: str) -> float | None:
    """Return the peak of a device in dense bf16 TFLOP/s; None if no peak is listed."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: str) -> float:
    """Return the peak memory of this process so far: memory allocated by torch on a GPU, the
    resident set on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes; the unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def mark(device: str) -> Any:
    """Record a time in the device's stream. The host does not wait."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(a: Any, b: Any) -> float:
    """Return the seconds between two marks."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1e3


class Throughput(NamedTuple):
    """The numbers that turn seconds into tokens/s, TFLOP/s and MFU.

    ``device``: the device of this rank.
    ``ranks``: the number of devices.
    ``flops_per_token``: the FLOPs of forward and backward, without recomputation
        (model/flops.py)."""

    device: str
    ranks: int
    flops_per_token: float

    def per_second(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Return the rates of a step.

        ``tokens``: the tokens of the step, over all ranks."""
        tflops = tokens * self.flops_per_token / seconds / self.ranks / 1e12
        peak = peak_tflops(self.device)
        return {
            "tokens_per_s": tokens / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
        }


class Metrics:
    """Collects a run's steps. Only the main rank writes. The other ranks pass ``main=False`` and
    write nothing.

    ``steps``: the last step of the run.
    ``start``: the step after which the run resumes; 0: a new run.
    ``console``: prints the progress lines; None: the standard output."""

    def __init__(
        self,
        run_dir: Path,
        throughput: Throughput,
        steps: int,
        start: int,
        main: bool,
        tensorboard: bool = False,
        console: Console | None = None,
    ):
        from rich.console import Console  # imported here: benchmarks run without rich

        self._throughput, self._device = throughput, throughput.device
        self._steps, self._main, self._console = steps, main, console or Console(highlight=False)
        self._tokens, self._board = 0, None
        self._file: TextIO | None = None
        self._mark, self._begun, self._first = mark(self._device), time.perf_counter(), start
        self._blocked = False  # whether the last write to the file failed
        if main:
            path = run_dir / "metrics.jsonl"
            kept = [line for line in _lines(path) if line.get("step", math.inf) <= start]
            with writing(path):
                path.write_text("".join(json.dumps(line) + "\n" for line in kept))
                self._file = path.open("a", buffering=1)
            self._tokens = kept[-1]["tokens"] if kept else 0
            if tensorboard:
                self._board = _tensorboard(run_dir, start)

    def step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        end: Any = None,
        waited: float = 0.0,
    ) -> dict[str, Any]:
        """Return the record of a step.

        ``tokens``: the number of valid targets of the step, over all ranks.
        ``end``: the mark at which the step ended (None: now).
        ``waited``: the seconds that this rank's host waited for data."""
        end = mark(self._device) if end is None else end
        seconds, self._mark = elapsed(self._mark, end), end
        self._tokens += tokens
        return {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": self._tokens,
            **self._throughput.per_second(tokens, seconds),
            "peak_memory_gib": peak_memory_gib(self._device),
            "step_seconds": seconds,
            "data_wait_ratio": min(waited / seconds, 1.0),
        }

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a step to ``metrics.jsonl``, and to TensorBoard if enabled."""
        if self._file is not None:
            known = {name: x if math.isfinite(x or 0) else None for name, x in record.items()}
            try:
                self._file.write(json.dumps(known, allow_nan=False) + "\n")
                self._blocked = False
            except OSError as error:  # a full disk is no reason to stop
                if not self._blocked:
                    why = f"cannot be written ({error.strerror})"
                    self.say(f"warning: {self._file.name}: {why}; training goes on")
                self._blocked = True
            if self._board is not None:
                for name, value in known.items():
                    if value is not None and name != "step":
                        self._board.add_scalar(name, value, record["step"])

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the next step."""
        self._mark = mark(self._device)

    def line(self, record: Mapping[str, Any]) -> None:
        """Print the progress line of a step."""
        step = record["step"]
        trained = step - self._first  # by this process
        left = (time.perf_counter() - self._begun) / max(trained, 1) * (self._steps - step)
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        self.say(
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {record['loss']:.4f}  "
            f"grad norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{_extras(record)}{_experts(record)}{_short(record['tokens_per_s'])} tokens/s  "
            f"{record['tflops_per_device']:.3g} TFLOP/s{mfu}  "
            f"{record['peak_memory_gib']:.1f} GiB  left {_clock(left)}"
        )

    def say(self, text: str) -> None:
        if self._main:
            self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # already reported
                self._file.close()
        if self._board is not None:
            self._board.close()


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a UserError: the user can fix a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another --run-dir"
        ) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of an earlier run, of any version of dtron. A partly written line is
    dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(current(json.loads(line)))
        except ValueError:
            continue
    return records


def _tensorboard(run_dir: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard: TensorBoard is not installed; pip install 'dtron[tensorboard]'"
        ) from error
    return SummaryWriter(str(run_dir), purge_step=start + 1)


def _extras(record: Mapping[str, Any]) -> str:
    """Format the losses beside cross entropy: of the modules of multi-token prediction, and the
    head's z-loss."""
    mtp = [x for name, x in record.items() if name.startswith("mtp.") and name.endswith(".loss")]
    text = f"mtp {' '.join(f'{x:.4f}' for x in mtp)}  " if mtp else ""
    return text + (f"z-loss {record['z_loss']:.3f}  " if "z_loss" in record else "")


def _experts(record: Mapping[str, Any]) -> str:
    """Format the load of the most imbalanced MoE layer and the largest dropped fraction."""

    def by_layer(name: str) -> list[float]:
        keys = (k for k in record if k.startswith("experts.") and k.endswith("." + name))
        return [record[k] for k in keys]

    if not (loads := by_layer("load_max")):
        return ""
    dropped = max(by_layer("dropped"))
    return f"load {max(loads):.2f}x  " + (f"dropped {dropped:.1%}  " if dropped else "")


def _short(n: float) -> str:
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
