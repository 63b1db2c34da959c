"""Grouped matmuls, ``x[rows of e] @ w[e]`` for every expert e: one kernel, and two versions in
plain operations.

``x [R, I]`` is sorted by expert, and the rows of expert e end before ``ends_E[e]``. ``grouped`` is
torch's kernel and takes bfloat16. ``looped`` is the slow and clear version. ``masked`` is the
version for a compiler, because none of its shapes depends on a count. ``weight_gradient`` is the
gradient of w. scaled_grouped_mm.py is the kernel in FP8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.torch_compile import kernel_device


def grouped(x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Run the grouped matmul in one kernel."""
    return F.grouped_mm(x, w, offs=ends_E.to(torch.int32))


def looped(x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Run the grouped matmul one expert at a time. The host waits for the counts. Rows after the
    last end are zero."""
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    parts = list(x.split([*counts, x.shape[0] - sum(counts)]))
    rest = parts.pop()
    products = [part @ w_e for part, w_e in zip(parts, w.unbind(), strict=True)]
    return torch.cat([*products, rest @ w[0] * 0])


def masked(x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Run the grouped matmul in shapes that depend on no count, for a compiler: every expert
    multiplies all rows."""
    y = x @ w[0] * 0
    for w_e, rows_R in zip(w.unbind(), rows_of_experts(x, ends_E), strict=True):
        y = torch.where(rows_R, x @ w_e, y)
    return y


def rows_of_experts(x: Tensor, ends_E: Tensor) -> list[Tensor]:
    """Return for each expert ``[R, 1]``, whether a row is the expert's. No shape depends on a
    count."""
    place_R = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    starts: list[Tensor | int] = [0, *ends_E[:-1].unbind()]
    return [(place_R >= a) & (place_R < b) for a, b in zip(starts, ends_E.unbind(), strict=True)]


def weight_gradient(x: Tensor, g: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``x[rows of e].T @ g[rows of e]`` for every expert e: ``[E, I, O]``.

    ``ends_E``: int32."""
    if kernel_device(x.device) == "cpu":
        rows_ER = rows_of_experts(x, ends_E)
        return torch.stack([torch.where(rows_R, x, 0).mT @ g for rows_R in rows_ER])
    return F.grouped_mm(x.mT, g, offs=ends_E)
