"""Lab 7: experts. The student's order of tokens, capacity, balance loss and dispatch are compared
with the dense formula: every token at its experts, without a permutation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer, caught
from dtron.course.lab7_mixtures import MUTANTS, RIGHT
from dtron.mesh import Layout
from dtron.params import weight
from dtron.testing import Axes, Outcome, assert_equivalent

EXPERTS, TOP_K, WIDTH, TOKENS = 8, 2, 4, 24
DIMS = {
    "embed": WIDTH,
    "act_experts": EXPERTS,
    "experts": EXPERTS,
    "expert_embed": WIDTH,
    "expert_mlp": WIDTH,
}
TOKEN: Axes = ("tokens_sp", None)
SENT: Axes = ("tokens_ep", None)
MATRICES: Axes = ("experts", None, "expert_mlp")


@dataclass(frozen=True)
class Weights:
    """A router, and one matrix for each expert."""

    w_router: Tensor = weight("embed", "act_experts", summed=1)
    w: Tensor = weight("experts", "expert_embed", "expert_mlp", summed=1)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)


def some_experts(tokens: int, k: int, experts: int) -> Tensor:
    """Return k different experts for each token; the last expert has none."""
    return normal(tokens, experts - 1).topk(k).indices


def order(sizes: Sequence[tuple[int, int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``sort_by_expert`` for some tokens, k, and experts."""

    def check(module: ModuleType) -> None:
        sort_by_expert = answer(module, "sort_by_expert")
        for tokens, k, experts in sizes:
            expert_S = some_experts(tokens, k, experts).flatten()
            slot_R = expert_S.argsort(stable=True)
            want = {
                "slot_R": slot_R.tolist(),
                "place_S": slot_R.argsort().tolist(),
                "counts_E": torch.bincount(expert_S, minlength=experts).tolist(),
            }
            found = sort_by_expert(expert_S, experts)
            for (name, w), got in zip(want.items(), found, strict=True):
                if got.tolist() != w:
                    raise Wrong(
                        f"slots with experts {expert_S.tolist()} of {experts}: {name} is {w}, not "
                        f"{got.tolist()}"
                    )

    return check


def way(tokens: int, k: int) -> Callable[[ModuleType], None]:
    """Make a check of ``permute`` and ``unpermute``: there and back, with gradients."""

    def check(module: ModuleType) -> None:
        permute, unpermute = answer(module, "permute"), answer(module, "unpermute")
        expert_S = some_experts(tokens, k, EXPERTS).flatten()
        slot_R = expert_S.argsort(stable=True)
        x_TD, weights_TK = normal(tokens, 3), normal(tokens, k)
        rows = permute(x_TD, slot_R, k)
        if tuple(rows.shape) != (tokens * k, 3):
            raise Wrong(
                f"permute: {tokens} tokens at {k} experts are {tokens * k} rows, and you "
                f"have the shape {tuple(rows.shape)}"
            )
        token_R = torch.arange(tokens).repeat_interleave(k)[slot_R]
        if (wrong := (rows != x_TD[token_R]).any(1)).any():
            row = int(wrong.nonzero()[0])
            raise Wrong(
                f"permute: row {row} has slot {int(slot_R[row])}, which is of token "
                f"{int(token_R[row])}; yours has another token"
            )
        y_SD = normal(tokens * k, 3)
        leaves = [t.clone().requires_grad_() for t in (y_SD[slot_R], weights_TK)]
        got = unpermute(leaves[0], leaves[1], slot_R.argsort())
        want = (y_SD.view(tokens, k, 3) * weights_TK[:, :, None]).sum(1)
        _equal("unpermute: the output", got, want)
        g = normal(tokens, 3)
        d_rows, d_weights = torch.autograd.grad(got, leaves, g, allow_unused=True)
        _equal(
            "unpermute: the gradient of the rows",
            d_rows,
            (g[:, None] * weights_TK[:, :, None]).flatten(0, 1)[slot_R],
        )
        _equal(
            "unpermute: the gradient of the weights",
            d_weights,
            (y_SD.view(tokens, k, 3) * g[:, None]).sum(-1),
        )

    return check


