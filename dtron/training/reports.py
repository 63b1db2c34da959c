"""The reports of a step on every rank, and the logged numbers beside the loss.

``training.gradients`` returns the reports of the stages of this process, summed over the global
batch and over all ranks that have tokens. Here they are summed over the pipeline ranks too. (Of
attention logits, the maximum takes the place of the sum.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.model.block_outputs import LARGEST_LOGITS, MIXER_LOSS
from dtron.model.config import ModelConfig
from dtron.moe.config import MoEConfig
from dtron.moe.router import TOTALS
from dtron.training.gradients import Reports
from dtron.training.pipeline import Pipeline


class StepReports(NamedTuple):
    """The reports of all stages, on every rank.

    ``experts``: load and sums of the expert layers (``expert_totals``, moe/balance.py).
    ``mtp``: ``[depth, 2]``, of each module of multi-token prediction (model/mtp.py) the summed loss
        and the number of targets.
    ``loss``: the summed statistics of the loss, in the order of their names (losses/objective.py).
    ``attention_logit``: the largest attention logit of all heads, if it is measured.
    ``mixers``: ``[layers, 2]``, of each layer whose mixer has a loss of its own the summed loss and
        the number of tokens."""

    experts: Tensor | None
    mtp: Tensor | None
    loss: Tensor | None
    attention_logit: Tensor | None = None
    mixers: Tensor | None = None


COLUMNS = (*TOTALS, "dropped")


def expert_totals(reports: Reports, pipe: Pipeline, c: MoEConfig) -> Tensor | None:
    """Return, for each MoE layer of the model, the load of its experts and the sums over tokens of
    ``COLUMNS``: ``[layers, E + 6]``, on every rank. None for a dense model. The host does not wait
    for the result."""
    if not c.experts:
        return None
    counts = [sum(p.moe is not None for p in spec.all_blocks) for spec in pipe.specs]
    own = {
        stage: torch.cat([r["load"], r["router"], r["dropped"][:, None]], 1)
        for stage, r in reports.items()
        if "load" in r  # of stages with experts
    }
    return _all_layers(own, counts, c.experts + len(COLUMNS), pipe)


def _all_layers(
    own: Mapping[int, Tensor], counts: Sequence[int], columns: int, pipe: Pipeline
) -> Tensor:
    """Return the rows of the layers of all stages, ``[layers, columns]``, on every rank.

    ``own``: the rows of this process's stages that have such layers.
    ``counts``: the number of such layers in each stage."""
    sample = next(iter(own.values()), None)
    device = pipe.device if sample is None else sample.device
    rows = torch.zeros(sum(counts), columns, dtype=torch.float64, device=device)
    for stage, x in own.items():
        start = sum(counts[:stage])
        rows[start : start + counts[stage]] = x
    return pipe.sum(rows)


def describe_experts(totals: Tensor | None, m: ModelConfig) -> dict[str, float]:
    """Return the numbers of a step by name, such as ``experts.3.entropy`` for layer 3.

    ``load_max``, ``load_min``: the largest and smallest load of an expert, over the mean load.
    ``entropy``: the entropy of a token's scores in nats, averaged over tokens.
    ``dropped``: the share of the sent slots that was dropped.
    ``aux_loss``, ``z_loss``: losses per token, without their weights."""
    if totals is None:
        return {}
    numbers: dict[str, float] = {}
    c, layers = m.moe, filter(m.sparse, m.blocks)
    for i, row in zip(layers, totals.tolist(), strict=True):
        load, sums = row[: c.experts], dict(zip(COLUMNS, row[c.experts :], strict=True))
        mean, tokens = max(sum(load) / c.experts, 1e-9), max(sums["tokens"], 1)
        each = {"load_max": max(load) / mean, "load_min": min(load) / mean}
        each |= {
            "entropy": sums["entropy"] / tokens,
            "dropped": sums["dropped"] / (max(sums["sent"], 1) * c.top_k),
        }
        each |= {name: sums[name] / tokens for name in ("aux_loss", "z_loss")}
        numbers |= {f"experts.{i}.{name}": value for name, value in each.items()}
    return numbers


def mixer_losses(reports: Reports, pipe: Pipeline, m: ModelConfig) -> Tensor | None:
    """Return, for each layer whose mixer has a loss of its own, the loss summed over the tokens of
    a step and the number of tokens: ``[layers, 2]``, on every rank. None without such a layer. The
    host does not wait for the result."""
    counts = [sum(_learns(m, p.letter) for p in spec.all_blocks) for spec in pipe.specs]
    if not sum(counts):
        return None
    name = MIXER_LOSS[1]
    own = {stage: r[name] for stage, r in reports.items() if name in r}
    return _all_layers(own, counts, 2, pipe)


def _learns(m: ModelConfig, letter: str) -> bool:
    return m.mixer(letter).loss_name is not None


def describe_mixers(losses: Tensor | None, m: ModelConfig) -> dict[str, float]:
    """Return the losses of mixers per token by name, such as ``indexer.3.loss`` for layer 3."""
    if losses is None:
        return {}
    names = (m.mixer(m.letter(i)).loss_name for i in m.blocks)
    found = [f"{name}.{i}.loss" for i, name in zip(m.blocks, names, strict=True) if name]
    rows = zip(found, losses.tolist(), strict=True)
    return {name: total / max(tokens, 1) for name, (total, tokens) in rows}


def mtp_losses(reports: Reports, pipe: Pipeline, depth: int) -> Tensor | None:
    """Return, for each multi-token prediction module, the loss summed over the tokens of a step and
    the number of its targets: ``[depth, 2]``, on every rank. None without modules. The host does
    not wait for the result.

    ``reports``: the reports of a step, by stage."""
    if not depth:
        return None
    last = next((r for r in reports.values() if "mtp" in r), None)
    if last is None:
        return pipe.sum(torch.zeros(depth, 2, dtype=torch.float64, device=pipe.device))
    return pipe.sum(torch.stack([last["mtp"], last["mtp_tokens"]], -1).double())


def loss_stats(reports: Reports, pipe: Pipeline, names: Sequence[str]) -> Tensor | None:
    """Return the statistics of the loss summed over a step, on every rank. None without names."""
    if not names:
        return None
    last = next((r for r in reports.values() if names[0] in r), None)
    if last is None:
        return pipe.sum(torch.zeros(len(names), dtype=torch.float64, device=pipe.device))
    return pipe.sum(torch.cat([last[name] for name in names]).double())


def max_attention_logit(reports: Reports, pipe: Pipeline, threshold: float) -> Tensor | None:
    """Return the largest attention logit of a step over all heads and layers, on every rank. None
    if there is no threshold, and so no logit is measured."""
    if not threshold:
        return None
    own = [r[LARGEST_LOGITS].max() for r in reports.values() if LARGEST_LOGITS in r]
    return pipe.maximum(torch.stack(own).max() if own else None)


def describe_extras(reports: StepReports, names: Sequence[str], count: int) -> dict[str, float]:
    """Return the numbers beside the loss by name. A module of multi-token prediction has fewer
    targets than the model; its loss is NaN if it has none.

    ``names``: of the statistics of the loss.
    ``count``: the divisor of the loss: the number of targets or pairs of the step."""
    rows = [] if reports.mtp is None else reports.mtp.tolist()
    numbers = {
        f"mtp.{k}.loss": total / count if count else math.nan
        for k, (total, count) in enumerate(rows, start=1)
    }
    if reports.loss is not None:
        sums = reports.loss.tolist()
        numbers |= {name: total / count for name, total in zip(names, sums, strict=True)}
    if reports.attention_logit is not None:
        numbers["max_attention_logit"] = reports.attention_logit.item()
    return numbers
