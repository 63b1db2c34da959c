"""LoRA, DoRA and frozen weights in few bits: the step of one device on every mesh, and what frozen
weights do without."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtron.layers.dora as dora_module
import dtron.layers.lora as lora_module
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import PlacementError, UserError
from dtron.layers.dora import DoRA
from dtron.layers.linear import linear
from dtron.layers.lora import LoRA, low_rank
from dtron.layers.quantized_weight import BLOCK, NF4, QuantizedWeight, dense, dequantize, quantize
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.model.flops import flops_per_token
from dtron.model.lora import NO_LORA, LoraConfig, check_lora, is_update, with_lora
from dtron.model.transformer import declare_model, forward, predict
from dtron.moe.config import MoEConfig
from dtron.params import draw, init, normal
from dtron.rules import rules_for
from dtron.runtime.validate import check_expert_sizes
from dtron.testing import assert_caught
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step, plan_of, step_inputs
from dtron.training.build import build_step
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import one_stage, pipeline, program
from dtron.training.zero3_prefetch import UnitWeights
from dtron.tree import fill, flat, map_units, nodes, units
from tests.helpers.compiled import BLOCK as SMALL
from tests.helpers.compiled import ROWS, lone_rank
from tests.helpers.same_step import assert_same_result, model_config
from tests.helpers.values import ONE

LORA = LoraConfig(rank=2)
MOE = MoEConfig(4, 2, 8, shared=8)


def same_step(mesh: str, lora: LoraConfig, **choices) -> None:
    config = replace(model_config(mesh, 2, layers=2, **choices), lora=lora)
    shape = MeshShape.parse(mesh)
    alone = replace(on_one_device(config), recompute="none")
    assert_same_result(one_step(alone, MeshShape()), one_step(config, shape))


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        ("dp=2,cp=2,tp=2", {"zero": 3, "recompute": "selective"}),
        ("pp=2,tp=2", {"zero": 1}),
        ("dp=2,tp=2,etp=2", {"zero": 3, "moe": MOE}),
        ("dp=4,ep=2", {"zero": 2, "moe": MOE}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_step_is_that_of_one_device(mesh, choices, dora):
    same_step(mesh, replace(LORA, dora=dora), **choices)


@pytest.mark.parametrize("format", ["nf4", "fp8"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "ep=2,dp=2"])
def test_a_step_with_weights_in_few_bits_is_that_of_one_device(mesh, format):
    """Every last axis is two blocks on each of two ranks."""
    wide = {"embed": 4 * BLOCK, "head_dim": BLOCK, "mlp": 4 * BLOCK}
    moe = replace(MOE, mlp=2 * BLOCK, shared=4 * BLOCK) if "ep" in mesh else MoEConfig()
    lora = replace(LORA, quantize_base=format)
    same_step(mesh, lora, zero=3, moe=moe, **wide)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(4, 7))
def test_a_wrong_placement_of_a_gradient_is_noticed(row, column, monkeypatch):
    """Mutants: one gradient of an update is no sum over ranks, or is one too many."""
    rows = [list(r) for r in lora_module._PLACEMENTS]
    partial, whole = lora_module.Partial(), lora_module.Replicate()
    if rows[row][column] not in (partial, whole):
        pytest.skip("a sharded gradient cannot be anything else")
    rows[row][column] = whole if rows[row][column] == partial else partial
    monkeypatch.setattr(lora_module, "_PLACEMENTS", tuple(map(tuple, rows)))
    assert_caught(lambda: same_step("dp=2,tp=2", LORA))


@pytest.mark.parametrize("mutant", ["sum", "factor"])
def test_a_wrong_magnitude_is_noticed(mutant, monkeypatch):
    """Mutants: the norm of a rank's own inputs; a gradient of magnitudes that is not summed."""
    if mutant == "sum":
        monkeypatch.setattr(dora_module, "Partial", lora_module.Replicate)
    else:
        rows = [(*r[:3], lora_module.Replicate()) for r in dora_module._PLACEMENTS]
        monkeypatch.setattr(dora_module, "_PLACEMENTS", tuple(rows))
    assert_caught(lambda: same_step("dp=2,tp=2", replace(LORA, dora=True)))