def _equal(what: str, got: Tensor | None, want: Tensor) -> None:
    if got is None:
        raise Wrong(f"{what} is missing")
    if got.shape != want.shape:
        raise Wrong(f"{what} has the shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if (error := (got - want).abs().max().item()) > 1e-9:
        raise Wrong(f"{what} is wrong by {error:.1e}")


def rooms(cases: Sequence[tuple[int, int, int, float]]) -> Callable[[ModuleType], None]:
    """Make a check of ``capacity`` and ``kept``."""

    def check(module: ModuleType) -> None:
        capacity, kept = answer(module, "capacity"), answer(module, "kept")
        for tokens, k, experts, factor in cases:
            what = f"{tokens} tokens, {k} of {experts} experts, factor {factor:g}"
            room = min(tokens, math.ceil(factor * tokens * k / experts))
            if (got := capacity(tokens, k, experts, factor)) != room:
                raise Wrong(f"{what}: an expert has room for {room}, and you say {got}")
            expert_S = some_experts(tokens, k, experts).flatten()
            weight_S = (normal(tokens * k).abs() * 4).round()  # with ties
            want = _kept(expert_S, weight_S, room)
            mine = kept(expert_S, weight_S, experts, room)
            for e in range(experts):
                slots = (expert_S == e).nonzero().flatten()
                if (n := int(mine[slots].sum())) != int(want[slots].sum()):
                    raise Wrong(
                        f"{what}: expert {e} has {len(slots)} slots and room for {room}, "
                        f"and you keep {n}"
                    )
            if (wrong := mine != want).any():
                slot = int(wrong.nonzero()[0])
                raise Wrong(
                    f"{what}: slot {slot} of expert {int(expert_S[slot])} is "
                    f"{'kept' if want[slot] else 'dropped'}: largest weights are kept, "
                    "and the first slots of equal ones"
                )

    return check


def _kept(expert_S: Tensor, weight_S: Tensor, room: int) -> Tensor:
    """Keep a slot if fewer than ``room`` slots of its expert come before it."""
    same = expert_S[:, None] == expert_S
    slot_S = torch.arange(len(expert_S))
    before = (weight_S > weight_S[:, None]) | (
        (weight_S == weight_S[:, None]) & (slot_S < slot_S[:, None])
    )
    return (same & before).sum(1) < room


def _route(x_TD: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, and the weights and experts of each token. Some experts are liked more."""
    scores_TE = (x_TD @ w + torch.arange(EXPERTS) / 8).softmax(-1)
    weights_TK, index_TK = scores_TE.topk(TOP_K)
    return scores_TE, weights_TK, index_TK


def balance(meshes: Sequence[str]) -> Callable[[ModuleType], None]:
    """Make a check of ``balance_loss``: the same sum on every mesh."""

    def check(module: ModuleType) -> None:
        balance_loss = answer(module, "balance_loss")

        def layer(p: Weights, x_TD: Tensor, layout: Layout) -> Tensor:
            def region(x_TD: Tensor, w: Tensor) -> Tensor:
                scores_TE, _, index_TK = _route(x_TD, w)
                if layout.mesh is None:
                    return _balance(scores_TE, index_TK)
                return balance_loss(scores_TE, index_TK, layout)

            loss = layout.local_map(region, (TOKEN, (None, "act_experts")), ("+tokens_sp",))
            none = layout.local_map(_zero, (MATRICES,), ("+experts", "+expert_mlp"))
            return loss(x_TD, p.w_router) + layout.constrain(none(p.w))

        scores_TE, _, index_TK = _route(normal(TOKENS, WIDTH), normal(WIDTH, EXPERTS))
        got = balance_loss(scores_TE, index_TK, Layout())
        want = _balance(scores_TE, index_TK)
        if abs(float(got - want)) > 1e-9:
            raise Wrong(
                f"one device: the loss of {TOKENS} tokens is {want:.4f}, and you say "
                f"{float(got):.4f}; even loads have {TOKENS}"
            )
        for mesh in meshes:
            _on_mesh(layer, mesh, ("+tokens_sp",), "; is f counted over the tokens of all ranks?")

    return check


def _balance(scores_TE: Tensor, index_TK: Tensor) -> Tensor:
    f_E = (
        torch.bincount(index_TK.flatten(), minlength=EXPERTS).to(scores_TE.dtype) / index_TK.numel()
    )
    return EXPERTS * (scores_TE * f_E).sum()


def _zero(w: Tensor) -> Tensor:
    return (w * 0).sum()  # every weight has a gradient


def _on_mesh(layer: Callable[..., Tensor], mesh: str, out: Axes, why: str = "") -> Outcome:
    try:
        return assert_equivalent(layer, Weights, mesh, DIMS, out=out, tokens=TOKENS)
    except AssertionError as error:
        raise Wrong(f"{error}{why}") from error


def dispatching(meshes: Sequence[str]) -> Callable[[ModuleType], None]:
    """Make a check of ``dispatch``: its values, and what it sends."""

    def check(module: ModuleType) -> None:
        layer = _layer(answer(module, "dispatch"))
        for mesh in meshes:
            got = _on_mesh(layer, mesh, ("tokens_sp", "act_embed"))
            sent: Counter[str] = Counter()
            for collective, n in got.forward.count.items():
                sent[collective.kind] += n
            if (n := sent["all_to_all"]) > 3:
                raise Wrong(
                    f"mesh {mesh}: {n} all-to-alls; three are enough: counts, rows, and rows back"
                )
            if sent["all_gather"]:
                raise Wrong(
                    f"mesh {mesh}: an all-gather over ep sends rows to ranks that do not need them"
                )

    return check


def _layer(dispatch: Callable[..., Tensor]) -> Callable[[Weights, Tensor, Layout], Tensor]:
    """Make a layer: the dense formula on one device, the student's dispatch on a mesh."""

    def layer(p: Weights, x_TD: Tensor, layout: Layout) -> Tensor:
        route = layout.local_map(_route, (TOKEN, (None, "act_experts")), [TOKEN] * 3)
        _, weights_TK, index_TK = route(x_TD, p.w_router)
        if layout.mesh is None:
            y_TKD = torch.einsum("td,tkdf->tkf", x_TD, p.w[index_TK]).tanh()
            return (y_TKD * weights_TK[:, :, None]).sum(1)

        def region(x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, w: Tensor) -> Tensor:
            def run(rows_RD: Tensor, counts_E: Tensor) -> Tensor:
                parts = rows_RD.split(counts_E.tolist())
                return torch.cat([(x @ w_e).tanh() for x, w_e in zip(parts, w, strict=True)])

            group: Any = layout.group("ep")
            return dispatch(x_TD, weights_TK, index_TK, run, EXPERTS, group.ranks)

        sent = (layout.constrain(t, *SENT) for t in (x_TD, weights_TK, index_TK))
        y_TD = layout.local_map(region, (SENT, SENT, SENT, MATRICES), SENT)(*sent, p.w)
        return layout.constrain(y_TD, "tokens_sp", "act_embed")

    return layer


def test_of_the_student(module: ModuleType) -> None:
    caught(answer(module, "check_experts"), [(f,) for f in RIGHT], [(f,) for f in MUTANTS])


LAB = Lab(
    7,
    "experts",
    (
        Part("sort_by_expert", 2, order(((3, 2, 4), (6, 1, 3)))),
        Part("permute, unpermute", 2, way(5, 2)),
        Part("capacity, kept", 2, rooms(((16, 2, 4, 1.0), (9, 2, 4, 1.25)))),
        Part("balance_loss", 2, balance(("dp=2",))),
        Part("dispatch", 3, dispatching(("dp=2,ep=2",))),
        Part("the way, other sizes", 1, way(7, 3), hidden=True),
        Part("capacity, other sizes", 1, rooms(((10, 3, 5, 0.5), (4, 2, 4, 8.0))), hidden=True),
        Part("balance_loss, other meshes", 1, balance(("dp_replicate=2", "tp=2")), hidden=True),
        Part("dispatch, other meshes", 2, dispatching(("dp=4,ep=4", "dp=4,ep=2")), hidden=True),
        Part("check_experts", 4, test_of_the_student, hidden=True),
    ),
)
