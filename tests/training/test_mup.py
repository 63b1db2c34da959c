"""muP: factors that follow from declarations, the step of torch with these factors, any mesh, and
what is refused."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.mla import MLAConfig
from dtron.model.batch import make_batch
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model, forward, predict
from dtron.model.widths import at_width
from dtron.moe.config import MoEConfig
from dtron.mup import FIXED, WIDTHS, Growth, growth
from dtron.params import init
from dtron.rules import RULES
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.launch import plan_run
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools import show, verify
from dtron.training.adamw import AdamW
from dtron.training.optim_config import build_optimizer
from dtron.tree import flat, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL
from tests.helpers.same_step import assert_same_result, model_config
from tests.helpers.texts import one_line
from tests.helpers.values import F64, ONE, assert_steps_of_torch_in_groups, close, normal
from tests.training.toy_optimizers import NormalizedSGD, registered

MOE = MoEConfig(
    experts=4, top_k=2, mlp=24, shared=24, shared_gate=True, router_bias=True, bias=True
)
DENSE = replace(MODEL, kv_heads=2, qkv_bias=True, bias=True, mtp=MTPConfig(depth=1))
SPARSE = replace(MODEL, moe=MOE, sinks=True, tied=True)
LATENT = replace(
    MODEL, qk_norm=False, mla=MLAConfig(kv_rank=12, q_rank=8, nope_dim=6, rope_dim=4, v_dim=6)
)
MODELS = {"dense": DENSE, "sparse": SPARSE, "latent": LATENT}

# The number of dims that a matmul sums over, by the end of a path. All others are no matmul, or the
# head, whose logits have the factor.
SUMS = dict.fromkeys(("w_q", "w_k", "w_v", "w_gate", "w_up", "w_down", "w_h", "w_token"), 1)
SUMS |= dict.fromkeys(("w_q_down", "w_q_up", "w_kv_down", "w_kv_up", "router.w", "w_shared"), 1)
SUMS |= {"w_o": 2}


def sums(path: str) -> int:
    return next((n for name, n in SUMS.items() if path.endswith(f".{name}")), 0)


def growth_is_that_of_shapes(name: str, times: int) -> None:
    narrow = MODELS[name]
    wide = at_width(replace(narrow, mup_base_width=narrow.embed), times * narrow.embed)
    for a, b in zip(flat(declare_model(narrow)), flat(declare_model(wide)), strict=True):
        ratios = [y / x for x, y in zip(a.shape, b.shape, strict=True)]
        ratios = ratios[int(a.axes[0] == "experts" and len(ratios) > 1) :]
        split = sums(a.path)
        want = [torch.tensor(part).prod().item() for part in (ratios[:split], ratios[split:])]
        if a.path.endswith("w_kv_down"):  # the rotary key does not grow, and is made too
            want[1] = times
        assert list(b.growth) == pytest.approx(want), a.path
        assert a.growth == Growth()


@given(name=st.sampled_from([*MODELS]), times=st.integers(2, 4))
def test_growth_is_that_of_shapes(name, times):
    growth_is_that_of_shapes(name, times)


@pytest.mark.parametrize(
    ("axis", "name"), [("heads", "dense"), ("kv_rank", "latent"), ("expert_mlp", "sparse")]
)
def test_an_axis_that_is_forgotten_is_seen(axis, name):
    with (
        mock.patch("dtron.mup.WIDTHS", WIDTHS - {axis}),
        mock.patch("dtron.mup.FIXED", FIXED | {axis}),
    ):
        assert_caught(lambda: growth_is_that_of_shapes(name, 2))


def test_an_axis_without_a_row_is_refused():
    with pytest.raises(ValueError, match="'knots' has no row"):
        growth(("embed", "knots"), 1, 2.0)
    assert growth(("embed", "knots"), 1, 1.0) == Growth()
    of_weights = {
        axis.removeprefix("act_")
        for m in MODELS.values()
        for w in flat(declare_model(m))
        for axis in w.axes
    }
    assert of_weights <= WIDTHS | FIXED <= {axis.removeprefix("act_") for axis in RULES}


@pytest.mark.parametrize("times", [4.0, 0.25])
def test_the_table_of_the_paper(times):
    """Table 8 for hidden and input weights, table 3 for weights with a fixed fan-out."""
    rows = {(times, times): (times**-0.5, 1 / times, 1), (1, times): (1, 1, times)}
    rows |= {(times, 1): (1 / times, 1 / times, 1 / times)}
    for sizes, want in rows.items():
        g = Growth(*sizes)
        assert (g.init_std, g.sign_rate, g.gradient_rate) == pytest.approx(want)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), times=st.integers(2, 5))
def test_the_spectral_norm_of_muons_update(rows, columns, times):
    """The norm of a real update grows as sqrt(fan-out / fan-in)."""
    for up, out in ((times, times), (1, times), (times, 1)):
        big = (rows * up, columns * out)
        norms = [max(n) ** 0.5 for n in ((rows, columns), big)]  # of orthogonal matrices
        got = norms[1] / norms[0] * Growth(up, out).spectral_rate(*big)
        assert got == pytest.approx((out / up) ** 0.5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optim", ["adamw", "muon", "lion", "sgd"])
def test_at_the_base_width_it_is_the_standard_to_the_bit(name, optim):
    m = MODELS[name]
    head = m.mixer(m.letter(0)).head_dims[0]
    steps = []
    for changes in ({}, {"mup_base_width": m.embed, "mup_base_head_dim": head}):
        c = RunConfig(model=replace(m, **changes), data=DataConfig(seq_len=8), batch=4)
        c = replace(c, optim=OptimConfig(name=optim))
        steps.append(verify.one_step(c, MeshShape(), dtype=F64))
    a, b = (
        [one.initial, one.params, *(one.state[name] for name in sorted(one.state))] for one in steps
    )
    assert all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
    assert steps[0].loss == steps[1].loss


def test_a_base_width_that_is_not_the_width_is_seen():
    """A mutant of the test above."""
    c = RunConfig(model=DENSE, data=DataConfig(seq_len=8), batch=4)
    other = replace(c, model=replace(DENSE, mup_base_width=DENSE.embed - 1))
    a, b = (flat(verify.one_step(x, MeshShape()).params) for x in (c, other))
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x.ndim > 1)


WIDE = replace(DENSE, mup_base_width=6, mup_base_head_dim=3)  # 4 times as wide


def of_torch(path: str) -> dict[str, float]:
    """The rate and the decay of a weight of WIDE, by hand."""
    name = path.rpartition(".")[2]
    rate = 0.25 if sums(path) else 1.0
    decay = 0.1 / rate if name.startswith("w_") else 0.0
    return {"rate": rate, "weight_decay": decay, "beta2": 0.95}


def steps_of_torch(compile: bool) -> None:
    optimizer = build_optimizer(OptimConfig(), mup=True)
    assert_steps_of_torch_in_groups(optimizer, WIDE, of_torch, compile)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile", [False, True])
def test_the_steps_are_those_of_torch_with_the_rates_of_the_table(compile):
    steps_of_torch(compile)
    with mock.patch.object(Growth, "sign_rate", property(lambda g: g.fan_in**-0.5)):
        assert_caught(lambda: steps_of_torch(compile))


def test_initial_values():
    """A draw is the standard draw times the factor."""
    spec, plain = declare_model(WIDE), declare_model(DENSE)
    mine, theirs = init(spec, WIDE.dims(), 0, ONE), init(plain, DENSE.dims(), 0, ONE)
    for w, a, b in zip(flat(spec), flat(mine), flat(theirs), strict=True):
        torch.testing.assert_close(a, b * (0.5 if sums(w.path) else 1.0))


def test_logits_and_loss_and_scores():
    """Queries and logits of the standard model, scaled by hand. The loss is that of the logits."""
    m = replace(WIDE, qk_norm=False, mtp=MTPConfig())
    spec = declare_model(m)
    p = tree_map(lambda w: normal(*w.shape, seed=len(w.path)).detach(), spec)
    rows = torch.randint(m.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = make_batch(rows, ONE)
    scaled = [replace(b, mixer=scaled_queries(b.mixer, 0.5**0.5)) for b in p.blocks]
    plain = replace(m, mup_base_width=0, mup_base_head_dim=0)
    want = predict(replace(p, blocks=tuple(scaled)), batch, plain, ONE) / 4
    close(predict(p, batch, m, ONE), want)
    loss = F.cross_entropy(want, batch.targets_T, reduction="sum")
    close(forward(p, batch, m, ONE), loss)
    with mock.patch("dtron.model.head.head_input", lambda x, m: x):
        assert_caught(lambda: close(forward(p, batch, m, ONE), loss))


def scaled_queries(p, factor: float):
    return replace(p, w_q=p.w_q * factor, b_q=p.b_q * factor)


@pytest.mark.parametrize("head_dim", [8, 32])
def test_aligned_scores_do_not_grow_with_the_head(head_dim):
    m = ModelConfig(head_dim=head_dim, mup_base_width=64, mup_base_head_dim=8)
    mixer = m.mixer("A")
    scale = mixer.score_scale(m.rope) or head_dim**-0.5
    assert scale * head_dim == pytest.approx(8**0.5)


@settings(max_examples=examples(2, thorough=60))
@example("dp_replicate=2,dp=2,tp=2", 3, "muon", 5, 0)
@given(
    mesh=meshes(),
    zero=zero_stages(),
    optim=st.sampled_from(["adamw", "muon", "lion", "sgd"]),
    base=st.sampled_from([3, 5, 20]),
    seed=st.integers(0, 99),
)
def test_on_a_mesh(mesh, zero, optim, base, seed):
    on_a_mesh(mesh, optim, zero=zero, mup_base_width=base, seed=seed)


def on_a_mesh(mesh: str, optim: str, **choices) -> None:
    rows = 2 * MeshShape.parse(mesh).data
    choices = {"qkv_bias": True, "mup_base_head_dim": 2, **choices}
    c = model_config(mesh, 2, batch=rows, **choices)
    c = replace(c, optim=OptimConfig(name=optim))
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    assert_same_result(want, verify.one_step(c, MeshShape.parse(mesh)))


COMPOSITIONS = {
    "pp=2,dp=2": {"tied": True, "layers": 2},
    "pp=2,tp=2": {"mtp": MTPConfig(depth=1), "layers": 2},
    "dp=2,tp=2,ep=2": {"moe": MoEConfig(experts=4, top_k=2, mlp=8, shared=8), "tied": True},
    "dp=3,tp=2": {
        "mla": MLAConfig(kv_rank=6, q_rank=4, nope_dim=4, rope_dim=2, v_dim=4),
        "qkv_bias": False,
    },
}


@pytest.mark.parametrize("mesh", COMPOSITIONS)
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_compositions(mesh, optim):
    on_a_mesh(mesh, optim, mup_base_width=5, **COMPOSITIONS[mesh])


def test_a_factor_of_the_shard_is_caught():
    """A mutant: the fan-in is that of a rank's shard, where tp shards what is summed."""
    on_a_mesh("dp=2,tp=2", "adamw", mup_base_width=5)

    def of_shard(self, w):
        return w.growth.sign_rate * (2 if w.axes[0] in ("heads", "mlp") else 1)

    c = model_config("dp=2,tp=2", 2, batch=12, mup_base_width=5)
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    with mock.patch.object(AdamW, "width_rate", of_shard):
        got = verify.one_step(c, MeshShape.parse("dp=2,tp=2"))
    assert_caught(lambda: assert_same_result(want, got))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.mup-base-width=-1"], ["mup_base_width=-1", "change it"]),
        (["--model.mup-base-width=x"], ["mup-base-width"]),
        (["--model.mup-base-width=0.5"], ["mup-base-width"]),
        (["--model.mup-base-head-dim=8"], ["mup_base_width=0", "give --model.mup-base-width too"]),
        (["--model.mup-base-width=64", "--model.mup-base-head-dim=-8"], ["mup_base_head_dim=-8"]),
        (["--model.mup-base-width=99999999999"], ["mup_base_width=99999999999"]),
    ],
)
def test_a_wrong_value_is_one_line(flags, parts):
    one_line(lambda: parse(flags), *parts)


