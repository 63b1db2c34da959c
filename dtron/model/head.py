"""The end of the last stage: the norm before the head, the head, and the loss.

``norm_and_loss`` is compiled as one unit (training/compiled_units.py). With multi-token prediction
its parts are units of their own, because the modules need the normalised activations and the head
too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from dtron.layers.cross_entropy import Loss
from dtron.layers.norm import Norm, norm
from dtron.losses.objective import LossInputs, Objective
from dtron.mesh import Layout
from dtron.model.activation_checkpoint import BlockPolicy, run_end
from dtron.model.config import ModelConfig
from dtron.params import unshard


def end_params(p: Any) -> Any:
    """Return the params that the end of the last stage uses: the last norm and the head, and for
    multi-token prediction the embedding of tokens."""
    embeds = p.w_head is None or p.mtp
    embedding = replace(p.embedding, w_positions=None) if embeds else None
    return replace(p, embedding=embedding, blocks=(), mtp=())


def head_weight(p: Any) -> Tensor:
    if p.w_head is not None:
        return p.w_head
    assert p.embedding is not None  # the last stage of a tied model has it too
    return p.embedding.w_tokens


def unshard_head(w_head: Tensor, layout: Layout) -> tuple[Tensor]:
    return (layout.unshard(w_head, "vocab", "embed"),)


def head_input(x_TD: Tensor, m: ModelConfig) -> Tensor:
    """Multiply the head's input, and so the logits before their soft-cap, by the model's
    ``logit_scale``. muP divides by the width (mup.py)."""
    factor = m.logit_scale / m.width
    return x_TD if factor == 1 else x_TD * factor


def last_norm(
    p: Norm, x_TD: Tensor, m: ModelConfig, layout: Layout, last: BlockPolicy
) -> tuple[Tensor]:
    """Apply the norm before the head.

    ``last``: the policy of the last block."""
    return (run_end(partial(norm, eps=m.norm_eps), unshard(p, layout), x_TD, last),)


def loss_options(m: ModelConfig) -> Loss:
    """Return the settings of the loss that belong to the model."""
    return Loss(m.vocab, z=m.z_loss, softcap=m.final_softcap)


def loss(
    x_TD: Tensor,
    w_head: Tensor,
    inputs: LossInputs,
    objective: Objective,
    m: ModelConfig,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Apply the head ``w_head``, and return the loss and its statistics: see ``Objective``."""
    (w_head,) = unshard_head(w_head, layout)
    return objective(head_input(x_TD, m), w_head, inputs, loss_options(m), layout)


def norm_and_loss(
    p: Any,
    x_TD: Tensor,
    inputs: LossInputs,
    objective: Objective,
    m: ModelConfig,
    layout: Layout,
    last: BlockPolicy,
) -> tuple[Tensor, ...]:
    """Apply the norm and the head, and return the loss and its statistics: see ``Objective``."""
    assert p.norm is not None
    (x_TD,) = last_norm(p.norm, x_TD, m, layout, last)
    return loss(x_TD, head_weight(p), inputs, objective, m, layout)
