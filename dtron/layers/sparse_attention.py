"""Sparse attention of DeepSeek-V3.2 (arXiv:2512.02556, section 2.1): latent attention to the keys
that a small indexer selects.

The *lightning indexer* has narrow heads of queries, one key per token, and a weight for each head.
The score of a key is the sum over heads of the weight times relu(query . key). A query attends to
the ``top_k`` earlier keys with the best scores, and to no other key. So the cost of attention grows
with the number of tokens times ``top_k``. The cost of the indexer still grows with the square of
the number of tokens, but its heads are narrow.

No gradient flows through the choice. The indexer learns by a loss of its own: the divergence
between the attention's weights, summed over heads, and the softmax of its scores. The divergence is
over the selected keys. In the *warm-up*, attention is to all keys, and so is the divergence. The
inputs of the indexer and the weights of attention are constants of this loss. So it changes the
indexer alone, and the main loss changes all other weights.

Tensor parallelism shards the indexer's heads. The weights of heads and the key of a token have no
heads. Each rank computes them for its own tokens, and the all-gather of the latents has them too. A
rank's scores are summands. A reduce-scatter over tp gives each rank the scores of its own tokens.
The rank chooses their keys, and an all-gather gives each rank all choices: one byte for a query and
a key. The weights of attention, summed over a rank's heads, are reduce-scattered in the same way.

Over cp, a rank all-gathers the indexer's keys of whole rows, and chooses among all of them. The
keys of a query may be anywhere in its row. So the methods over cp are ``allgather`` and
``ulysses``. ``ring`` is refused: in some steps a query would see no key, and a ring computes all
pairs.

In generation, the cache has the indexer's key of each token beside its latent.

Left out: kernels that read the selected keys alone. Here the choice is a mask. flex skips a block
of 128 keys that none of 128 queries selects, and attention otherwise computes all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtron.bounds import divides
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.attention_core import LARGEST, AttentionInputs, core, largest
from dtron.layers.attention_kernels import choose
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import Method
from dtron.layers.kv_cache import Past
from dtron.layers.lightning_indexer import (
    OWN_PAIRS,
    PAIRS,
    IndexedCache,
    Indexer,
    IndexerConfig,
    TokenIndex,
    chosen,
    constant,
    head_weights,
    indexer_loss,
    page_scores,
    row_scores,
    with_selected,
)
from dtron.layers.linear import linear, linear_in
from dtron.layers.mixer import StageInputs
from dtron.layers.mla import MLA, MLAMixer, heads_of, latents
from dtron.layers.mla_decoding import attend_to_latents
from dtron.layers.norm import Norm, norm
from dtron.mesh import Layout
from dtron.params import part

KEY_EPS = 1e-6  # of the norm of the indexer's keys, whatever model.norm_eps is


@dataclass(frozen=True)
class SparseMLA(MLA):
    """The weights: those of latent attention, and the indexer's."""

    indexer: Indexer = part()