def test_an_optimizer_without_factors_is_one_line():
    model = ModelConfig(mup_base_width=64)
    heads = OptimConfig(name="muon", options="per_head=true")
    one_line(lambda: plan_run(RunConfig(model=model, optim=heads)), "per_head=true", "drop one")
    with registered():
        name = next(n for n, o in registered_names().items() if o is NormalizedSGD)
        config = RunConfig(model=model, optim=OptimConfig(name=name))
        one_line(lambda: plan_run(config), "model.mup_base_width", "NormalizedSGD", "use 0")
        plan_run(replace(config, model=ModelConfig()))


def registered_names():
    from dtron.training.optim_config import OPTIMIZERS

    return OPTIMIZERS


@pytest.mark.parametrize(
    ("m", "width", "parts"),
    [
        (ModelConfig(), 32, ["width 32", "model.kv_heads=4", "would be 0.5", "another width"]),
        (replace(LATENT, mup_base_width=24, mup_base_head_dim=4), 48, ["three widths"]),
    ],
)
def test_a_width_that_cannot_be_is_one_line(m, width, parts):
    one_line(lambda: at_width(m, width), *parts)


def test_show_lists_the_factors(capsys):
    flags = ["--model.layers=2", "--mesh=dp=2", "--model.mup-base-width=64"]
    flags += ["--model.mup-base-head-dim=8"]
    assert run_cli(show.main, flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "optimizer group lr=0.25x, weight_decay=0.4: 14 weights" in out
    assert "muP initial std 0.01 (0.5x): 14 weights" in out
    assert "width 4x of 64: logits 0.25x, attention scores 0.5x" in out
