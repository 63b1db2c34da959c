"""A layer type is one file: a causal convolution, written here alone, is a mixer of models. It
trains on any mesh with the result of one device, and generates with a cache of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.bounds import divides
from dtron.distributed.collectives import ring_shift
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.layers.linear import linear, linear_in
from dtron.layers.mixer import Mixer, MixerInputs, StageInputs
from dtron.layers.mla import MLAConfig
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout
from dtron.model.activation_checkpoint import POLICIES
from dtron.model.batch import make_batch
from dtron.model.config import MIXERS, ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.params import residual_out, weight
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import check
from dtron.testing import assert_caught, dropped
from dtron.tools.memory_estimate import activation_bytes, block_bytes
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat, leaves
from tests.helpers.paths import ROOT
from tests.helpers.values import ONE, close, normal, same, tree
from tests.layers.test_context_parallel import assert_same_step
from tests.model.test_activation_memory import kept_by
from tests.tools.test_generate import cached, greedy, on_mesh, texts, uncached, weights

# ---- the layer

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
                f"row; use --data.seq-len {BEFORE * mesh.cp}"
            )


@dataclass(frozen=True)
class ConvolutionModel(ModelConfig):
    kinds: ClassVar[Mapping[str, type[Mixer]]] = {**MIXERS, "C": ConvolutionMixer}


# ---- the proofs


M = ConvolutionModel(
    vocab=61, embed=24, layers=2, heads=4, kv_heads=4, head_dim=6, mlp=40, context=64,
    vocab_multiple=1, init_std=0.3, pattern="C",
)  # fmt: skip


def configured(mesh: str, pattern: str = "C", documents: bool = False, **choices) -> RunConfig:
    model = replace(M, pattern=pattern, **choices.pop("model", {}))
    shape = MeshShape.parse(mesh)
    return RunConfig(
        mesh=mesh, model=model, batch=2 * shape.pp * shape.data, micro_batch=1, seed=3,
        data=DataConfig(seq_len=16, document_mask=documents), **choices,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_is_conv1d(packed):
    """Of torch, one document at a time; with gradients."""
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


HERE = sys.modules[__name__]
send, find_documents, with_memory = ring_shift, same_document, with_cache


def blind(documents_T: Tensor, part: Tensor, seq_len: int, parts: int) -> Tensor:
    """On several ranks of cp a token sees what precedes it, whatever it is."""
    sees = find_documents(documents_T, part, seq_len, parts)
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
    with mock.patch.multiple(HERE, **functions), pytest.raises(AssertionError):
        assert_same_step(configured("cp=2", **choices))


@pytest.mark.parametrize("number", [1, 2])
def test_a_dropped_constrain_is_caught(number):
    assert_caught(lambda: assert_same_step(configured("dp=2,tp=2"), dropped(number)))


# ---- generation


PIECES = [[3, 1, 4], [1, 1, 1], [6, 2, 1]]


@pytest.mark.parametrize("pattern", ["C", "AC", "AMC"])
def test_the_cache_changes_nothing(pattern):
    """Rows of unequal lengths, in pieces; a cache that stays empty is seen."""
    latent = LATENT if "M" in pattern else MLAConfig()
    m, rows = replace(M, pattern=pattern, layers=3, mla=latent), texts(*map(sum, PIECES))

    def check_all():
        for row, cuts, got in zip(rows, PIECES, cached(m, rows, PIECES), strict=True):
            want, ends = uncached(m, row), torch.tensor(cuts).cumsum(0) - 1
            torch.testing.assert_close(torch.stack(got), want[ends].float(), rtol=1e-5, atol=1e-5)

    check_all()
    with mock.patch.object(HERE, "with_cache", forgetful):
        assert_caught(check_all)


def forgetful(x_TNH: Tensor, w: Tensor, cache: Tensor, last_B: Tensor, seq_len: int) -> Tensor:
    return with_memory(x_TNH, w, torch.zeros_like(cache), last_B, seq_len)


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
    letters = lambda pattern: [
        p.letter for p in declare_model(replace(mixed, pattern=pattern)).blocks
    ]
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
    with pytest.raises(UserError, match="data.seq_len=4 over cp=2.*--data.seq-len 6"):
        check(M, mesh, 4, zigzag=False)
    with pytest.raises(UserError, match="model.heads=4 over tp=3"):
        check(M, MeshShape(tp=3), 12)
    for pattern in ("", "AB"):
        with pytest.raises(UserError, match="must be one or more of the letters A, M, C"):
            replace(M, pattern=pattern)
    with pytest.raises(UserError, match="model.pattern=AM.*give --model.mla.kv-rank"):
        ModelConfig(pattern="AM")


def test_a_compiled_stage():
    """The tracer sees through the mixer; the gradients are those of the eager program."""
    m, batch = replace(M, pattern="AC"), make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    pipe, params, found = one_stage(m, 1, ONE), weights(m), []
    for functions in (program(m, ONE), compiled(program(m, ONE), ONE, backend="aot_eager")):
        loss, grads, _ = gradients(functions, params, [batch], 32, pipe, 0)
        found.append([loss, *flat(grads)])
    for want, got in zip(*found, strict=True):
        close(got, want)


def test_the_recipe_is_this_file():
    """Every piece of code of the recipe in CONTRIBUTING is in this file. The formatter indents and
    wraps methods differently there."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text()
    section = recipe.split("## Add a layer type")[1].split("\n## ")[0]
    pieces = re.findall(r"```python\n(.*?)```", section, re.S)
    squeezed = lambda code: "".join(code.split())
    assert len(pieces) >= 8
    for piece in pieces:
        assert squeezed(piece) in squeezed(Path(__file__).read_text()), piece
