"""Experts on any mesh give what one device gives; dispatchers give what each other give; and the
mistakes that others have shipped are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.moe.experts import Experts, product
from dtron.moe.layer import MoELayer, moe
from dtron.moe.router import Router, TokenInfo
from dtron.testing import (
    LayerCase,
    assert_caught,
    assert_equivalent,
    dropped,
    poisoned_memory,
    run_layer,
    unsummed,
    zero_stages,
)
from dtron.tools.count_collectives import Collective
from dtron.tree import tree_map

ONE, F64, T = Layout(), torch.float64, 48
DIMS = {
    "embed": 10,
    "expert_embed": 10,
    "gated": True,
    "bias": False,
    "balance_bias": False,
    "layers": 1,
}


def dims(c: MoEConfig) -> dict:
    sizes = {
        "experts": c.experts,
        "expert_mlp": c.mlp,
        "shared_mlp": c.shared,
        "expert_bias": c.bias,
    }
    flags = {
        "router_bias": c.router_bias,
        "shared_expert": c.shared > 0,
        "shared_gate": c.shared_gate,
    }
    return DIMS | sizes | flags


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def expert_meshes(draw, ranks: int = 8, axes=("dp", "cp", "tp")):
    """Mesh texts with experts spread in any way that fits; ep = 1 too."""
    shape = draw(
        st.tuples(*(st.sampled_from([1, 2, 3, 4]) for _ in axes))
        .map(lambda ns: MeshShape(**dict(zip(axes, ns, strict=True))))
        .filter(lambda s: 2 <= s.size <= ranks)
    )
    etp = draw(st.sampled_from([d for d in divisors(shape.tp) if d <= 2]))
    ep = draw(st.sampled_from(divisors(shape.dp * shape.cp * shape.tp // etp)))
    return str(replace(shape, ep=ep, etp=etp))


def skewed(kind: str, experts: int) -> Tensor:
    """Added to the router's logits. ``one``: every token's first choice is expert 0, and with k = 1
    the others have none; ``few``: the upper half has none."""
    places = torch.arange(experts)
    far = {
        "even": places * 0.0,
        "one": (places == 0) * 50.0,
        "few": (places < (experts + 1) // 2) * 50.0,
    }
    return far[kind].double()


def layer(c: MoEConfig, dispatch="auto", skew="even", aux: bool = False):
    """A layer of experts, for ``assert_equivalent``: its output, or what it adds to the loss.
    Sequences have 6 tokens, and every fifth token does not count."""

    def fn(p: MoELayer, x: Tensor, layout: Layout) -> Tensor:
        place = layout.iota("tokens_sp", x.shape[0], "cpu")
        seen = TokenInfo(place % 5 != 0, place // 6, T // 6)
        b = p.router.b + layout.shard(skewed(skew, c.experts), "act_experts")
        p = replace(p, router=replace(p.router, b=b))
        y, loss, _ = moe(p, x, seen, c, layout, dispatch=dispatch)
        return loss if aux else y

    return fn


def config(mesh: str, **choices) -> MoEConfig:
    shape = MeshShape.parse(mesh)
    experts = shape.ep * choices.pop("each", 2)
    top_k = min(choices.pop("top_k", 2), experts)
    return MoEConfig(experts, top_k, 4 * shape.etp, router_bias=True, **choices)


@settings(max_examples=40)
@given(
    mesh=expert_meshes(),
    zero=zero_stages(),
    seed=st.integers(0, 99),
    each=st.sampled_from([1, 2, 3]),
    top_k=st.sampled_from([1, 2, 3]),
    skew=st.sampled_from(["even", "one", "few"]),
    bias=st.booleans(),
    dispatch=st.sampled_from(["alltoall", "static", "allgather"]),
    shared=st.booleans(),
    score=st.sampled_from(["softmax", "topk_softmax", "sigmoid"]),
    activation=st.sampled_from(["swiglu", "clamped_swiglu"]),
)
@pytest.mark.slow
def test_experts_on_any_mesh(mesh, zero, seed, dispatch, skew, shared, **choices):
    tp = MeshShape.parse(mesh).tp
    c = config(mesh, shared=4 * tp if shared else 0, shared_gate=shared, **choices)
    assert_equivalent(
        layer(c, dispatch, skew), MoELayer, mesh, dims(c), tokens=T, zero=zero, seed=seed
    )


FOLDED = [
    "dp=2,ep=2",
    "dp=2,tp=2,ep=4",
    "dp=4,ep=2",
    "tp=2,etp=2",
    "dp=2,cp=2,ep=4",
    "dp=2,tp=2,ep=2,etp=2",
]


@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
@pytest.mark.parametrize(("mesh", "skew"), [*zip(FOLDED, ["even", "one", "few"] * 2, strict=True)])
def test_experts(mesh, skew, dispatch):
    """All dispatchers agree, with each other and with one device, where none drops."""
    c = config(mesh, bias=True, shared=4 * MeshShape.parse(mesh).tp, shared_gate=True)
    zero = 3 if dispatch == "static" else 1
    assert_equivalent(layer(c, dispatch, skew), MoELayer, mesh, dims(c), tokens=T, zero=zero)


def in_bfloat16(fn):
    """The layer as a GPU computes it; ``F.grouped_mm`` then leaves rows behind the last expert
    unwritten."""

    def cast(p: MoELayer, x: Tensor, layout: Layout) -> Tensor:
        narrow = tree_map(lambda w: w.bfloat16(), p)
        return fn(narrow, x.bfloat16(), layout).double()

    return cast


def last_experts(
    x: Tensor, w: Tensor, b: Tensor | None, ends_E: Tensor | None, recipe=None
) -> Tensor:
    """A mutant of ``experts.product``: rows behind the last end get the last expert's bias."""
    y = product(x, w, None, ends_E, recipe)
    if b is None or ends_E is None:
        return product(x, w, b, ends_E, recipe)
    expert_R = torch.searchsorted(ends_E, torch.arange(x.shape[0]), right=True).clamp(
        max=len(b) - 1
    )
    return y + b.index_select(0, expert_R)


