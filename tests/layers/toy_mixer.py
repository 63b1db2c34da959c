"""A layer type in one file: a causal depthwise convolution is a mixer of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.bounds import divides
from dtron.distributed.collectives import ring_shift
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.layers.linear import linear, linear_in
from dtron.layers.mixer import Mixer, MixerInputs, StageInputs
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout
from dtron.model.config import MIXERS, ModelConfig
from dtron.params import residual_out, weight

WIDTH = 4  # a token sees itself and three tokens before it
BEFORE, TAPS = WIDTH - 1, range(WIDTH)


@dataclass(frozen=True)
class Convolution:
    """The weights. ``w_taps[k]`` is multiplied with the token k places before."""

    segment: ClassVar[str] = "convolution"

    w_in: Tensor = weight("embed", "heads", "head_dim", summed=1)
    w_taps: Tensor = weight("positions", "heads", "head_dim")
    w_out: Tensor = weight("heads", "head_dim", "embed", summed=2, init=residual_out)


@dataclass(frozen=True, kw_only=True)
class ConvolutionInputs(MixerInputs):
    """``seq_len``: a rank's tokens of each row.
    ``sees_TK``: whether a token sees the token k places before, ``[T@tokens, 4]``.
    ``last_B``: see ``StageInputs``."""

    seq_len: int
    sees_TK: Tensor
    last_B: Tensor | None


def convolution(p: Convolution, x_TD: Tensor, inputs: ConvolutionInputs, layout: Layout) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    x_TNH = linear(x_TD, p.w_in, recipe=inputs.recipe)  # local
    heads, taps = ("tokens", "heads", None), ("positions", "heads", None)
    if inputs.cache is None:
        core = partial(in_rows, seq_len=inputs.seq_len, layout=layout)  # sends over cp
        more, kinds = (inputs.sees_TK,), (("tokens", None),)
    else:
        core = partial(with_cache, seq_len=inputs.seq_len)
        more, kinds = (inputs.cache, inputs.last_B), (heads, ("tokens",))
    y_TNH = layout.local_map(core, (heads, taps, *kinds), heads)(x_TNH, p.w_taps, *more)
    y_TD = linear_in(y_TNH, p.w_out, inputs.recipe)  # {+tp}: a sum still pending
    return layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp


def in_rows(x_TNH: Tensor, w_KNH: Tensor, sees_TK: Tensor, seq_len: int, layout: Layout) -> Tensor:
    """Convolve a rank's shard of each row. Rank-local but for the halo."""
    x, sees = (t.unflatten(0, (-1, seq_len)) for t in (x_TNH, sees_TK))
    before = x[:, -BEFORE:]
    if layout.parts("sequence") > 1:
        before = ring_shift(before, layout.group("cp"))
    x = torch.cat([before, x], dim=1)  # what precedes the row is not seen
    back = (x[:, BEFORE - k : BEFORE - k + seq_len] * sees[..., k, None, None] for k in TAPS)
    return sum(w * x for w, x in zip(w_KNH, back, strict=True)).flatten(0, 1)


def with_cache(
    x_TNH: Tensor, w_KNH: Tensor, cache_TNH: Tensor, last_B: Tensor, seq_len: int
) -> Tensor:
    """Continue the rows whose last three tokens are in the cache. Rank-local."""
    cache = cache_TNH.unflatten(0, (-1, BEFORE))
    x = torch.cat([cache, x_TNH.unflatten(0, (-1, seq_len))], dim=1)
    rows = torch.arange(len(x), device=x.device)[:, None]
    cache.copy_(x[rows, last_B[:, None] + 1 + torch.arange(BEFORE, device=x.device)])
    back = (x[:, BEFORE - k : BEFORE - k + seq_len] for k in TAPS)
    return sum(w * x for w, x in zip(w_KNH, back, strict=True)).flatten(0, 1)


def same_document(documents_T: Tensor, part: Tensor, seq_len: int, parts: int) -> Tensor:
    """Compute ``sees_TK`` of the ``part``-th shard of each row. Rank-local."""
    documents = documents_T.unflatten(0, (-1, seq_len))
    before = F.pad(documents, (BEFORE, 0), value=-1)
    sees = [before[:, BEFORE - k : BEFORE - k + seq_len] == documents for k in TAPS]
    return torch.stack(sees, dim=-1).unflatten(1, (parts, -1))[:, part].flatten(0, 2)


class ConvolutionMixer(Mixer):
    params: ClassVar[type] = Convolution

    def dims(self) -> dict[str, Any]:
        return {"positions": WIDTH}

    def apply(
        self, p: Convolution, x_TD: Tensor, inputs: ConvolutionInputs, layout: Layout
    ) -> Tensor:
        return convolution(p, x_TD, inputs, layout)

    def prepare(self, stage: StageInputs, layout: Layout) -> Mapping[int | None, MixerInputs]:
        batch, parts, device = stage.batch, layout.parts("sequence"), stage.x_TD.device
        documents_T = batch.documents_T
        if documents_T is None:
            whole_T = torch.zeros(batch.positions_T.shape, dtype=torch.long, device=device)
            documents_T = layout.shard(whole_T, "rows")
        core = partial(same_document, seq_len=batch.seq_len, parts=parts)
        region = layout.local_map(core, (("rows",), ("sequence",)), ("tokens", None))
        inputs = ConvolutionInputs(
            seq_len=batch.seq_len // parts,
            sees_TK=region(documents_T, layout.iota("sequence", parts, device)),
            last_B=stage.last_B,
        )
        return dict.fromkeys(stage.windows, inputs)

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> Tensor:
        heads = self.model.heads // layout.parts("heads")
        shape = rows * BEFORE // layout.parts("tokens"), heads, self.model.head_dim
        return layout.from_local(
            torch.zeros(shape, dtype=dtype, device=device), "tokens", "heads", None
        )

    def orders(self, method: Method) -> tuple[TokenOrder, ...]:
        return ("contiguous",)  # a shard needs the end of the shard before it

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """The input and the output of the taps."""
        return 2 * element * tokens * self.model.heads * self.model.head_dim // mesh.cp // mesh.tp

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        sent = BEFORE * self.model.heads * self.model.head_dim // mesh.tp  # of one row
        return 2 * element * sent if mesh.cp > 1 else 0

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        divides("model.heads", self.model.heads, "tp", mesh.tp)
        if mesh.cp > 1 and seq_len < BEFORE * mesh.cp:
            raise UserError(
                f"data.seq_len={seq_len} over cp={mesh.cp}: a rank needs {BEFORE} tokens of each "
                f"row; use a longer sequence, of {BEFORE * mesh.cp} tokens at least"
            )


@dataclass(frozen=True)
class ConvolutionModel(ModelConfig):
    kinds: ClassVar[Mapping[str, type[Mixer]]] = {**MIXERS, "C": ConvolutionMixer}
