"""The output of a stage beside its activations: terms of the loss, and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from dtron.layers.attention_core import LARGEST
from dtron.layers.cross_entropy import over_all
from dtron.mesh import Layout
from dtron.model.block_outputs import LARGEST_LOGITS, LAYER_STATS, MIXER_LOSS, output_names
from dtron.model.config import ModelConfig
from dtron.schedules.runner import StageOutput

MTPLosses = tuple[list[Tensor], list[Tensor]]  # by module: summed loss, number of targets


def stage_output(
    outputs: Sequence[Mapping[str, Tensor]],
    mtp: MTPLosses | None,
    m: ModelConfig,
    layout: Layout,
    stats: Mapping[str, Tensor] = MappingProxyType({}),
) -> StageOutput | None:
    """Collect a stage's terms of the loss and its report. A report has one row per layer with
    experts, per layer with attention, per mixer with a loss of its own, or per module of
    multi-token prediction.

    ``outputs``: the outputs of each block, see ``output_names``.
    ``mtp``: the losses of multi-token prediction (None: it has no module).
    ``stats``: the statistics of the loss, by name."""
    terms: list[Tensor] = []
    report: dict[str, Tensor] = {}
    by_name = {
        name: [x[name] for x in outputs if name in x]
        for name in output_names(logits=True, learns=True, sparse=True)
    }
    if by_name["aux"]:
        report = {name: _stack(by_name[name], layout) for name in LAYER_STATS}
        terms += by_name["aux"] if m.moe.aux_loss or m.moe.z_loss else ()
    aux, sums = (by_name[name] for name in MIXER_LOSS)
    if aux:
        terms += aux
        report[MIXER_LOSS[1]] = _stack(sums, layout)
    if mtp:
        losses, counts = ([over_all(x, layout) for x in xs] for xs in mtp)
        report["mtp"], report["mtp_tokens"] = _stack(losses, layout), _stack(counts, layout)
        terms += [loss * (m.mtp.weight / len(losses)) for loss in losses]
    for name, x in stats.items():
        report[name] = _stack([over_all(x, layout)], layout)
    # sum() starts with 0, and 0 is not a pending sum.
    total = sum(terms[1:], terms[0]) if terms else None
    largest, maxima = by_name[LARGEST_LOGITS], {}
    if largest:
        maxima[LARGEST_LOGITS] = _stack(largest, layout, LARGEST, (None, *LARGEST))
    return StageOutput(total, report, maxima) if report or maxima else None


def _stack(
    xs: Sequence[Tensor],
    layout: Layout,
    axes: tuple[str | None, ...] = ("+tokens_sp",),
    out: tuple[str | None, ...] = ("+tokens_sp",),
) -> Tensor:
    """Stack pending sums, or tensors with other axes, without gradients. Rank-local.

    ``axes``, ``out``: the axes of each tensor, and those of the stack."""

    def stack(*rows: Tensor) -> Tensor:
        return torch.stack(rows)

    return layout.local_map(stack, [axes] * len(xs), out)(*(x.detach() for x in xs))