def check_in_bfloat16(mesh: str, dispatch: str, **choices) -> None:
    """Rounding differs where a rank sums other rows: 2 ** -8 each, of some ten sums in a row."""
    c = replace(
        config(mesh, bias=True, **choices), mlp=8 * MeshShape.parse(mesh).etp
    )  # 16 bytes a row
    sizes = dims(c) | {"embed": 16, "expert_embed": 16}
    with poisoned_memory():
        assert_equivalent(in_bfloat16(layer(c, dispatch)), MoELayer, mesh, sizes, 0.03, tokens=T)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "dp=2,tp=2,ep=2,etp=2"])
def test_biases_in_bfloat16_with_poisoned_memory(mesh, dispatch, activation):
    check_in_bfloat16(mesh, dispatch, activation=activation)


def test_a_bias_that_reads_unwritten_rows_is_caught(monkeypatch):
    monkeypatch.setattr("dtron.moe.experts.product", last_experts)
    assert_caught(lambda: check_in_bfloat16("dp=2,ep=2", "allgather"))


@settings(max_examples=5)
@given(
    mesh=expert_meshes(),
    score=st.sampled_from(["softmax", "sigmoid"]),
    aux_level=st.sampled_from(["micro_batch", "sequence"]),
    skew=st.sampled_from(["even", "few"]),
)
def test_auxiliary_losses_on_any_mesh(mesh, skew, **choices):
    c = config(mesh, aux_loss=0.3, z_loss=0.2, **choices)
    fn = layer(c, skew=skew, aux=True)

    def whole(p, x, layout):  # every weight has a gradient, if of zero
        e = p.experts
        rest = layout.local_map(
            lambda *ws: sum((w * 0).sum() for w in ws),
            (("experts", None, "expert_mlp"),) * 2 + (("experts", "expert_mlp", None),),
            ("+experts", "+expert_mlp"),
        )(e.w_gate, e.w_up, e.w_down)
        return fn(p, x, layout) + layout.constrain(rest)

    assert_equivalent(whole, MoELayer, mesh, dims(c), out=("+tokens_sp",), tokens=T)


# ---- mistakes


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("mesh", ["tp=2,etp=2", "dp=2,tp=2,ep=2,etp=2"])
def test_a_layer_without_one_constrain_is_caught(mesh, number):
    """The first brings tokens to all ranks that an expert is cut over, the last takes their sum."""
    c = config(mesh)
    check = lambda m: assert_equivalent(layer(c), MoELayer, mesh, dims(c), tokens=T, mutate=m)
    assert_caught(lambda: check(dropped(number)))


