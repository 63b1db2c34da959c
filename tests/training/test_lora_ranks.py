"""Updates beside frozen weights on real ranks, compiled: the gradients of one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dtron.training.zero3_prefetch as zero3_prefetch
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.lora import LoraConfig, with_lora
from dtron.params import draw, normal, stored_dtype
from dtron.rules import rules_for
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import fill, flat
from tests.helpers.compiled import BLOCK, ROWS
from tests.helpers.real_mesh import real_mesh

LORA = LoraConfig(rank=2)
WIDE = replace(BLOCK, embed=128, head_dim=64, mlp=128)  # two blocks of codes on each of two ranks
CASES = {
    "lora": (BLOCK, LORA),
    "dora": (BLOCK, replace(LORA, dora=True)),
    "nf4": (WIDE, replace(LORA, quantize_base="nf4")),
    "one block": (BLOCK, replace(LORA, targets="blocks.0.*")),
}


def grads(layout: Layout, model, lora: LoraConfig, compiles: bool) -> list[torch.Tensor]:
    """Gradients of two microbatches under ZeRO-3."""
    pipe = one_stage(model, 2, layout)
    pipe = replace(pipe, specs=tuple(with_lora(s, lora) for s in pipe.specs))
    functions = program(model, layout, splits=False)
    functions = compiled(functions, layout, backend="aot_eager") if compiles else functions

    def load(w):
        x = draw(replace(w, init=normal) if w.path.endswith("lora_b") else w, model.dims(), 0)
        dtype = stored_dtype(w, layout, torch.float64)
        return layout.shard((1 + x if w.derived else x).to(dtype), *w.axes)

    params = fill(pipe.spec, load)
    batches = [make_batch(rows, layout) for rows in ROWS.chunk(2)]
    return flat(gradients(functions, params, batches, 64, pipe, 3)[1])


def on_pool(mesh: str, model, lora: LoraConfig, mutant: bool) -> list[torch.Tensor]:
    """A job for the pool: the whole gradients."""
    torch.compiler.reset()
    gathers = zero3_prefetch.start_all_gathers
    if mutant:
        zero3_prefetch.start_all_gathers = lambda xs, *rest: [
            x.view(torch.uint8).roll(1).view(x.dtype) for x in gathers(xs, *rest)
        ]
    try:
        made = grads(Layout(real_mesh(mesh), rules_for(3)), model, lora, True)
    finally:
        zero3_prefetch.start_all_gathers = gathers
    return [full(g) for g in made]


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_device(pair, name):
    """With codes, messages of bytes are beside messages of numbers: they must not share one."""
    model, lora = CASES[name]
    want = grads(Layout(), model, lora, False)
    for got in pair.run(on_pool, "dp=2", model, lora, False):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.xdist_group("pool")
def test_a_message_with_wrong_values_is_noticed(pair):
    """The mutant moves the bytes of each message by one."""
    model, lora = CASES["lora"]
    want = grads(Layout(), model, lora, False)
    got = pair.run(on_pool, "dp=2", model, lora, True)[0]
    assert not all(torch.allclose(g, w) for g, w in zip(got, want, strict=True))
