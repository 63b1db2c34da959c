"""Metrics of a run: a progress line, ``metrics.jsonl`` for plots, and optionally TensorBoard.

``metrics.jsonl`` has one JSON object per step. Unknown numbers are null (the MFU of a device with
no listed peak). A resumed run first drops the steps after its checkpoint, so every step is in the
file once.
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
from typing import TYPE_CHECKING, Any

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
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: str) -> float:
    """Return the peak memory of this process so far: memory allocated by torch on a GPU, the
    resident set on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def mark(device: str) -> Any:
    """Record a time in the device's stream. The host does not wait."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(a: Any, b: Any) -> float:
    """Seconds between two marks."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1e3


class Metrics:
    """Collects a run's steps. Only the main rank writes. The other ranks pass ``main=False`` and
    write nothing."""

    def __init__(
        self,
        run_dir: Path,
        device: str,
        ranks: int,
        flops_per_token: float,
        steps: int,
        start: int,
        main: bool,
        tensorboard: bool = False,
        console: Console | None = None,
    ):
        from rich.console import Console  # the benchmarks do without

        self._device, self._ranks, self._flops = device, ranks, flops_per_token
        self._steps, self._main, self._console = steps, main, console or Console(highlight=False)
        self._peak, self._tokens, self._file, self._board = peak_tflops(device), 0, None, None
        self._mark, self._begun, self._first = mark(device), time.perf_counter(), start
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
        waited=0.0,
    ) -> dict[str, Any]:
        """The record of a step that ended at the mark ``end`` (None: now); ``tokens`` is how many
        it trained on, over all ranks, and ``waited`` how many seconds this rank's host stood still
        for its data."""
        end = mark(self._device) if end is None else end
        seconds, self._mark = elapsed(self._mark, end), end
        self._tokens += tokens
        tflops = tokens * self._flops / seconds / self._ranks / 1e12
        record = {
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": self._tokens,
            "tokens_per_s": tokens / seconds, "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "peak_memory_gib": peak_memory_gib(self._device), "step_seconds": seconds,
            "data_wait_ratio": min(waited / seconds, 1.0),
        }  # fmt: skip
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a step to ``metrics.jsonl``, and to TensorBoard if enabled."""
        if self._main:
            known = {name: x if math.isfinite(x or 0) else None for name, x in record.items()}
            try:
                self._file.write(json.dumps(known, allow_nan=False) + "\n")
                self._blocked = False
            except OSError as error:  # a full disk is no reason to stop
                if not self._blocked:
                    self.say(
                        f"warning: {self._file.name}: cannot be written ({error.strerror}); training goes on"
                    )
                self._blocked = True
            if self._board is not None:
                for name, value in known.items():
                    if value is not None and name != "step":
                        self._board.add_scalar(name, value, record["step"])

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the next step."""
        self._mark = mark(self._device)

    def line(self, record: Mapping[str, Any]) -> None:
        """The progress line of a step."""
        done = record["step"] - self._first
        left = (time.perf_counter() - self._begun) / max(done, 1) * (self._steps - record["step"])
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        self.say(
            f"step {record['step']:>{len(str(self._steps))}}/{self._steps}  loss {record['loss']:.4f}  "
            f"grad norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{_experts(record)}{_short(record['tokens_per_s'])} tokens/s  "
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
    """Turn an OSError into a UserError: an unwritable file at the start is for the user to fix."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another --run-dir"
        ) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of an earlier run, whatever version wrote them. A partly written line
    is dropped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(current(json.loads(line)))
        except ValueError:
            continue
    return found


def _tensorboard(run_dir: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard: TensorBoard is not installed; pip install 'dtron[tensorboard]'"
        ) from error
    return SummaryWriter(str(run_dir), purge_step=start + 1)


def _experts(record: Mapping[str, Any]) -> str:
    """Format the load of the most imbalanced MoE layer and the largest dropped fraction."""
    of = lambda name: [
        v for k, v in record.items() if k.startswith("experts.") and k.endswith("." + name)
    ]
    if not (loads := of("load_max")):
        return ""
    dropped = max(of("dropped"))
    return f"load {max(loads):.2f}x  " + (f"dropped {dropped:.1%}  " if dropped else "")


def _short(n: float) -> str:
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