def sparse_mla(
    p: SparseMLA,
    x_TD: Tensor,
    inputs: AttentionInputs,
    layout: Layout,
    c: IndexerConfig,
    logits: bool = False,
) -> tuple[Tensor, ...]:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> ``(y_TD, *more)``. ``y_TD`` has the shape and
    placement of ``x_TD``.

    ``logits``: return also the largest logit of each head, over all keys that a query may select.
    ``inputs.valid_T``: if given, return also the term of the loss, and its sums for the report;
        see ``indexer_loss``."""
    i, constant_TD, recipe = p.indexer, constant(x_TD), inputs.recipe
    key_TH = norm(Norm(i.k_scale, i.k_bias), linear(constant_TD, i.w_k), KEY_EPS)  # own tokens
    own = key_TH, linear(constant_TD, i.w_heads)
    q_TR, c_TR, k_TH, *gathered = latents(p, x_TD, inputs, layout, *own)  # all-gather over tp
    assert p.w_q_up is not None
    q_TNH = linear(q_TR, p.w_q_up, recipe=recipe)  # local, own heads
    index = TokenIndex(linear(constant(q_TR), i.w_q), *gathered)
    if inputs.cache is not None:
        selected_TS = None if c.warmup else _selected_pages(index, inputs, layout, c)
        o_TNH = attend_to_latents(q_TNH, c_TR, k_TH, p.w_kv_up, inputs, layout, selected_TS)
        y_TD = linear_in(o_TNH, p.w_o, recipe)
        return (layout.constrain(y_TD, "tokens_sp", "act_embed"),)  # reduce-scatter over tp
    learns = inputs.valid_T is not None
    scores_TS = chosen_TS = selected_TS = None
    if _selects(inputs, c) or learns:
        scores_TS = row_scores(index, inputs, layout, c)  # reduce-scatter over tp
    if scores_TS is not None and _selects(inputs, c):
        chosen_TS = chosen(scores_TS, OWN_PAIRS, layout, c)
        selected_TS = layout.constrain(chosen_TS, *PAIRS)  # all-gather over tp
    kv_TNH = linear(c_TR, p.w_kv_up, recipe=recipe)
    heads, shared = ("tokens", "heads", None), ("tokens", None)

    def on_rank(
        q_TNH: Tensor,
        kv_TNH: Tensor,
        k_TH: Tensor,
        table_TH: Tensor | None,
        documents_T: Tensor | None,
        selected_TS: Tensor | None,
    ) -> tuple[Tensor, ...]:
        own, some = heads_of(q_TNH, kv_TNH, k_TH, table_TH), inputs
        if selected_TS is not None:
            some = replace(inputs, mask=with_selected(inputs.mask, selected_TS, layout))
        out = [core(own, documents_T, None, Past(), some, layout)]
        if logits:
            out.append(largest(own, documents_T, inputs, layout))
        if learns:
            out.append(head_weights(own, documents_T, selected_TS, inputs.mask, layout))
        return tuple(out)

    ins = (heads, heads, shared, shared, ("rows",), shared)
    outs = [heads, *[LARGEST] * logits, *[(*PAIRS, "+heads")] * learns]
    o_TNH, *more = layout.local_map(on_rank, ins, outs)(  # communicates over cp
        q_TNH, kv_TNH, k_TH, inputs.table_TH, inputs.documents_T, selected_TS
    )
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    if scores_TS is None or not learns:
        return y_TD, *more
    weights_TS = layout.constrain(more.pop(), *OWN_PAIRS)  # reduce-scatter over tp
    loss, sums = indexer_loss(scores_TS, weights_TS, chosen_TS, inputs.valid_T, layout)
    return y_TD, *more, c.loss * loss, sums


def _selects(inputs: AttentionInputs, c: IndexerConfig) -> bool:
    """Whether a row has more keys than a query may attend to."""
    return not c.warmup and _row_mask(inputs).seq_len > c.top_k


def _row_mask(inputs: AttentionInputs) -> AttentionMask:
    """Return the mask of whole rows."""
    return inputs.mask if isinstance(inputs.mask, AttentionMask) else inputs.mask.mask


def _selected_pages(
    index: TokenIndex, inputs: AttentionInputs, layout: Layout, c: IndexerConfig
) -> Tensor | None:
    """Return the selected keys of rows' pages. None: all of them."""
    scores_TS = page_scores(index, inputs, layout, c)  # all-reduce over tp
    return chosen(scores_TS, PAIRS, layout, c) if scores_TS.shape[1] > c.top_k else None


