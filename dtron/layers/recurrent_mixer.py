"""What mixers with a short convolution and a recurrent state share: inputs, cache, order, checks.

gated_delta_net.py, kimi_delta.py and mamba2.py are such mixers. Each has keys and values: a head of
values has a state ``[K, V]``, and a head of keys may serve several heads of values. Each convolves
the nearest tokens first (short_convolution.py), and then passes its state through the sequence and
over cp (state_passing.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.layers.mixer import Mixer, MixerInputs, StageInputs
from dtron.layers.short_convolution import halo, short_convolution, update_tail, visible_tokens
from dtron.layers.state_passing import SequenceRanks
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout


@dataclass(frozen=True)
class RecurrentCache:
    """The decoding cache of one layer.

    ``tail_TC``: the last tokens before the convolution, ``[rows * (taps - 1) @tokens, C@tp]``.
    ``state_BNKV``: the states, ``[rows@tokens, N@value_heads, K, V]``."""

    tail_TC: Tensor
    state_BNKV: Tensor


@dataclass(frozen=True, kw_only=True)
class RecurrentInputs(MixerInputs):
    """The inputs of a recurrent mixer.

    ``chunk``: the number of tokens that are computed at once.
    ``seq_len``: a rank's tokens of each row.
    ``sees_TK``: see short_convolution.py.
    ``place [1]``: the index of this rank's shard of each row.
    ``last_B``: see ``StageInputs``.
    ``largest_beta``: of a delta net, the upper limit of beta.
    ``cache``: a ``RecurrentCache``."""

    chunk: int
    seq_len: int
    sees_TK: Tensor
    place: Tensor
    last_B: Tensor | None
    largest_beta: float = 1.0

    def region_inputs(self) -> tuple[Tensor | None, ...]:
        """Return ``sees_TK``, and the fields of ``Past``: the last inputs of a local region."""
        if self.cache is None:
            return self.sees_TK, *Past()
        return self.sees_TK, self.cache.tail_TC, self.cache.state_BNKV, self.last_B


REGION_AXES: list[tuple[str | None, ...]] = [
    ("tokens", None),
    ("tokens", "value_heads"),
    ("tokens", "value_heads", None, None),
    ("tokens",),
]
"""The axes of ``RecurrentInputs.region_inputs``."""


class Past(NamedTuple):
    """The fields of the cache and ``last_B`` (None: no generation)."""

    tail_TC: Tensor | None = None
    state_BNKV: Tensor | None = None
    last_B: Tensor | None = None


class RecurrentMixer(Mixer):
    """A mixer with a short convolution and a state. It ignores the attention window, rotary
    positions and the method of attention over cp.

    ``config``: has ``chunk`` and ``taps``.
    ``state_shape``: the heads of values, K and V."""

    @property
    def config(self) -> Any:
        raise NotImplementedError

    @property
    def state_shape(self) -> tuple[int, int, int]:
        raise NotImplementedError

    def channels(self, tp: int) -> int:
        """Return the channels of the convolution on one of ``tp`` ranks."""
        raise NotImplementedError

    def prepare(self, stage: StageInputs, layout: Layout) -> Mapping[int | None, RecurrentInputs]:
        parts, device = layout.parts("sequence"), stage.x_TD.device
        inputs = RecurrentInputs(
            chunk=self.config.chunk,
            seq_len=stage.batch.seq_len // parts,
            sees_TK=visible_tokens(stage.batch, self.config.taps, device, layout),
            place=layout.to_local(layout.iota("sequence", parts, device), "sequence"),
            last_B=stage.last_B,
        )
        return dict.fromkeys(stage.windows, inputs)

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> RecurrentCache:
        """Make the tail of the convolution, and the states, which are in float32 at least."""
        tp, own = layout.parts("value_heads"), rows // layout.parts("tokens")
        tail_shape = own * (self.config.taps - 1), self.channels(tp)
        heads, key_dim, value_dim = self.state_shape
        wide = torch.promote_types(dtype, torch.float32)
        tail = torch.zeros(tail_shape, dtype=dtype, device=device)
        state = torch.zeros(own, heads // tp, key_dim, value_dim, dtype=wide, device=device)
        return RecurrentCache(
            layout.from_local(tail, "tokens", "value_heads"),
            layout.from_local(state, "tokens", "value_heads", None, None),
        )

    def orders(self, method: Method) -> tuple[TokenOrder, ...]:
        """A rank's shard is one run of the recurrence."""
        return ("contiguous",)

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        before = self.config.taps - 1
        if mesh.cp > 1 and seq_len < before * mesh.cp:
            raise UserError(
                f"data.seq_len={seq_len} over cp={mesh.cp}: the convolution of linear attention "
                f"needs {before} tokens of each row on every rank; use --data.seq-len "
                f"{before * mesh.cp} or more, or a smaller cp"
            )


def by_rows(x: Tensor, seq_len: int) -> Tensor:
    """Unflatten a rank's tokens: ``[B * S, ...]`` -> ``[B, S, ...]``."""
    return x.unflatten(0, (-1, seq_len))


def document_starts(sees_TK: Tensor, past: Past, seq_len: int) -> Tensor | None:
    """Return whether a token is the first one of its document, ``[B, S]``. None in generation: the
    state goes on."""
    return None if past.last_B is not None else ~by_rows(sees_TK, seq_len)[..., 1]


def padding(past: Past, seq_len: int) -> Tensor | None:
    """Return whether a token of generation is padding, ``[B, S]``. None in training."""
    if past.last_B is None:
        return None
    return torch.arange(seq_len, device=past.last_B.device) > past.last_B[:, None]


def sequence_ranks(inputs: RecurrentInputs, past: Past, layout: Layout) -> SequenceRanks | None:
    """Return the ranks that share the sequences. In generation rows are whole."""
    group = layout.group("cp")
    return None if group is None or past.last_B is not None else SequenceRanks(group, inputs.place)


def convolved(
    parts: Sequence[Tensor],
    taps: Sequence[Tensor],
    biases: Sequence[Tensor],
    sees_TK: Tensor,
    past: Past,
    inputs: RecurrentInputs,
    layout: Layout,
) -> list[Tensor]:
    """Convolve heads of several kinds at once, and apply silu: ``[B, S, N, H]`` each. Sends over
    cp; updates the tail of the cache.

    ``parts``: ``[T, N, H]`` each.
    ``taps``, ``biases``: of each part, ``[width, N, H]`` and ``[N, H]``. No biases: none."""
    mixed = by_rows(torch.cat([t.flatten(1) for t in parts], dim=-1), inputs.seq_len)
    taps_KC, sees = torch.cat([t.flatten(1) for t in taps], dim=-1), None
    if past.tail_TC is None:
        before, sees = halo(mixed, len(taps_KC), layout), by_rows(sees_TK, inputs.seq_len)
    else:
        before = past.tail_TC.unflatten(0, (-1, len(taps_KC) - 1)).to(mixed.dtype)
    y = short_convolution(mixed, taps_KC, before, sees)
    y = F.silu(y + torch.cat([b.flatten() for b in biases]) if biases else y)
    if past.tail_TC is not None and past.last_B is not None:
        update_tail(mixed, past.tail_TC.unflatten(0, (-1, len(taps_KC) - 1)), past.last_B)
    pieces = y.split([t.shape[1] * t.shape[2] for t in parts], dim=-1)
    return [y.unflatten(-1, t.shape[1:]) for y, t in zip(pieces, parts, strict=True)]
