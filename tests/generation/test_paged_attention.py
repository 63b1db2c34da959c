"""Decodes that are compiled, and decodes that read pages in their places, give the texts of plain
decodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dtron.errors import UserError
from dtron.generation.cached_model import CachedModel
from dtron.generation.engine import Engine
from dtron.generation.forward_inputs import decode_inputs
from dtron.generation.scheduler import CacheSize
from dtron.layers import paged_attention
from dtron.mesh import Layout, stage_mesh
from dtron.rules import rules_for
from dtron.testing import assert_caught
from dtron.training.pipeline import one_stage
from dtron.tree import tree_map
from tests.generation.models import MODELS, on_mesh, weights
from tests.generation.test_engine import SMALL, STREAM, on_one_device, run
from tests.helpers.real_mesh import real_mesh
from tests.helpers.values import ONE

HEADS = ("grouped", "window", "sinks", "softcap", "learned")  # keys and values of heads


def model(name: str, backend: Any = None, in_place: bool = False, layers: int = 0) -> CachedModel:
    m = replace(MODELS[name], layers=layers or MODELS[name].layers)
    return CachedModel(weights(m), m, one_stage(m, 1, ONE), SMALL, "cpu", backend, in_place)


def texts(name: str, forward: CachedModel | None = None, width: int | None = None):
    m = MODELS[name]
    engine = Engine(weights(m), m, one_stage(m, 1, ONE), SMALL)
    if forward is not None:
        engine._forward, engine._width = forward, width
    return run(engine, STREAM)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", HEADS)
def test_pages_are_read_in_their_places(name):
    assert texts(name, model(name, in_place=True)) == texts(name)


def null_page_is_seen(table_BP, pages):
    order = torch.zeros(len(table_BP), pages, dtype=torch.int32)
    return order.scatter(1, table_BP, torch.arange(table_BP.shape[1]).int().expand_as(table_BP))


def places_in_the_pool(self, b, n, i, j):
    return paged_attention.sees(self.mask, None, b, self.mask.queries[b, i], j)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("where", "what", "mutant"),
    [
        (paged_attention, "page_order", null_page_is_seen),
        (paged_attention.PageRule, "__call__", places_in_the_pool),
        (paged_attention, "write", lambda k, v, past: None),
    ],
)
def test_pages_of_other_rows_are_noticed(where, what, mutant, monkeypatch):
    monkeypatch.setattr("dtron.generation.cached_model.page_order", paged_attention.page_order)
    monkeypatch.setattr(where, what, mutant)
    if what == "page_order":
        monkeypatch.setattr("dtron.generation.cached_model.page_order", mutant)
    assert_caught(lambda: test_pages_are_read_in_their_places("grouped"))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_decodes_change_no_text(name):
    """Every length and every layer has the same kinds of units."""
    forward = model(name, "aot_eager")
    width = SMALL.pages - 1
    assert texts(name, forward, width) == texts(name)
    kinds = {(b.letter, b.window) for b in weights(MODELS[name])[0].blocks}
    assert len(forward._units.kinds) == 3 + len(kinds)  # embedding, blocks, last norm, head


def compiled_stream(m, params, pipe, size: CacheSize = SMALL, device="cpu") -> list[list[int]]:
    engine = Engine(params, m, pipe, size, device)
    engine._forward = CachedModel(params, m, pipe, size, device, "aot_eager")
    engine._width = size.pages - 1
    return run(engine, STREAM)


def on_pool(mesh: str) -> list[list[int]]:
    """A job for the pool: text of compiled decodes on real ranks."""
    device_mesh = real_mesh(mesh)
    layout = Layout(stage_mesh(device_mesh), rules_for(1))
    return on_mesh(MODELS["grouped"], mesh, layout, device_mesh, compiled_stream)


@pytest.mark.xdist_group("pool")
def test_compiled_decodes_on_real_ranks(pool):
    assert pool.run(on_pool, "dp=2,tp=2") == [on_one_device("grouped", wide=False)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "latent", "delta", "experts"])
def test_compiled_kernels_change_no_text(name):
    assert texts(name, model(name, "inductor"), SMALL.pages - 1) == texts(name)


def test_what_cannot_be_recorded_is_one_line():
    m = MODELS["experts"]
    with pytest.raises(UserError, match="4 experts"):
        Engine(weights(m), m, one_stage(m, 1, ONE), SMALL, "cpu", cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HEADS)
def test_kernels_read_pages_in_their_places(name):
    m = replace(MODELS[name], head_dim=64, layers=2)
    size = CacheSize(rows=3, pages=8, page=128, chunk=32)
    params = tree_map(lambda w: w.float().cuda(), weights(m))
    pipe = one_stage(m, 1, ONE)
    found = []
    for backend in (None, "inductor"):
        forward = CachedModel(params, m, pipe, size, "cuda", backend)
        found.append(logits_of(forward, m, pipe, params, size))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def logits_of(forward: CachedModel, m, pipe, params, size: CacheSize) -> list[torch.Tensor]:
    """The logits of decodes of two texts; the third row is padding."""
    engine = Engine(params, m, pipe, size, "cuda")
    engine._forward, engine._width = forward, size.pages_for(m.context)
    for text in ([3, 5, 7] * 9, [2, 4]):
        engine.add(text, 6)
    engine.step()
    found = []
    while engine.busy:
        _, pieces = engine._scheduler.plan()
        inputs = decode_inputs(engine._scheduler, pieces, engine._width).to("cuda")
        found.append(forward(inputs)[[p.request.row for p in pieces]].clone())
        for piece in pieces:
            engine._scheduler.commit(piece)
            piece.request.text.append(len(found))
            if piece.request.finished:
                engine._scheduler.remove(piece.request)
    return found