@pytest.mark.parametrize("mesh", ["dp=4,ep=2", "dp=2,cp=2,ep=2", "tp=2,etp=2"])
def test_a_right_forward_with_wrong_gradients_is_caught(mesh):
    """Known bug elsewhere, in folding: the experts' gradients are not summed over all that hold
    them."""
    c, seen = config(mesh), []

    def fn(p, x, layout):
        y = layer(c)(p, x, layout)
        seen.append(full(y.detach()))
        return y

    assert_caught(lambda: assert_equivalent(fn, MoELayer, mesh, dims(c), tokens=T, mutate=unsummed))
    torch.testing.assert_close(*seen)


def test_gradients_of_experts_that_are_twice_what_they_should_be_are_caught():
    """Known bug elsewhere: ranks that share tokens each send them. The output is right, and the
    gradient of every expert exactly double."""
    c, mesh = config("tp=2,ep=2"), "tp=2,ep=2"

    def doubled(layout: Layout) -> Layout:
        return replace(layout, rules={**layout.rules, "tokens_ep": layout.rules["tokens"]})

    run = lambda m: run_layer(LayerCase(layer(c), MoELayer, dims(c), tokens=T), mesh, m).tensors
    want, got = run(lambda layout: layout), run(doubled)
    torch.testing.assert_close(got["output"], want["output"])
    name = "gradient of experts.w_up"
    torch.testing.assert_close(got[name], 2 * want[name])
    assert_caught(
        lambda: assert_equivalent(layer(c), MoELayer, mesh, dims(c), tokens=T, mutate=doubled)
    )


# ---- what dispatchers communicate, and wait for


def test_all_to_alls_of_tokens_and_nothing_else_on_ep():
    """Two of tokens each way, and one of the counts; the router's own weight is summed at the
    end."""
    c, mesh, k = config("dp=2,ep=2"), "dp=2,ep=2", 2
    got = run_layer(LayerCase(layer(c, "alltoall"), MoELayer, dims(c), tokens=T, zero=0), mesh)
    assert got.forward.count == {Collective("all_to_all", "dp.ep"): 3}
    assert got.total.count == {
        Collective("all_to_all", "dp.ep"): 5,
        Collective("all_reduce", "dp.ep"): 1,  # gradients of the router, end to end
    }
    tokens = T // 2 * k * 10 * 8  # bytes of a rank's rows
    counts = c.experts * 8
    assert got.forward.bytes[Collective("all_to_all", "dp.ep")] <= 2 * 2 * tokens + counts


@pytest.mark.parametrize(
    ("dispatch", "forward", "total"),
    [
        ("static", {"all_to_all": 2}, {"all_to_all": 4}),
        (
            "allgather",
            {"all_gather": 3, "reduce_scatter": 1},
            {"all_gather": 4, "reduce_scatter": 3},
        ),
    ],
)
def test_what_the_other_dispatchers_communicate(dispatch, forward, total):
    c, mesh = config("dp=2,tp=2,ep=4"), "dp=2,tp=2,ep=4"
    got = run_layer(LayerCase(layer(c, dispatch), MoELayer, dims(c), tokens=T, zero=0), mesh)
    on_ep = lambda counter: {k.kind: n for k, n in counter.count.items() if k.axis == "ep"}
    assert on_ep(got.forward) == forward
    found = on_ep(got.total)
    found.pop("all_reduce")  # of the router's gradient
    assert found == total


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device: a number read, or a shape that values
    decide."""

    NAMES = (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "unique",
        "numpy",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_counts = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        self.count += name in self.NAMES or by_counts
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_the_static_path_never_waits_for_the_device(capacity):
    plain = MoEConfig(8, 2, 16, router_bias=True, aux_loss=0.1, z_loss=0.1)
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=F64).requires_grad_()
    p = MoELayer(
        Router(make(10, 8), make(8), None),
        Experts(make(8, 10, 16), make(8, 10, 16), make(8, 16, 10), None, None, None), None, None,
    )  # fmt: skip
    seen = TokenInfo(torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.long), 1)
    waited = {}
    for dispatch, c in (("static", replace(plain, capacity_factor=capacity)), ("auto", plain)):
        with Waits() as waits:
            y, aux, _ = moe(p, make(T, 10), seen, c, ONE, dispatch=dispatch)
            torch.autograd.grad(y.sum() + aux, [p.experts.w_up, p.router.w])
        waited[dispatch] = waits.count
    assert waited["static"] == 0 < waited["auto"]  # a loop over experts reads its counts
