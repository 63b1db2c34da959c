"""A layer of experts for tests: any mesh, any dispatcher, and tokens that choose few experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.moe.experts import product
from dtron.moe.layer import MoELayer, moe, shared_expert
from dtron.moe.router import TokenInfo

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
    """Draw a mesh with any ep and etp that fit; ep = 1 too."""
    shape = draw(
        st.tuples(*(st.sampled_from([1, 2, 3, 4]) for _ in axes))
        .map(lambda ns: MeshShape(**dict(zip(axes, ns, strict=True))))
        .filter(lambda s: 2 <= s.size <= ranks)
    )
    etp = draw(st.sampled_from([d for d in divisors(shape.tp) if d <= 2]))
    ep = draw(st.sampled_from(divisors(shape.dp * shape.cp * shape.tp // etp)))
    return str(replace(shape, ep=ep, etp=etp))


def skewed(kind: str, experts: int) -> Tensor:
    """Values to add to the router's logits.

    ``one``: every token's first choice is expert 0. With top_k = 1 the other experts have no token.
    ``few``: the upper half of the experts has no token."""
    places = torch.arange(experts)
    far = {
        "even": places * 0.0,
        "one": (places == 0) * 50.0,
        "few": (places < (experts + 1) // 2) * 50.0,
    }
    return far[kind].double()


def layer(c: MoEConfig, dispatch="auto", skew="even", aux: bool = False, padding: bool = False):
    """Build a layer of experts for ``assert_equivalent``: its output, or its auxiliary loss.

    Sequences have 6 tokens. Every fifth token does not count. ``padding``: no loss depends on every
    third token."""

    def fn(p: MoELayer, x: Tensor, layout: Layout) -> Tensor:
        place = layout.iota("tokens_sp", x.shape[0], "cpu")
        needed = place % 3 != 0 if padding else None
        seen = TokenInfo(place % 5 != 0, place // 6, T // 6, needed_T=needed)
        b = p.router.b + layout.shard(skewed(skew, c.experts), "act_experts")
        p = replace(p, router=replace(p.router, b=b))
        y, loss, _ = moe(p, x, seen, c, layout, dispatch=dispatch)
        if p.shared is not None:
            y = y + shared_expert(p, x, layout)
        return loss if aux else y

    return fn


def config(mesh: str, **choices) -> MoEConfig:
    shape = MeshShape.parse(mesh)
    experts = shape.ep * choices.pop("each", 2)
    top_k = min(choices.pop("top_k", 2), experts)
    return MoEConfig(experts, top_k, 4 * shape.etp, router_bias=True, **choices)


def last_experts(
    x: Tensor, w: Tensor, b: Tensor | None, ends_E: Tensor | None, recipe=None
) -> Tensor:
    """A mutant of ``experts.product``: rows behind the last end get the last expert's bias."""
    y = product(x, w, None, ends_E, recipe)
    if b is None or ends_E is None:
        return product(x, w, b, ends_E, recipe)
    places = torch.arange(x.shape[0], device=x.device, dtype=ends_E.dtype)
    expert_R = torch.searchsorted(ends_E, places, right=True).clamp(max=len(b) - 1)
    return y + b.index_select(0, expert_R)