def test_other_placements_are_refused():
    with simulated(MeshShape(tp=2)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.ones(4, 6), "tokens", "mlp")
        a, b = (
            layout.shard(torch.ones(6, 2), "embed", "rank"),
            layout.shard(torch.ones(2, 4), "rank", "mlp"),
        )
        with pytest.raises(PlacementError, match="low-rank update is local"):
            low_rank(x, a, b, 1.0)


def tree(model, lora: LoraConfig, start: bool = False, dtype=torch.float64):
    """Weights whose updates have an effect, unless they are those of the ``start``."""
    spec = with_lora(declare_model(model), lora)

    def load(w):
        if w.derived and start:
            return None
        x = draw(replace(w, init=normal) if is_update(w) and not start else w, model.dims(), 0)
        return (1 + x if w.derived else x).to(dtype)

    return spec, fill(spec, load)


CASES = {"dense": {}, "experts": {"moe": MOE}}
BATCH = make_batch(torch.randint(29, (2, 13), generator=torch.Generator().manual_seed(1)), ONE)


def model(**choices):
    return model_config("", 2, layers=2, **choices).model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_updates_begin_without_an_effect(choices, dora):
    """Bit for bit with LoRA; a magnitude is divided by the norm that it is, to rounding."""
    m = model(**choices)
    _, plain = tree(m, NO_LORA, start=True)
    _, adapted = tree(m, replace(LORA, dora=dora), start=True)
    want, got = (forward(p, BATCH, m, ONE) for p in (plain, adapted))
    assert torch.equal(got, want) if not dora else math.isclose(got, want, rel_tol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_merged_weights_are_the_same_model(choices, dora):
    m = model(**choices)
    _, p = tree(m, replace(LORA, dora=dora, alpha=1.0))
    merged = lambda w: w.merged() if isinstance(w, (LoRA, DoRA)) else w
    want, got = (predict(q, BATCH, m, ONE) for q in (p, map_units(merged, p)))
    assert (got - want).abs().max() < 1e-12
    base = lambda w: flat(w)[0] if isinstance(w, (LoRA, DoRA)) else w
    assert (predict(map_units(base, p), BATCH, m, ONE) - want).abs().max() > 1e-4


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_definition(data):
    """``x W + s (x A) B``, and its gradients, in plain torch."""
    sizes = [data.draw(st.integers(1, 5)) for _ in range(4)]
    t, i, r, o = sizes
    x, w, a, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((t, i), (i, o), (i, r), (r, o))
    )
    y = linear(x, LoRA(w.detach(), a, b, 0.3, 1, False))
    want = x @ (w.detach() + 0.3 * a @ b)
    g = torch.randn_like(y)
    for got, value in zip(
        torch.autograd.grad(y, (x, a, b), g), torch.autograd.grad(want, (x, a, b), g), strict=True
    ):
        torch.testing.assert_close(got, value)
    torch.testing.assert_close(y, want)


def test_frozen_weights_have_no_gradient_no_state_and_no_master():
    config = replace(model_config("", 2, layers=2), lora=replace(LORA, trained="*norm*"))
    plan = plan_of(config, MeshShape(), torch.bfloat16)
    layout = Layout(compute=torch.bfloat16)
    pipe = pipeline(config, MeshShape(), plan.count, 12, layout)
    step = build_step(config, plan, pipe)
    params, batches, tokens = step_inputs(config, pipe, plan.count, plan.master)
    opt = with_compute_copies(
        init_state(step.optimizer, pipe.spec, params), params, pipe.spec, torch.bfloat16
    )
    before = [w.clone() for w in flat(params)]
    spec = flat(pipe.spec)
    assert [x.dtype for x in flat(params)] == [
        torch.bfloat16 if w.frozen else torch.float32 for w in spec
    ]
    pairs = zip(flat(opt.compute_copies), flat(params), spec, strict=True)
    assert all((copy is x) == w.frozen for copy, x, w in pairs)
    _, grads, _ = step.gradients(opt.compute_copies, batches)
    trained = [w.path for w in spec if not w.frozen]
    assert trained and all("lora" in path or "norm" in path for path in trained)
    assert len(flat(grads)) == len(trained) == len(flat(opt.trees["m"]))
    *_, params, opt = step(params, opt, batches, tokens, 0.1)
    for w, x, y in zip(spec, flat(params), before, strict=True):
        assert torch.equal(x, y) == w.frozen, w.path


