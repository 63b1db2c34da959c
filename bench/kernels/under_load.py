"""Time kernels on a GPU under load, and the GPU's clock beside them.

A GPU that trains runs at its power limit, with a lower clock than in a short measurement: an H200
at 1.55 to 1.65 GHz instead of 1.98. How low depends on what it runs. So each measurement runs
between matmuls and copies, and the time of a matmul right after it gives the clock: this matmul's
cycles are counted first, in seconds of nothing else. (A kernel that only waits for a number of
cycles would not do. While it waits, the power falls and the clock rises.) Inputs are random and
come from memory, not from a cache."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Fn = Callable[[int], object]  # the argument counts its calls, so that each has other inputs
SEGMENT_MS = 2.0


@dataclass(frozen=True)
class Timing:
    """The time of a call, and the GPU's clock beside it in GHz."""

    seconds: float
    ghz: float


@dataclass
class Pool:
    """Random numbers of one dtype in memory, from which measurements take their tensors."""

    dtype: torch.dtype
    numbers: int
    memory: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.memory = torch.empty(self.numbers, dtype=self.dtype, device="cuda")
        for part in self.memory.split(1 << 28):
            part.copy_(torch.randn(len(part), device="cuda"))

    def take(self, shape: tuple[int, ...], call: int, place: int = 0) -> Tensor:
        """Return a tensor, at another place for each call and each ``place``."""
        n = math.prod(shape)
        room = self.numbers - n
        start = (call * n + place * (self.numbers // 3)) % (room + 1)
        return self.memory[start - start % 256 :][:n].view(shape)


class Load:
    """``Load().measure(fn)``: the time of one call of ``fn``.

    ``bf16``: random numbers.
    ``rest``: a recorded segment of matmuls and copies, which runs between the measurements.
    ``gap``: seconds of a kernel with next to no work, in a CUDA graph."""

    def __init__(self) -> None:
        self.bf16 = Pool(torch.bfloat16, 1 << 31)
        self.results = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
        a, b = (self.bf16.take((4096, 4096), i) for i in (0, 1))
        out, copy = torch.empty_like(a), torch.empty(1 << 27, dtype=a.dtype, device="cuda")

        def segment() -> None:
            for i in range(8):
                torch.mm(a, b, out=out)
                copy.copy_(self.bf16.take((1 << 27,), i))

        self.rest = recorded(segment)
        self._memory = (a, b, out, copy)  # a recorded segment does not keep its tensors
        self._probe = recorded(lambda: torch.mm(a, b, out=out))
        self.gap, self._cycles = 0.0, 1.0
        self.warm()
        self._cycles = self._probe_cycles()
        small = torch.zeros(64, device="cuda")
        self.gap = self.measure(lambda _: small.add_(1)).seconds

    def _probe_cycles(self) -> float:
        """Return the cycles of the probe, in 1e9."""
        ends: list[torch.cuda.Event] = []
        clocks = []
        for _ in range(12):
            for _ in range(500):
                self._probe.replay()
            clocks.append(query("clocks.sm") * 1e-3)  # kernels are still in the queue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(100):
                self._probe.replay()
            end.record()
            ends += [begin, end]
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 100 * 1e-3 for a, b in zip(ends[::2], ends[1::2], strict=True)]
        return statistics.median(t * ghz for t, ghz in zip(times[4:], clocks[4:], strict=True))

    def warm(self, seconds: float = 3.0) -> None:
        """Run until the clock is that of a GPU under load."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                self.rest.replay()
            torch.cuda.synchronize()

    def result(self, shape: tuple[int, ...], call: int) -> Tensor:
        """Return memory for the result of a call."""
        n = math.prod(shape)
        start = call * n % max(1, len(self.results) - n)
        return self.results[start - start % 256 :][:n].view(shape)

    def measure(self, fn: Fn, repeats: int = 5, eager: bool = False) -> Timing:
        """Return the median time of a call of ``fn``, without the gap after its last kernel.

        ``eager``: the host launches the calls; else they are recorded in a CUDA graph."""
        count: Iterator[int] = itertools.count()
        fn(next(count))
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn(next(count))
        torch.cuda.synchronize()
        once = 1e3 * (time.perf_counter() - start)
        calls = max(1, min(100, round(SEGMENT_MS / once)))

        def several() -> None:
            for _ in range(calls):
                fn(next(count))

        run = several if eager else recorded(several).replay
        marks = []
        for _ in range(repeats):
            self.rest.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda._sleep(40_000)  # the host launches what follows meanwhile
            for event, part in zip(events, (run, self._probe.replay, None), strict=True):
                event.record()
                if part is not None:
                    part()
            marks.append(events)
        torch.cuda.synchronize()
        took = statistics.median(a.elapsed_time(b) for a, b, _ in marks) / calls * 1e-3
        probe = statistics.median(b.elapsed_time(c) for _, b, c in marks) * 1e-3
        return Timing(took - min(self.gap, took / 2), self._cycles / probe)

    def alone(self, fn: Fn, seconds: float = 3.0) -> tuple[float, float]:
        """Return the power of the GPU in watts and its clock in GHz while it runs nothing but
        ``fn``."""

        def several() -> None:
            for i in range(20):
                fn(i)

        graph = recorded(several)
        graph.replay()
        torch.cuda.synchronize()
        start = time.monotonic()
        graph.replay()
        torch.cuda.synchronize()
        replays = max(1, round(0.4 / (time.monotonic() - start)))  # four tenths of a second
        start, watts, clocks = time.monotonic(), 0.0, []
        while time.monotonic() < start + seconds:
            for _ in range(replays):
                graph.replay()
            if time.monotonic() > start + seconds / 2:  # the power is a mean over a second
                clocks.append(query("clocks.sm") * 1e-3)
                watts = query("power.draw")
            torch.cuda.synchronize()
        return watts, statistics.median(clocks)


def recorded(fn: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first calls allocate and compile
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def query(name: str) -> float:
    """Return a number that nvidia-smi reports of this GPU: "power.draw" in watts, "clocks.sm" in
    MHz."""
    command = ["nvidia-smi", "-i", str(torch.cuda.current_device())]
    command += [f"--query-gpu={name}", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
