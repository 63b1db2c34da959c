"""Metrics of a run: a progress line, ``metrics.jsonl`` for plots, and trackers (trackers/).

``metrics.jsonl`` has one JSON object per step. An unknown number is null, such as the MFU of a
device with no listed peak. A resumed run first drops the steps after its checkpoint, so every step
is in the file once.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtron.runtime.output import Output, append_line, replace_file, writing
from dtron.runtime.step_records import METRICS, each_step
from dtron.runtime.summary import duration
from dtron.runtime.trackers.tracked_run import TrackedRun
from dtron.runtime.trackers.tracker import Ending

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
    ``start``: the step after which the run resumes; 0: a new run. A new run keeps the file of an
        earlier run under another name.
    ``tracked``: the trackers, which get the same records."""

    def __init__(
        self,
        run_dir: Path,
        throughput: Throughput,
        steps: int,
        start: int,
        main: bool,
        tracked: TrackedRun | None = None,
    ):
        self._throughput, self._device = throughput, throughput.device
        self._steps, self._main, self._output = steps, main, Output(main)
        self._tokens, self._tracked = 0, tracked
        self._path = run_dir / METRICS
        self._mark, self._begun, self._first = mark(self._device), time.perf_counter(), start
        self._reported: set[str] = set()  # warnings
        if main:
            with writing(self._path):
                records = list(each_step(self._path))
                if records and not start:
                    self.say(
                        f"{self._path}: the file of an earlier run is now {_aside(self._path)}"
                    )
                kept = [record for record in records if record["step"] <= start]
                lines = "".join(json.dumps(record) + "\n" for record in kept)
                replace_file(self._path, lines.encode())
            self._tokens = kept[-1]["tokens"] if kept else 0

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
        """Append a record to ``metrics.jsonl``, and hand it to the trackers."""
        if not self._main:
            return
        known = {name: x if math.isfinite(x or 0) else None for name, x in record.items()}
        with self._going_on(self._path):
            if not self._path.exists():
                self._report(self._path, "was deleted; it begins anew")
            append_line(self._path, json.dumps(known, allow_nan=False))
        if self._tracked is not None:
            self._tracked.write(known)
            self._say_of_trackers()
        self._output.live(partial(self._text, record))

    @contextmanager
    def _going_on(self, output: Path) -> Iterator[None]:
        """Report that an output cannot be written, once: a full disk is no reason to stop."""
        try:
            yield
        except OSError as error:
            self._report(output, f"cannot be written ({error.strerror}); training goes on")

    def _report(self, output: Path, problem: str) -> None:
        warning = f"warning: {output}: {problem}"
        if warning not in self._reported:
            self._reported.add(warning)
            self.say(warning)

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the next step."""
        self._mark = mark(self._device)

    def line(self, record: Mapping[str, Any]) -> None:
        """Print the progress line of a step."""
        self.say(self._text(record))

    def _text(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        trained = step - self._first  # by this process
        left = (time.perf_counter() - self._begun) / max(trained, 1) * (self._steps - step)
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {record['loss']:.4f}  "
            f"grad norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{_extras(record)}{_experts(record)}{_short(record['samples'])} samples  "
            f"{_short(record['tokens'])} tokens  {_short(record['tokens_per_s'])} tokens/s  "
            f"{record['tflops_per_device']:.3g} TFLOP/s{mfu}  "
            f"{record['peak_memory_gib']:.1f} GiB  left {duration(left)}"
        )

    def say(self, text: str) -> None:
        self._output.say(text)

    def _say_of_trackers(self) -> None:
        if self._tracked is not None:
            for message in self._tracked.drain_messages():
                self.say(message)

    def close(self, ending: Ending = "finished", seconds: float = 60.0) -> None:
        """End the output. The trackers get so many seconds for the last records."""
        self._output.end_live()
        if self._tracked is not None:
            self._tracked.close(ending, seconds)
            self._say_of_trackers()


def _aside(path: Path) -> str:
    """Give a file a name that is free, ``metrics-1.jsonl`` for example, and return this name."""
    names = (f"{path.stem}-{n}{path.suffix}" for n in itertools.count(1))
    name = next(name for name in names if not path.with_name(name).exists())
    path.rename(path.with_name(name))
    return name


def _extras(record: Mapping[str, Any]) -> str:
    """Format the losses beside cross entropy (of the modules of multi-token prediction, and the
    head's z-loss), and the largest attention logit."""
    mtp = [x for name, x in record.items() if name.startswith("mtp.") and name.endswith(".loss")]
    text = f"mtp {' '.join(f'{x:.4f}' for x in mtp)}  " if mtp else ""
    text += f"z-loss {record['z_loss']:.3f}  " if "z_loss" in record else ""
    largest = record.get("max_attention_logit")
    return text + (f"max logit {largest:.1f}  " if largest is not None else "")


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
    if n >= 1e9:
        return f"{n / 1e9:.2f}B"
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"
