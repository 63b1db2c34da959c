"""The model with its decoding caches: the sharded forward that trains, run for generation.

A mixer has one of two kinds of cache. Keys and values of attention are in pages
(layers/kv_cache.py). The state of a recurrent mixer has a constant size, and each row of the batch
has one. A forward of all rows updates the states in place. A forward of some rows copies their
states out and back. One more place in each pool takes the states of padding rows.

A decode runs the same few kernels for each token, so its units can be compiled
(training/compiled_units.py), like the units of a training step. On a GPU it then also reads pages
in their places. Prefill is not compiled: its shapes have more kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.redistribute import full, to_local
from dtron.errors import UserError
from dtron.generation.forward_inputs import ForwardInputs
from dtron.generation.scheduler import KERNEL_PAGE, CacheSize
from dtron.layers.attention_kernels import LEAST_HEAD_DIM
from dtron.layers.paged_attention import page_order
from dtron.mesh import Layout, by_rows
from dtron.model.batch import Batch, make_batch
from dtron.model.block import Block
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer, embed, embed_params, stage_logits
from dtron.params import unshard
from dtron.schedules.runner import Program
from dtron.torch_compile import DIRECT, Units
from dtron.training.compiled_units import CompiledUnits
from dtron.training.gradients import evaluate
from dtron.training.pipeline import Pipeline
from dtron.training.traced_function import GraphCompiler
from dtron.tree import flat, tree_map


@dataclass(frozen=True)
class BlockCache:
    """The cache of one block.

    ``paged``: whether it is a pool of pages.
    ``cache``: see ``Mixer.empty_cache``."""

    paged: bool
    cache: Any


class CachedModel:
    """The model with caches. ``size.rows`` must be a multiple of ``layout.parts("tokens_sp")``.

    ``backend``: compiles decodes; a backend of ``torch.compile``, or None: they are not compiled.
    ``in_place``: whether decodes read pages in their places. By default, a compiled decode on a GPU
        does so if flex_attention supports the model and the size of a page."""

    def __init__(
        self,
        params: tuple[Transformer, ...],
        m: ModelConfig,
        pipe: Pipeline,
        size: CacheSize,
        device: str,
        backend: Any = None,
        in_place: bool | None = None,
    ):
        self._m, self._pipe, self._layout = m, pipe, by_rows(pipe.layout)
        pools = self._layout.parts("tokens")
        self._places = size.rows // pools + 1
        self._weights = unshard(params, self._layout)
        mesh, dtype = self._layout.mesh, flat(self._weights[0].blocks)[0].dtype
        self._units = backend and CompiledUnits(mesh, GraphCompiler(backend))
        flex = device.startswith("cuda") and dtype != torch.float64 and m.head_dim >= LEAST_HEAD_DIM
        flex = flex and size.page % KERNEL_PAGE == 0
        self._in_place, self._pages = backend and flex if in_place is None else in_place, size.pages

        def empty(p: Block) -> BlockCache:
            mixer = m.mixer(p.letter)
            shape = (size.pages, size.page) if mixer.paged else (self._places, m.context)
            cache = mixer.empty_cache(shape[0] * pools, shape[1], self._layout, dtype, device)
            return BlockCache(mixer.paged, cache)

        self._caches = [tuple(map(empty, p.blocks)) for p in self._weights]

    @torch.no_grad()
    def __call__(self, x: ForwardInputs) -> Tensor | None:
        """Run new tokens, and return the logits after the last token of each row, ``[B, vocab]``.
        Returns None on ranks without the last stage.

        ``x``: on the model's device."""
        layout, m = self._layout, self._m
        batch = make_batch(
            x.tokens_BS,
            layout,
            positions_BS=x.positions_BS,
            counted_BS=x.counted_BS,
            needed=m.moe.capacity_factor > 0,  # padding takes no room of an expert
        )
        decode = x.places_B is None
        order_BP = None
        if decode and self._in_place:
            order_BP = layout.shard(page_order(x.table_BP, self._pages), "tokens", None)
        used = [[self._used(c, x, order_BP) for c in caches] for caches in self._caches]
        call = self._units if decode and self._units else DIRECT
        functions = _functions(m, layout, layout.shard(x.last_B, "tokens"), call)
        stages = list(zip(self._weights, used, strict=True))
        logits = evaluate(functions, stages, [batch], self._pipe)
        for caches, parts in zip(self._caches, used, strict=True):
            for c, part in zip(caches, parts, strict=True):
                self._put_back(c, part, x)
        return None if logits is None else full(logits)

    def _used(self, c: BlockCache, x: ForwardInputs, order_BP: Tensor | None) -> Any:
        """Return the cache of a block for the rows of a forward."""
        layout = self._layout
        if c.paged:
            slots_T = layout.shard(x.slots_BS.flatten(), "tokens")
            alone = x.all_fresh and c.cache.v_PSKH is not None
            table_BP = None if alone else layout.shard(x.table_BP, "tokens", None)
            return replace(c.cache, slots_T=slots_T, table_BP=table_BP, order_BP=order_BP)
        if x.places_B is None or x.fresh_B is None:
            return tree_map(lambda t: _like(t, self._by_place(t)[:-1].flatten(0, 1)), c.cache)
        places, fresh = (to_local(layout.shard(i, "tokens")) for i in (x.places_B, x.fresh_B))

        def pick(t: Tensor) -> Tensor:
            states = self._by_place(t)[places]
            empty = fresh.view(-1, *[1] * (states.ndim - 1))
            return _like(t, states.masked_fill(empty, 0).flatten(0, 1))

        return tree_map(pick, c.cache)

    def _put_back(self, c: BlockCache, used: Any, x: ForwardInputs) -> None:
        """Write the states of some rows back."""
        if c.paged or x.places_B is None:
            return
        places = to_local(self._layout.shard(x.places_B, "tokens"))
        for t, states in zip(flat(c.cache), flat(used), strict=True):
            self._by_place(t)[places] = to_local(states).unflatten(0, (len(places), -1))

    def _by_place(self, t: Tensor) -> Tensor:
        """Return a rank's states of a cache, ``[places, ...]``."""
        return to_local(t).unflatten(0, (self._places, -1))