def test_the_head_of_a_frozen_model_has_no_gradient(monkeypatch):
    """Its gradient would be as large as the head, in float32."""
    m = model()
    _, p = tree(m, LORA)
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(
        torch, "zeros_like", lambda x, **k: (made.append(x.shape), zeros_like(x, **k))[1]
    )
    updates = [
        w.requires_grad_() for unit in units(p) if isinstance(unit, LoRA) for w in flat(unit)[1:]
    ]
    torch.autograd.grad(forward(p, BATCH, m, ONE), updates)
    assert p.w_head.shape not in made


def test_updates_add_no_message_to_a_layer():
    """Over tp an update is local. Its gradients are summed once a step."""
    config = model_config("tp=2", 2, layers=2, zero=0)
    plain, adapted = (
        one_step(replace(config, lora=c), MeshShape(tp=2)).collectives.count
        for c in (NO_LORA, LORA)
    )
    messages = lambda count: {k: n for k, n in count.items() if k.kind != "all_reduce"}
    before = messages(plain)
    # Nothing is differentiated by the embedding, so its gradient is not all-gathered.
    assert {k: before[k] - n for k, n in messages(adapted).items() if before[k] != n} in (
        {},
        {k: 1 for k in before if k.kind == "all_gather"},
    )


def test_no_gathered_frozen_weight_is_kept(monkeypatch):
    """Autograd does not call the backward of a unit whose gathered weights are all frozen."""
    made = []
    start = UnitWeights.__init__
    monkeypatch.setattr(
        UnitWeights, "__init__", lambda self, *args: (start(self, *args), made.append(self))[0]
    )
    layout = Layout(lone_rank("dp=2"), rules_for(3), compute=torch.bfloat16)
    m = replace(SMALL, layers=3)
    functions = compiled(
        program(m, layout, ComputeConfig(), splits=False), layout, backend="aot_eager"
    )
    pipe = one_stage(m, 1, layout)
    lora = replace(LORA, targets="blocks.1.attention.w_o")  # its A is not gathered
    pipe = replace(pipe, specs=tuple(with_lora(s, lora) for s in pipe.specs))
    params = init(pipe.spec, m.dims(), 0, layout, torch.float32)
    gradients(functions, params, [make_batch(ROWS, layout)], 64, pipe, 3)
    gc.collect()
    assert made and not [unit for unit in made if unit._whole is not None]


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_weights_in_few_bits(format):
    w = torch.randn(3, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    w[1, :BLOCK] = 0
    codes, scales = quantize(w, format)
    assert codes.dtype == torch.uint8 and scales.shape == (3, 2)
    got = dequantize(codes, scales, format)
    assert torch.equal(got[1, :BLOCK], w[1, :BLOCK])
    again = quantize(got, format)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    error = (got - w).abs().unflatten(-1, (-1, BLOCK)).amax(-1) / scales.clamp(min=1e-30)
    widest = max(b - a for a, b in zip(NF4, NF4[1:], strict=False)) / 2
    assert error.max() <= (widest + 1e-6 if format == "nf4" else 2.0**-4)


def test_nf4_is_that_of_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

    w = torch.randn(64, 4 * BLOCK, generator=torch.Generator().manual_seed(0))
    theirs = nf4_tensor.to_nf4(w, BLOCK, 256)
    codes, scales = quantize(w, "nf4")
    different = theirs.quantized_data.view_as(codes) != codes  # in the middle between two levels
    assert different.float().mean() < 1e-3
    want = theirs.get_original_weight()  # of scales that are rounded to 8 bits
    assert (dequantize(codes, scales, "nf4") - want).norm() < 0.02 * want.norm()


def test_a_weight_in_few_bits_is_that_of_its_merged_model():
    m = model(embed=BLOCK, head_dim=BLOCK, mlp=BLOCK)
    spec, p = tree(m, replace(LORA, quantize_base="nf4"))
    assert nodes(spec, QuantizedWeight) and all(
        w.frozen for n in nodes(spec, QuantizedWeight) for w in flat(n)
    )
    merged = lambda w: w.merged() if isinstance(w, LoRA) else dense(w)
    got, want = (predict(q, BATCH, m, ONE) for q in (p, map_units(merged, p)))
    assert (got - want).abs().max() < 1e-12


TARGETS = {
    "*": 7,
    "attention.*": 4,
    "attention.w_q,attention.w_v": 2,
    "mlp.w_?p": 1,
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets(targets):
    spec = with_lora(declare_model(model()), replace(LORA, targets=targets))
    for block in spec.blocks:
        assert len(nodes(block, LoRA)) == TARGETS[targets]
    assert all(w.frozen or is_update(w) for w in flat(spec))


def test_targets_by_the_number_of_a_block():
    spec = with_lora(declare_model(model()), replace(LORA, targets="blocks.1.mlp.*"))
    assert [len(nodes(block, LoRA)) for block in spec.blocks] == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attention.w_x"}, r"--lora.targets 'attention.w_x'.*did you mean '"),
        ({"targets": "norm_1.scale"}, "names no weight that can have an update"),
        ({"trained": "nrm"}, r"--lora.trained 'nrm': names no weight"),
        ({"quantize_base": "nf4"}, "are not whole blocks of 64"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_lora(declare_model(model()), replace(LORA, **options), MeshShape(tp=2), 1)


@pytest.mark.parametrize(
    "options", [{"rank": -1}, {"alpha": -1.0}, {"alpha": math.inf}, {"targets": " ,"}]
)
def test_values_that_are_refused(options):
    with pytest.raises(UserError, match="--lora"):
        LoraConfig(**options)


def test_flops_of_frozen_weights():
    """A frozen weight counts 4 for each of its elements, and a trained one 6."""
    m = model()
    embedding = declare_model(m).embedding.w_tokens.numel
    weights = sum(w.numel for w in flat(declare_model(m)))
    updates = sum(w.numel for w in flat(with_lora(declare_model(m), LORA)) if is_update(w))
    less = flops_per_token(m, 12) - flops_per_token(m, 12, LORA)
    assert less == 2 * (weights - embedding) - 6 * updates
    few = replace(LORA, quantize_base="nf4")
    wide = model(embed=BLOCK, head_dim=BLOCK, mlp=BLOCK)
    assert flops_per_token(wide, 12, few) == flops_per_token(wide, 12, LORA)


def test_full_of_an_update_is_independent_of_the_mesh():
    """The draw depends on the path alone."""
    spec = with_lora(declare_model(model()), LORA)
    a = next(w for w in flat(spec) if w.path.endswith("w_up.lora_a"))
    x = draw(a, {}, 0)
    assert x.shape == a.shape and x.abs().max() <= 1 / math.sqrt(10)
    assert torch.equal(full(x), draw(a, {}, 0))


def test_experts_in_bfloat16_take_a_rank_of_whole_rows():
    """The kernel reads rows of 16 bytes."""
    m = replace(model(moe=replace(MOE, mlp=8)), embed=16)
    refuse = lambda lora, dtype: check_expert_sizes(PLAIN, m, MeshShape(), dtype, lora)
    with pytest.raises(UserError, match="--lora.rank 4: .*use --lora.rank 8"):
        refuse(replace(LORA, rank=4), torch.bfloat16)
    refuse(replace(LORA, rank=4), torch.float32)
    refuse(replace(LORA, rank=4, targets="attention.*"), torch.bfloat16)
    refuse(replace(LORA, rank=8), torch.bfloat16)
