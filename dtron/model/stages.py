"""The model split into pipeline stages.

A stage is a ``Transformer`` that lacks most weights of the model. The first stage has the
embedding, the last stage has the final norm and the head, and each stage has its share of the
blocks. Weights keep their paths of the whole model (``blocks.7.mlp.w_up``). So initial weights and
checkpoints do not depend on the split.

With a tied head, or with multi-token prediction, the last stage has a copy of the embedding too: a
*twin* (see training/pipeline.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.model.flops import active
from dtron.model.transformer import Transformer, declare_model
from dtron.params import WeightSpec
from dtron.tree import flat


def layers_per_stage(
    m: ModelConfig, stages: int, seq_len: int, layers: Sequence[int] = ()
) -> list[int]:
    """Return the number of blocks of each stage. Raises UserError for numbers that do not fit.

    ``layers``: the user's numbers. Empty: the most even split by FLOPs, in which the head of the
        last stage counts as many blocks as it costs."""
    if layers:
        if len(layers) != stages or sum(layers) != m.layers or min(layers) < 1:
            raise UserError(
                f"--pipeline.layers {','.join(map(str, layers))}: must be {stages} positive "
                f"numbers, one per stage, that sum to model.layers={m.layers}; change it, or leave "
                "it out"
            )
        return list(layers)
    if stages > m.layers:
        raise UserError(
            f"{stages} pipeline stages for model.layers={m.layers}: each needs a block; use fewer "
            f"stages (pp, --pipeline.stages-per-rank) or --model.layers {stages}"
        )
    blocks = declare_model(m).blocks
    weights = sum(active(w, m) for w in flat(blocks)) / m.layers
    mixing = sum(m.mixer(p.letter).flops(seq_len, None) for p in blocks) / m.layers
    # The cost of an average block, in multiplications per token.
    block = weights + mixing / 6
    head = m.padded_vocab * m.embed / block  # in blocks
    head_cost = head + m.mtp.depth * (head + 1 + 2 * m.embed**2 / block)

    def fits(most: float) -> list[int] | None:
        """Return the largest number of blocks of each stage at a cost of at most ``most`` blocks.
        None if some blocks of the model are left over."""
        last = max(1, math.floor(most - head_cost + 1e-9))
        room = [max(1, math.floor(most + 1e-9))] * (stages - 1) + [last]
        return room if sum(room) >= m.layers else None

    lows = sorted({n + extra for n in range(1, m.layers + 1) for extra in (0.0, head_cost)})
    room = next(r for most in lows if (r := fits(most)))

    def order(s: int) -> tuple[bool, float, int]:
        """Rank the stages that surplus blocks are taken from: by cost, and later stages first,
        because they start later."""
        return room[s] > 1, room[s] + (head_cost if s == stages - 1 else 0), s

    while sum(room) > m.layers:
        room[max(range(stages), key=order)] -= 1
    return room


def split_into_stages(m: ModelConfig, layers: Sequence[int]) -> list[Transformer]:
    """Return the declared weights of each stage.

    ``layers``: the number of blocks of each stage."""
    whole, stages, start = declare_model(m), [], 0
    for s, n in enumerate(layers):
        first, last = s == 0, s == len(layers) - 1
        embedding = whole.embedding if first else None
        if last and not first and (m.tied or m.mtp.depth):
            assert whole.embedding is not None
            twin: Any = replace(cast(WeightSpec, whole.embedding.w_tokens), twin=True)
            embedding = replace(whole.embedding, w_tokens=twin, w_positions=None)
        stages.append(
            replace(
                whole,
                embedding=embedding,
                blocks=whole.blocks[start : start + n],
                norm=whole.norm if last else None,
                w_head=whole.w_head if last else None,
                mtp=whole.mtp if last else (),
            )
        )
        start += n
    return stages
