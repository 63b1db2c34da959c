"""Time kernels on a GPU under load, and the GPU's clock beside them.

A GPU that trains runs at its power limit, with a lower clock than in a short measurement: an H200
at 1.55 to 1.65 GHz instead of 1.98. How low depends on what it runs. So each measurement runs
between matmuls and copies, and a kernel that spins for a known number of cycles gives the clock.
Inputs are random and come from memory, not from a cache."""

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
CYCLES = 400_000


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
    ``rest``: a recorded segment of matmuls and copies, which runs between the measurements."""

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
        self.warm()

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
        """Return the median time of a call of ``fn``, with the gap after its kernels.

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
            torch.cuda._sleep(CYCLES // 10)  # the host launches what follows meanwhile
            for event, part in zip(events, (run, spin, None), strict=True):
                event.record()
                if part is not None:
                    part()
            marks.append(events)
        torch.cuda.synchronize()
        seconds = statistics.median(a.elapsed_time(b) for a, b, _ in marks) / calls * 1e-3
        spun = statistics.median(b.elapsed_time(c) for _, b, c in marks)
        return Timing(seconds, CYCLES / spun * 1e-6)

    def alone(self, fn: Fn, seconds: float = 2.0) -> tuple[float, float]:
        """Return the power of the GPU in watts and its clock in GHz while it runs nothing but
        ``fn``."""

        def several() -> None:
            for i in range(20):
                fn(i)

        graph = recorded(several)
        start, watts, spun = time.monotonic(), 0.0, 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while time.monotonic() < start + seconds:
            for _ in range(10):
                graph.replay()
            begin.record()
            spin()
            end.record()
            graph.replay()
            if time.monotonic() > start + 0.7 * seconds:
                watts = power()  # kernels are still in the queue
            torch.cuda.synchronize()
            spun = begin.elapsed_time(end)
        return watts, CYCLES / spun * 1e-6


def spin() -> None:
    """Run a kernel of ``CYCLES`` cycles: its time says the GPU's clock."""
    torch.cuda._sleep(CYCLES)


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


def power() -> float:
    """Return the GPU's power in watts."""
    device = str(torch.cuda.current_device())
    query = ["nvidia-smi", "-i", device, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