class SparseMLAMixer(MLAMixer):
    """Sparse attention as a mixer."""

    params: ClassVar[type] = SparseMLA
    chooses: ClassVar[bool] = True

    @property
    def config(self) -> IndexerConfig:
        return self.model.indexer

    @property
    def loss_name(self) -> str:
        return "indexer"

    def dims(self) -> dict[str, Any]:
        sizes = {"index_heads": self.config.heads, "index_dim": self.config.head_dim}
        return super().dims() | sizes

    def apply(self, p: Any, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
        return sparse_mla(p, x_TD, replace(inputs, valid_T=None), layout, self.config)[0]

    def apply_with_logits(
        self, p: Any, x_TD: Tensor, inputs: AttentionInputs, layout: Layout
    ) -> tuple[Tensor, ...]:
        inputs = replace(inputs, valid_T=None)
        return sparse_mla(p, x_TD, inputs, layout, self.config, logits=True)

    def apply_with_loss(
        self, p: Any, x_TD: Tensor, inputs: AttentionInputs, layout: Layout, logits: bool
    ) -> tuple[Tensor, ...]:
        return sparse_mla(p, x_TD, inputs, layout, self.config, logits)

    def prepare(self, stage: StageInputs, layout: Layout) -> dict[int | None, AttentionInputs]:
        """Choose the kernels again: a choice of keys, like documents, is no plain causal mask.
        Forwards for validation and scoring ask for the default method over cp, whatever training
        has: a ring, which becomes ``allgather``."""
        if stage.cp_method == "ring":
            stage = replace(stage, cp_method="allgather")
        found = super().prepare(stage, layout)
        x, least = stage.x_TD, min(self.head_dims)
        for window, inputs in found.items():
            if _selects(inputs, self.config):
                mask = _row_mask(inputs)
                path = choose(stage.kernel, mask, True, False, least, x.dtype, x.device)
                found[window] = replace(inputs, path=path)
        return found

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> IndexedCache:
        latents = super().empty_cache(rows, slots, layout, dtype, device)
        shape = rows // layout.parts("tokens"), slots, self.config.head_dim
        keys = torch.zeros(shape, dtype=dtype, device=device)
        return IndexedCache(
            latents.k_PSKH, latents.v_PSKH, index_PSH=layout.from_local(keys, "tokens", None, None)
        )

    def flops(self, seq_len: int, window: int | None) -> float:
        """Return the FLOPs of attention to the selected keys, and of the indexer: 2 * heads *
        head_dim for each earlier token, and twice as many in backward."""
        c, w = self.config, min(window or seq_len, seq_len)
        earlier = w - w * w / (2 * seq_len)
        seen = earlier if c.warmup or seq_len <= c.top_k else _mean_seen(seq_len, c.top_k, earlier)
        return 6.0 * (
            self.model.heads * sum(self.head_dims) * seen + c.heads * c.head_dim * earlier
        )

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return the bytes of latent attention, of the indexer's queries, and of a row of numbers
        for each query: scores, target and prediction in 4 bytes each, and choices in one. The row
        is taken to be as long as it can be."""
        c, u = self.config, tokens // mesh.cp
        pairs = (12 * u // mesh.tp + u) * min(tokens, self.model.context)
        index = element * u * (c.heads * c.head_dim // mesh.tp + c.head_dim + c.heads)
        return super().activation_bytes(mesh, tokens, element) + index + pairs

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        """Return the bytes of attention's messages, and of the indexer's keys of whole rows."""
        if mesh.cp == 1:
            return 0
        keys = element * tokens * self.config.head_dim
        return super().message_bytes(mesh, tokens, method, element) + keys

    def check_model(self) -> None:
        super().check_model()
        m, c = self.model, self.config
        if not m.mla.q_rank:
            raise UserError(
                f"model.mla.q_rank=0 with model.pattern={m.pattern}: the indexer's queries are "
                "made from the latent of queries; give --model.mla.q-rank"
            )
        if c.head_dim < m.mla.rope_dim:
            raise UserError(
                f"model.indexer.head_dim={c.head_dim} with model.mla.rope_dim={m.mla.rope_dim}: "
                "the indexer rotates as many dims; use "
                f"--model.indexer.head-dim {m.mla.rope_dim} or more"
            )

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        super().check_mesh(mesh, seq_len, method)
        divides("model.indexer.heads", self.config.heads, "tp", mesh.tp)
        if mesh.cp > 1 and method == "ring":
            raise UserError(
                f"--cp-method ring over cp={mesh.cp} with model.pattern={self.model.pattern}: the "
                "selected keys of sparse attention may be anywhere in a row; use --cp-method "
                "allgather"
            )


def _mean_seen(seq_len: int, top_k: int, earlier: float) -> float:
    """Return the mean number of keys that a token attends to: the first ``top_k`` tokens have
    fewer."""
    return min(earlier, top_k - top_k * top_k / (2 * seq_len))
