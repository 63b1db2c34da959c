"""QK-clip: the weights after a step are those of its definition, on every mesh and in every
format."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers import attention, mla
from dtron.layers.attention_mixer import AttentionMixer
from dtron.layers.cross_entropy import IGNORE
from dtron.layers.rope import RopeConfig
from dtron.model import stage_output, transformer
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import OptimConfig, PipelineConfig, RunConfig
from dtron.testing import assert_caught
from dtron.tools import verify, verify_step
from dtron.tools.compare_steps import StepResult
from dtron.tools.verify_step import one_step
from dtron.tree import leaves
from tests.helpers.compiled import ROWS
from tests.helpers.examples import examples
from tests.helpers.same_step import assert_same_result, model_config
from tests.helpers.texts import one_line
from tests.helpers.train_cli import enter, refused
from tests.helpers.values import F64, ONE, close, turned
from tests.layers.toy_mixer import ConvolutionModel
from tests.model.test_context_models import LATENT

ROPE = RopeConfig()


def clipped(mesh: str, group: int = 2, threshold: float = 6.0, **choices) -> RunConfig:
    """A run whose heads have largest logits of 2 to 20."""
    optim = OptimConfig(qk_clip=threshold, **choices.pop("optim", {}))
    usual = {"batch": 4 * MeshShape.parse(mesh).data, "micro_batch": 2, "init_std": 0.5}
    return model_config(mesh, group, optim=optim, **usual | choices)


# ---- one device: the definition


def rms(x, p, eps):
    return p.scale * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def by_definition(params, config: RunConfig) -> torch.Tensor:
    """The largest logit of each head of the first block, ``[N]``, from all rows at once."""
    m, p = config.model, params.blocks[0]
    rows = verify_step._random_rows(config)
    tokens = rows[:, :-1].masked_fill(rows[:, :-1] == IGNORE, 0)
    x = params.embedding.w_tokens[tokens]
    h = rms(x, p.norm_1, m.norm_eps)
    places = torch.arange(h.shape[1])
    rotated = lambda t: torch.stack([turned(row, places, ROPE) for row in t])
    if m.latent:
        w, eps, c = p.mixer, m.mla.norm_eps, m.mla
        q = torch.einsum("bsr,rnh->bsnh", rms(h @ w.w_q_down, w.q_norm, eps), w.w_q_up)
        latent, shared = (h @ w.w_kv_down).split([c.kv_rank, c.rope_dim], -1)
        kv = torch.einsum("bsr,rnh->bsnh", rms(latent, w.kv_norm, eps), w.w_kv_up)
        q = torch.cat([q[..., : c.nope_dim], rotated(q[..., c.nope_dim :])], -1)
        shared = rotated(shared[:, :, None]).expand(-1, -1, m.heads, -1)
        k = torch.cat([kv[..., : c.nope_dim], shared], -1)
    else:
        w = p.mixer
        q, k = torch.einsum("bsd,dnh->bsnh", h, w.w_q), torch.einsum("bsd,dnh->bsnh", h, w.w_k)
        if w.b_q is not None:
            q, k = q + w.b_q, k + w.b_k
        q, k = rotated(q), rotated(k).repeat_interleave(m.heads // m.kv_heads, 2)
    logits = torch.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    seen = places[:, None] >= places
    if m.window is not None:
        seen &= places[:, None] - places < m.window
    if config.data.document_mask:
        documents, _ = verify_step._random_documents(config)
        seen = seen & (documents[:, :, None] == documents[:, None])[:, None]
    return logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3))


def scaled(path: str, w: torch.Tensor, gamma, config: RunConfig) -> torch.Tensor:
    """The weight of the first block after QK-clip, a head at a time."""
    m, w, name = config.model, w.clone(), path.removeprefix("blocks.0.").rpartition(".")[2]
    group = m.heads // m.kv_heads
    for n in range(m.heads):
        needed_by_all = max(gamma[n // group * group :][:group])
        if m.latent and name == "w_q_up":
            w[:, n, : m.mla.nope_dim] *= gamma[n] ** 0.5
            w[:, n, m.mla.nope_dim :] *= gamma[n]
        elif m.latent and name == "w_kv_up":
            w[:, n, : m.mla.nope_dim] *= gamma[n] ** 0.5
        elif name in ("w_q", "b_q"):
            w[..., n, :] *= gamma[n] / needed_by_all**0.5
        elif name in ("w_k", "b_k") and n % group == 0:
            w[..., n // group, :] *= needed_by_all**0.5
    return w


ONE_DEVICE = [
    {"heads": 6, "kv_heads": 3},
    {"heads": 6, "kv_heads": 6, "softcap": 2.0},
    {"heads": 6, "kv_heads": 2, "window": 4, "qkv_bias": True, "optim": {"name": "muon"}},
    {"heads": 3, "pattern": "M", "mla": LATENT},
    {"heads": 3, "kv_heads": 3, "sinks": True, "recompute": "full", "optim": {"name": "sgd"}},
]


def queries_alone(mixer, p, factor_N):
    return {p.w_q.path: factor_N[:, None]}


def largest_of_the_group(mixer, p, factor_N):
    """All heads of a group shrink as the one with the largest logit."""
    least = factor_N.unflatten(0, (mixer.model.kv_heads, -1)).amin(1)
    each = least.repeat_interleave(len(factor_N) // len(least))
    return {p.w_q.path: each.sqrt()[:, None], p.w_k.path: least.sqrt()[:, None]}


def rotary_key_too(mixer, p, factor_N):
    """Rotary queries are scaled as if their key were too."""
    root = factor_N.sqrt()[:, None]
    keys = torch.cat([root.expand(-1, mixer.model.mla.nope_dim), torch.ones(len(root), 5)], 1)
    return {p.w_q_up.path: root, p.w_kv_up.path: keys}


def assert_its_definition(choices: dict, packed: bool = False) -> StepResult:
    usual = clipped("dp=1", threshold=0.0, **choices)
    usual = replace(usual, data=replace(usual.data, document_mask=packed))
    plain = one_step(usual, MeshShape())
    largest = by_definition(plain.initial, usual).sort()
    threshold = largest.values[len(largest.values) // 2 - 1 :][:2].mean().item()  # in the middle
    config = replace(usual, optim=replace(usual.optim, qk_clip=threshold))
    got = one_step(config, MeshShape())
    gamma = (threshold / by_definition(plain.initial, usual)).clamp(max=1).tolist()
    assert min(gamma) < 0.99 and max(gamma) == 1
    for (path, w), (_, before) in zip(leaves(got.params), leaves(plain.params), strict=True):
        close(w, scaled(path, before, gamma, config), 1e-12)
        for n in range(config.model.heads):
            if gamma[n] == 1 and path.rpartition(".")[2] in ("w_q", "w_q_up", "b_q"):
                assert w[..., n, :].equal(before[..., n, :])
            if gamma[n] == 1 and path.rpartition(".")[2] in ("w_k", "w_kv_up", "b_k"):
                own = n if w.shape[-2] == config.model.heads else n * w.shape[-2] // len(gamma)
                assert w[..., own, :].equal(before[..., own, :])
    return got


@pytest.mark.parametrize("choices", ONE_DEVICE)
@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_those_of_the_definition(choices, packed):
    """Heads under the threshold keep their weights to the bit."""
    assert_its_definition(dict(choices), packed)


@pytest.mark.parametrize(
    ("kind", "mutant", "choices"),
    [
        (AttentionMixer, queries_alone, ONE_DEVICE[1]),
        (AttentionMixer, largest_of_the_group, ONE_DEVICE[0]),
        (mla.MLAMixer, rotary_key_too, ONE_DEVICE[3]),
    ],
)
def test_wrong_shares_are_caught(kind, mutant, choices):
    with mock.patch.object(kind, "logit_factors", mutant):
        assert_caught(lambda: assert_its_definition(dict(choices)))


@pytest.mark.parametrize("choices", [ONE_DEVICE[0], ONE_DEVICE[3]])
def test_logits_are_at_the_threshold_afterwards(choices):
    """With a learning rate of 0 only the clip changes a weight."""
    config = clipped("dp=1", **choices, optim={"lr": 0.0})
    result = one_step(config, MeshShape())
    before, after = (by_definition(p, config) for p in (result.initial, result.params))
    close(after, before.clamp(max=6.0), 1e-12)
    assert before.max() > 6.5


# ---- meshes


def assert_same_step(config: RunConfig) -> None:
    want = one_step(replace(verify.on_one_device(config), recompute="none"), MeshShape())
    assert_same_result(want, one_step(config, MeshShape.parse(config.mesh)))


MESHES = [
    ("dp=2,tp=2", {"zero": 3, "recompute": "selective"}),
    ("dp_replicate=2,dp=2", {"zero": 2, "window": 5, "batch": 16}),
    ("dp=2,tp=2", {"zero": 1, "pattern": "M", "mla": LATENT, "recompute": "full"}),
    ("cp=2,tp=2", {"zero": 3, "zigzag": "on", "mtp": MTPConfig(1)}),
    ("cp=3", {"zero": 1, "cp_method": "allgather", "zigzag": "off", "window": 5}),
    ("dp=2,cp=2", {"zero": 2, "cp_method": "ulysses", "kv_heads": 2, "heads": 6}),
    ("pp=2,dp=2", {"zero": 3, "layers": 3, "zero3_gather": "microbatch"}),
    ("pp=2,cp=2", {"layers": 4, "pipeline": PipelineConfig("zb-v")}),
    ("pp=2", {"layers": 2, "moe": MoEConfig(4, 2, 8, dense_layers=1)}),  # a stage without experts
    ("cp=2,ep=2", {"moe": MoEConfig(4, 2, 8, aux_loss=0.1), "pattern": "AM", "layers": 2}
     | {"mla": LATENT, "kv_heads": 2, "heads": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "choices"), MESHES)
def test_a_step_on_a_mesh(mesh, choices):
    assert_same_step(clipped(mesh, **choices))


@settings(max_examples=examples(3))
@given(
    mesh=st.sampled_from(["tp=4", "dp=3", "cp=2,tp=2", "dp=2,cp=2", "cp=4", "dp=2,tp=3"]),
    zero=st.sampled_from([0, 1, 2, 3]),
    cp_method=st.sampled_from(["ring", "allgather"]),
    zigzag=st.sampled_from(["on", "off"]),
    group=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([None, 3]),
    softcap=st.sampled_from([None, 2.0]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_step_on_any_mesh(packed, **choices):
    config = clipped(**choices)
    unit = {"cp=2,tp=2": 4, "cp=4": 8}.get(config.mesh, 1)
    data = replace(config.data, document_mask=packed, seq_len=-(-12 // unit) * unit)
    assert_same_step(replace(config, data=data))


@pytest.mark.parametrize("mesh", ["dp=2", "cp=2", "dp=2,tp=2"])
def test_the_maximum_of_some_tokens_is_caught(mesh):
    """Mutant: each rank takes the maximum of its own tokens for that of all tokens."""
    config = clipped(mesh, threshold=2.0)
    assert_same_step(config)
    own = ("heads",)
    with (
        mock.patch.object(attention, "LARGEST", own),
        mock.patch.object(stage_output, "LARGEST", own),
    ):
        assert_caught(lambda: assert_same_step(config))


def test_the_last_microbatch_alone_is_caught():
    config = clipped("dp=2", threshold=2.0, batch=12)
    with mock.patch("dtron.schedules.runner.pending_maximum", lambda x, y: y):
        result = one_step(replace(config, batch=12), MeshShape())
    with pytest.raises(AssertionError):
        assert_same_result(one_step(replace(config), MeshShape()), result)


def test_another_order_of_heads_is_caught():
    """Mutant: on a mesh each head has the factor of the next one."""
    config = clipped("tp=2", group=2)
    want = one_step(verify.on_one_device(config), MeshShape())
    usual = AttentionMixer.logit_factors
    turned_by_one = lambda self, p, factor_N: usual(self, p, factor_N.roll(1))
    with mock.patch.object(AttentionMixer, "logit_factors", turned_by_one):
        got = one_step(config, MeshShape.parse("tp=2"))
    with pytest.raises(AssertionError):
        assert_same_result(want, got)


def test_validation_measures_nothing(monkeypatch):
    """Without gradients a block has no report."""
    forbidden = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(attention, "largest", forbidden)
    m, how = clipped("dp=1").model, ComputeConfig(attention_logits=True)
    params = init(declare_model(m), m.dims(), 0, ONE, F64)
    batch = make_batch(ROWS[:2, :13] % m.vocab, ONE)
    with torch.no_grad():
        transformer.forward(params, batch, m, ONE, how)
    assert not forbidden.called
    assert_caught(lambda: transformer.forward(params, batch, m, ONE, how))


# ---- flags and logs


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--optim.qk-clip -1", ["optim.qk_clip=-1", "from 0"]),
        ("--optim.qk-clip nan", ["optim.qk_clip=nan"]),
        ("--optim.qk-clip high", ["--optim.qk-clip", "'high'"]),
        ("--optim.qk-clip 5 --model.qk-norm", ["optim.qk_clip=5", "qk_norm", "--optim.qk-clip 0"]),
    ],
)
def test_a_wrong_threshold_is_refused(argv, parts, tmp_path, monkeypatch, capsys):
    enter(tmp_path, monkeypatch)
    message = refused(capsys, *argv.split())
    for part in parts:
        assert part in message


def test_a_model_without_logits_is_refused():
    model = ConvolutionModel(pattern="C")
    one_line(
        lambda: RunConfig(model=model, optim=OptimConfig(qk_clip=5.0)),
        "optim.qk_clip=5",
        "no layer has attention logits",
    )
