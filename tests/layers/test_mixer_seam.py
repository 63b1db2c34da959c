"""The proofs of a layer type in one file, toy_mixer.py.

A model with this layer trains on any mesh with the result of one device. It generates with a cache
of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.layers.mixer import StageInputs
from dtron.layers.mla import MLAConfig
from dtron.mesh import Layout
from dtron.model.activation_bytes import block_bytes
from dtron.model.activation_checkpoint import POLICIES
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import check
from dtron.testing import assert_caught, dropped
from dtron.tools.memory_estimate import activation_bytes
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat, leaves
from tests.generation.models import M as ATTENTION
from tests.generation.models import assert_cached, greedy, on_mesh, weights
from tests.helpers.paths import ROOT
from tests.helpers.values import ONE, close, normal, same, tree
from tests.layers import toy_mixer
from tests.layers.test_context_parallel import assert_same_step
from tests.layers.toy_mixer import (
    BEFORE,
    WIDTH,
    Convolution,
    ConvolutionMixer,
    ConvolutionModel,
    convolution,
    same_document,
    with_cache,
)
from tests.model.test_activation_memory import kept_by

M = ConvolutionModel(**vars(ATTENTION) | {"pattern": "C"})


def configured(mesh: str, pattern: str = "C", documents: bool = False, **choices) -> RunConfig:
    model = replace(M, pattern=pattern, **choices.pop("model", {}))
    shape = MeshShape.parse(mesh)
    return RunConfig(
        mesh=mesh,
        model=model,
        batch=2 * shape.pp * shape.data,
        micro_batch=1,
        seed=3,
        data=DataConfig(seq_len=16, document_mask=documents),
        **choices,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_is_conv1d(packed):
    """The layer is torch's conv1d, one document at a time; with gradients."""
    p, x = tree(Convolution, embed=10, heads=2, head_dim=3, positions=WIDTH), normal(18, 10)
    documents = torch.tensor([0] * 9 + [1, 1, 2, 2, 2, 2, 2, 3, 3]) if packed else None
    batch = make_batch(torch.zeros(2, 10, dtype=torch.long), ONE)
    stage = StageInputs(replace(batch, documents_T=documents), x, (None,))
    inputs = ConvolutionMixer(M).prepare(stage, ONE)[None]
    lengths = [9, 2, 5, 2] if packed else [9, 9]
    kernel = p.w_taps.flatten(1).T.flip(1)[:, None]  # [C, 1, 4]; conv1d correlates
    rows = []
    for row in x.split(lengths):
        h = F.pad((row @ p.w_in.flatten(1)).T, (BEFORE, 0))
        rows.append(F.conv1d(h[None], kernel, groups=6)[0].T @ p.w_out.flatten(0, 1))
    same(convolution(p, x, inputs, ONE), torch.cat(rows), [x, *flat(p)])


LATENT = MLAConfig(kv_rank=12, q_rank=8, nope_dim=6, rope_dim=4, v_dim=5)
STEPS = [
    ("dp=2,tp=2", "C", {"zero": 0}),
    ("dp=3,tp=2", "AC", {"zero": 2, "documents": True}),
    ("cp=2", "C", {}),
    ("cp=4", "AC", {"documents": True}),
    ("cp=2,tp=2", "C", {"zero": 3, "documents": True, "recompute": "full"}),
    ("dp=2,cp=2", "CA", {"zero": 3, "cp_method": "ulysses"}),
    ("pp=2,cp=2", "AC", {"zero": 1, "recompute": "selective"}),
    ("pp=2,tp=2", "AAC", {"zero": 2, "model": {"layers": 4, "window": 5, "full_every": 2}}),
    ("cp=2,tp=2", "AMC", {"documents": True, "model": {"layers": 3, "mla": LATENT}}),
    ("cp=2,ep=2", "C", {"model": {"moe": MoEConfig(4, 2, 8), "mtp": MTPConfig(1)}}),
]


@pytest.mark.parametrize(("mesh", "pattern", "choices"), STEPS)
def test_a_step_is_that_of_one_device(mesh, pattern, choices):
    assert_same_step(configured(mesh, pattern, **choices))


send = toy_mixer.ring_shift


def blind(documents_T: Tensor, part: Tensor, seq_len: int, parts: int) -> Tensor:
    """Mutant: on several ranks of cp a token sees every preceding token, of any document."""
    sees = same_document(documents_T, part, seq_len, parts)
    return torch.ones_like(sees) if parts > 1 else sees