def _like(x: Tensor, local: Tensor) -> Tensor:
    """Return a rank's tensor with the placements of x."""
    if not isinstance(x, DTensor):
        return local
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)


def pages_in(memory: int, m: ModelConfig, pipe: Pipeline, page: int, dtype: torch.dtype) -> int:
    """Return the number of pages of a pool that has this memory on each rank. Without layers with
    pages, a row of the whole context has room. Raises UserError if a page has no room.

    ``memory``: in bytes.
    ``page``: the number of tokens of a page."""
    size = page_bytes(m, pipe, page, dtype)
    if not size:
        return 1 + -(-m.context // page)
    if memory < 2 * size:
        raise UserError(
            f"a KV cache of {memory} bytes: a page of {page} tokens has {size} bytes, and two are "
            "needed; give it more memory"
        )
    return memory // size


def page_bytes(m: ModelConfig, pipe: Pipeline, page: int, dtype: torch.dtype) -> int:
    """Return the bytes of a page on the rank that has the most layers with pages."""
    layout = by_rows(pipe.layout)
    pools = layout.parts("tokens")

    def of_block(letter: str) -> int:
        mixer = m.mixer(letter)
        if not mixer.paged:
            return 0
        cache = mixer.empty_cache(pools, page, layout, dtype, "cpu")
        return sum(to_local(x).nbytes for x in flat(cache))

    kinds = {letter: of_block(letter) for letter in {b.letter for b in _blocks(pipe.specs)}}
    ranks = range(len(pipe.table.rows))
    specs = [[pipe.specs[s] for s in pipe.table.stages_of(rank)] for rank in ranks]
    return max(sum(kinds[b.letter] for b in _blocks(own)) for own in specs)


def _blocks(specs: Sequence[Transformer]) -> list[Block]:
    return [block for spec in specs for block in spec.blocks]


def _functions(m: ModelConfig, layout: Layout, last_B: Tensor, call: Units) -> Program:
    """Return the model's functions for stages whose params are pairs of weights and caches."""

    def enter(p: tuple[Transformer, Any], batch: Any) -> Tensor:
        return call(_embed, embed_params(p[0]), batch, m, layout)[0]

    def run(p: tuple[Transformer, Any], x_TD: Tensor, batch: Any) -> tuple[Tensor, None]:
        return stage_logits(p[0], x_TD, batch, m, layout, p[1], last_B, call)

    return Program(enter, run)


def _embed(p: Transformer, batch: Batch, m: ModelConfig, layout: Layout) -> tuple[Tensor]:
    return (embed(p, batch, m, layout),)
