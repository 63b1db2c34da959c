"""QK-clip (Kimi K2, arXiv:2507.20534, section 2.1.2): after an update, the query and key weights of
heads whose attention logits have become too large are scaled down.

    S_h = largest logit of head h in the forward of the step      gamma_h = min(1, threshold / S_h)

S_h is the maximum over all tokens of the global batch. The logits of head h are scaled by gamma_h;
``Mixer.logit_factors`` divides this factor among the weights (clip_factors.py). A head under the
threshold is not changed.

``QKClip`` is an optimizer itself: it updates with another one, and then scales. So an average of
the weights (weight_average.py) follows the scaled weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.torch_compile import jit
from dtron.training.optimizer import OptimizerState, WrappedOptimizer
from dtron.training.state_formats import Stored, load, stored_weights, write
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat


def scale(w: Stored, copy: Tensor | None, factor: Tensor, ok: Tensor) -> None:
    """Scale a weight in place, and its copy in the compute dtype."""
    old = load(w)
    write(w, old * factor.to(old.dtype), ok)
    if copy is not None:
        copy.copy_(w.data)


@dataclass(frozen=True)
class QKClip(WrappedOptimizer):
    """An optimizer that scales weights after the update, by ``UpdateScalars.factors``."""

    kernel: Callable[..., None] = field(default=scale, compare=False, repr=False)

    def compiled(self, backend: str = "inductor") -> QKClip:
        return replace(self, base=self.base.compiled(backend), kernel=jit(scale, backend=backend))

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        params, state = self.base.update(spec, params, grads, state, scalars, layout)
        ok, factors, declared = scalars.ok, scalars.factors, flat(spec)
        assert ok is not None
        weights = stored_weights(spec, params, state.trees)
        copies = flat(state.compute_copies) or [None] * len(weights)
        for w, stored, copy in zip(declared, weights, copies, strict=True):
            if w.path in factors:
                factor = factors[w.path]
                own = to_local(layout.shard(factor, *w.axes[-factor.ndim :]))
                self.kernel(stored.local(), None if copy is None else to_local(copy), own, ok)
        return params, state


def check_qk_clip(threshold: float, m: ModelConfig) -> None:
    """Raise UserError for a model whose logits do not follow its query and key weights."""
    if not threshold:
        return
    if m.qk_norm:
        raise UserError(
            f"optim.qk_clip={threshold:g} with model.qk_norm=True: queries and keys are normalised "
            "after their weights, which bounds the logits already; use --optim.qk-clip 0"
        )
    if not any(mixer.has_logits for mixer in m.mixers):
        raise UserError(
            f"optim.qk_clip={threshold:g} with model.pattern={m.pattern}: no layer has attention "
            "logits; use --optim.qk-clip 0"
        )
