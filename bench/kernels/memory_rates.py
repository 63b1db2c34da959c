"""The rates of kernels that wait for memory, by how they read it, for calibrate.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from kernels.under_load import Load, Pool
from torch import Tensor

BYTES = [1 << n for n in (16, 18, 20, 22, 24, 25, 26, 27, 28, 29, 30)]


def memory(load: Load) -> dict[str, list[list[float]]]:
    """Return rows of bytes, read and written, and GB/s, for each kind of access."""
    pool = load.bf16

    def stream(i: int, n: int) -> Tensor:
        return pool.take((n // 4,), i) * 1.0009765625

    @partial(torch.compile, dynamic=False)
    def normalize(x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    @partial(torch.compile, dynamic=False)
    def transposed(x: Tensor) -> Tensor:
        return (x * 2).to(torch.float8_e4m3fn).t().contiguous()

    @partial(torch.compile, dynamic=False)
    def chosen(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index) * 2

    @partial(torch.compile, dynamic=False)
    def norm_backward(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y, dy = x.float(), g.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        y = y * scale
        dx = scale * (dy - y * (dy * y).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dy * y).sum(0)

    def columns(i: int, n: int) -> tuple[Tensor, Tensor]:
        shape = (max(1, n // 6 // 2048), 2048)
        return norm_backward(pool.take(shape, i), pool.take(shape, i, 1))

    def added(i: int, n: int) -> Tensor:
        return sums.take((n // 10,), i).add_(pool.take((n // 10,), i))

    def of_rows(i: int, n: int) -> Tensor:
        return normalize(pool.take((max(1, n // 8192), 2048), i))

    def turned(i: int, n: int) -> Tensor:
        return transposed(pool.take((max(16, n // 3 // 4096), 4096), i))

    def gathered(i: int, n: int) -> Tensor:
        rows = max(1, n // 8192)
        return chosen(pool.take((rows, 2048), i), order[:rows] % rows)

    sums, order = Pool(torch.float32, 1 << 28), torch.randperm(1 << 20, device="cuda")
    kinds: dict[str, Callable] = {"stream": stream, "rows": of_rows, "columns": columns}
    kinds |= {"transposed": turned, "gathered": gathered, "added": added}
    found = {}
    for name, fn in kinds.items():
        torch.compiler.reset()
        sizes = BYTES if name == "stream" else BYTES[2::2]
        found[name] = [[n, round(n / load.measure(partial(fn, n=n)).seconds * 1e-9)] for n in sizes]
    return found