MUTANTS = {
    "no halo": ({"ring_shift": lambda x, ranks: torch.zeros_like(x)}, {}),
    "no gradient of the halo": ({"ring_shift": lambda x, ranks: send(x.detach(), ranks)}, {}),
    "the first rank sees the last": ({"same_document": blind}, {}),
    "other documents are seen": ({"same_document": blind}, {"documents": True}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    functions, choices = MUTANTS[name]
    with mock.patch.multiple(toy_mixer, **functions), pytest.raises(AssertionError):
        assert_same_step(configured("cp=2", **choices))


@pytest.mark.parametrize("number", [1, 2])
def test_a_dropped_constrain_is_caught(number):
    assert_caught(lambda: assert_same_step(configured("dp=2,tp=2"), dropped(number)))


# ---- generation


@pytest.mark.parametrize("pattern", ["C", "AC", "AMC"])
def test_the_cache_changes_nothing(pattern):
    """Rows of unequal lengths, in pieces. A cache that stays empty is noticed."""
    latent = LATENT if "M" in pattern else MLAConfig()
    m = replace(M, pattern=pattern, layers=3, mla=latent)
    check_all = partial(assert_cached, m)
    check_all()
    with mock.patch.object(toy_mixer, "with_cache", forgetful):
        assert_caught(check_all)


def forgetful(x_TNH: Tensor, w: Tensor, cache: Tensor, last_B: Tensor, seq_len: int) -> Tensor:
    return with_cache(x_TNH, w, torch.zeros_like(cache), last_B, seq_len)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "cp=2"])
def test_generation_on_a_mesh(mesh):
    m = replace(M, pattern="AC")
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        got = on_mesh(m, mesh, Layout(device_mesh, rules_for(1)))
    assert got == greedy(m, weights(m), one_stage(m, 1, ONE))


# ---- all that asks a mixer


def test_paths_of_weights_name_the_mixer():
    spec = declare_model(replace(M, pattern="AC"))
    paths = [path for path, _ in leaves(spec)]
    assert paths == [w.path for w in flat(spec)]
    assert "blocks.0.attention.w_q" in paths and "blocks.1.convolution.w_taps" in paths
    assert spec.blocks[1].mixer.w_taps.shape == (WIDTH, 4, 6)
    mixed = replace(M, layers=3, mla=LATENT)

    def letters(pattern):
        return [p.letter for p in declare_model(replace(mixed, pattern=pattern)).blocks]

    assert letters("AC") == ["M", "C", "M"] and letters("AMC") == ["A", "M", "C"]


def test_flops_and_memory():
    m = replace(M, layers=3)
    assert flops_per_token(m, 32) == 6 * (parameter_count(m) - m.vocab * m.embed)
    mixed = replace(M, pattern="AC")
    attended = 6 * 4 * (6 + 6) * 16
    assert flops_per_token(mixed, 32) == 6 * (parameter_count(mixed) - 61 * 24) + attended
    wide = replace(m, embed=64, head_dim=16, mlp=128, context=128, vocab=32)
    of_a_block = kept_by(wide, "none") - kept_by(replace(wide, layers=2), "none")
    assert 1 <= of_a_block / block_bytes(wide, MeshShape(), 2 * 128, element=4).all <= 3
    cp = MeshShape(cp=2, tp=2)
    assert block_bytes(wide, cp, 256).all < block_bytes(replace(wide, pattern="A"), cp, 256).all
    both = (
        activation_bytes(replace(wide, pattern=p), cp, 256, POLICIES["none"], "ring", [3])
        for p in ("C", "AC")
    )
    assert next(both) < next(both)


def test_what_its_checks_refuse():
    mesh = MeshShape(cp=2)
    for pattern in ("C", "AC", "CA"):
        m = replace(M, pattern=pattern)
        assert not RunConfig(model=m).zigzags and m.token_order("ring") == "contiguous"
        with pytest.raises(UserError, match="--zigzag on over cp=2.*convolution.*--zigzag auto"):
            check(m, mesh, 16, zigzag=True)
        check(m, mesh, 16, zigzag=False)
    assert RunConfig(model=replace(M, pattern="A")).zigzags
    with pytest.raises(UserError, match="data.seq_len=4 over cp=2.*longer sequence, of 6"):
        check(M, mesh, 4, zigzag=False)
    with pytest.raises(UserError, match="model.heads=4 over tp=3"):
        check(M, MeshShape(tp=3), 12)
    letters = ", ".join(M.kinds)
    for pattern in ("", "A?"):
        with pytest.raises(UserError, match=f"must be one or more of the letters {letters};"):
            replace(M, pattern=pattern)
    with pytest.raises(UserError, match="model.pattern=AM.*give --model.mla.kv-rank"):
        ModelConfig(pattern="AM")


def test_a_compiled_stage():
    """The tracer sees through the mixer. Compiled gradients are eager gradients."""
    m, batch = replace(M, pattern="AC"), make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    pipe, params, found = one_stage(m, 1, ONE), weights(m), []
    for functions in (program(m, ONE), compiled(program(m, ONE), ONE, backend="aot_eager")):
        loss, grads, _ = gradients(functions, params, [batch], 32, pipe, 0)
        found.append([loss, *flat(grads)])
    for want, got in zip(*found, strict=True):
        close(got, want)


def test_the_recipe_is_this_file():
    """Every piece of code of the recipe in CONTRIBUTING is in toy_mixer.py, but for the lines that
    start a program. The formatter indents and wraps methods differently there."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text()
    section = recipe.split("## Add a layer type")[1].split("\n## ")[0]
    pieces = re.findall(r"```python\n(.*?)```", section, re.S)
    squeezed = lambda code: "".join(code.split())
    assert len(pieces) >= 8
    for piece in (p for p in pieces if "__main__" not in p):
        assert squeezed(piece) in squeezed(Path(toy_mixer.__file__).read_text()), piece
