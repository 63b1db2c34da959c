"""Lab 6: ring attention. The student's ring runs in a local region over cp, and its values and
gradients are compared with one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer, caught
from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.attention_kernels import attention_and_lse
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.ring_attention import Result
from dtron.layers.ring_attention import merge as right
from dtron.layers.token_order import row_order
from dtron.mesh import Layout
from dtron.params import weight
from dtron.testing import Axes, assert_equivalent
from dtron.tools.count_collectives import Collective

DIMS = {"embed": 6, "head_dim": 4}
INPUTS: dict[str, Axes] = {"x": ("tokens", "act_embed")}
HEADS: Axes = ("tokens", "head_dim")


@dataclass(frozen=True)
class Weights:
    """The weights of one head."""

    w_q: Tensor = weight("embed", "head_dim", summed=1)
    w_k: Tensor = weight("embed", "head_dim", summed=1)
    w_v: Tensor = weight("embed", "head_dim", summed=1)


def merging(module: ModuleType) -> None:
    """Compare ``merge`` with attention to all keys at once."""
    merge = answer(module, "merge")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(1, 1, *shape, dtype=torch.float64).normal_(generator=generator)

    q, k, v = normal(8, 4), normal(8, 4), normal(8, 4)
    places = torch.arange(8)
    for what, scale, cut, later in (
        ("plain scores", 1.0, 2, 8),
        ("scores near 1000", 1000.0, 3, 8),
        ("keys that some queries do not see", 1.0, 5, 0),
    ):
        own, other = (
            attention_and_lse(
                q,
                k[:, :, keys],
                v[:, :, keys],
                None,
                AttentionMask(16, scale=scale, queries=later + places[None], keys=places[keys]),
            )
            for keys in (slice(0, cut), slice(cut, 8))
        )
        whole = AttentionMask(16, scale=scale, queries=later + places[None], keys=places)
        want = attention_and_lse(q, k, v, None, whole)
        got = merge(own, other)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong(f"{what}: merge returns a pair, the output and the lse")
        if not got[1].isfinite().all():
            raise Wrong(f"{what}: the lse of merge is not finite")
        for name, g, w in zip(("the output", "the lse"), got, want, strict=True):
            if g.shape != w.shape:
                raise Wrong(
                    f"{what}: {name} of merge has shape {tuple(g.shape)}, not {tuple(w.shape)}"
                )
            error = (g - w).abs().max().item()
            if error > 1e-9:
                raise Wrong(f"{what}: {name} of merge is wrong by {error:.1e}")


def share_of(lse_ab: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Result, Result], Result]:
    """Make a mutant of merge from its lse."""

    def merge(a: Result, b: Result) -> Result:
        lse = lse_ab(a[1], b[1])
        shares = ((x[1] - lse).exp()[..., None] for x in (a, b))
        share_a, share_b = shares
        return a[0] * share_a + b[0] * share_b, lse

    return merge


def _without_maximum(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() + b.exp()).log()


def _by_minimum(a: Tensor, b: Tensor) -> Tensor:
    least = torch.minimum(a, b)
    return least + ((a - least).exp() + (b - least).exp()).log()


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(a.float(), b.float()).to(a.dtype)


def _lse_of_the_first(a: Result, b: Result) -> Result:
    return right(a, b)[0], a[1]


def _shares_swapped(a: Result, b: Result) -> Result:
    return right((a[0], b[1]), (b[0], a[1]))


MUTANTS = (
    share_of(_without_maximum),
    share_of(_by_minimum),
    share_of(torch.maximum),
    share_of(_in_float32),
    _lse_of_the_first,
    _shares_swapped,
)


def test_of_the_student(module: ModuleType) -> None:
    caught(answer(module, "check_merge"), [(right,)], [(m,) for m in MUTANTS])


def order(cases: Sequence[tuple[int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``zigzag``."""

    def check(module: ModuleType) -> None:
        zigzag = answer(module, "zigzag")
        for seq_len, ranks in cases:
            got = [list(places) for places in zigzag(seq_len, ranks)]
            what = f"{seq_len} tokens on {ranks} ranks"
            if sorted(i for places in got for i in places) != list(range(seq_len)):
                raise Wrong(f"{what}: every place must be on one rank, and you have {got}")
            for rank, want in enumerate(row_order(seq_len, ranks, True).view(ranks, -1).tolist()):
                if got[rank] != want:
                    work = [sum(i + 1 for i in places) for places in got]
                    raise Wrong(
                        f"{what}: rank {rank} has the places {want}, not {got[rank]}; with yours "
                        f"the ranks compute {work} pairs"
                    )

    return check


def pairs(module: ModuleType) -> None:
    """Compare the numbers of pairs of queries and keys with the mask."""
    count = answer(module, "pairs")
    for places in ([0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 14, 15], [7]):
        want = sum(i + 1 for i in places)
        if (got := count(places)) != want:
            raise Wrong(f"queries at {places} see {want} keys in all, and you say {got}")


def ring(cases: Sequence[tuple[str, bool]]) -> Callable[[ModuleType], None]:
    """Make a check of ``ring_attention`` on these meshes, in zig-zag order or not."""

    def check(module: ModuleType) -> None:
        for mesh, zigzag in cases:
            n = MeshShape.parse(mesh).cp
            layer = _layer(answer(module, "ring_attention"), 4 * n, n, zigzag)
            try:
                got = assert_equivalent(
                    layer, Weights, mesh, DIMS, inputs=INPUTS, out=HEADS, tokens=4 * n
                )
            except AssertionError as error:
                raise Wrong(f"{'zig-zag' if zigzag else 'contiguous'} order: {error}") from error
            sent = got.forward.count[Collective("all_to_all", "cp")]
            if sent > 2 * (n - 1):
                times = "once" if n == 2 else f"{n - 1} times"
                raise Wrong(
                    f"mesh {mesh}: k and v are sent {sent} times in all; {times} each is enough, "
                    "because a rank begins with its own"
                )

    return check


def _layer(
    student: Callable[..., Tensor], seq_len: int, n: int, zigzag: bool
) -> Callable[[Weights, Tensor, Layout], Tensor]:
    """Make a layer of one head and one row, whose tokens are in the order of ``n`` shards."""
    order_S = row_order(seq_len, n, zigzag)

    def layer(p: Weights, x_TD: Tensor, layout: Layout) -> Tensor:
        qkv = (x_TD @ p.w_q, x_TD @ p.w_k, x_TD @ p.w_v)
        peers = layout.group("cp")
        if peers is None:
            mask = AttentionMask(seq_len, queries=order_S[None], keys=order_S)
            q, k, v = (t[None, None] for t in qkv)
            return attention_and_lse(q, k, v, None, mask)[0][0, 0]
        place = layout.to_local(layout.iota("sequence", n, "cpu"), "sequence")
        order_PC = order_S.view(n, -1)
        shards = order_PC[(place - torch.arange(n)) % n].unbind()
        masks = [AttentionMask(seq_len, queries=order_PC[place], keys=keys) for keys in shards]

        def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return student(q[None, None], k[None, None], v[None, None], masks, peers)[0, 0]

        return layout.local_map(region, [HEADS] * 3, HEADS)(*qkv)

    return layer


LAB = Lab(
    6,
    "ring_attention",
    (
        Part("merge", 3, merging),
        Part("check_merge", 3, test_of_the_student, hidden=True),
        Part("zigzag", 2, order(((8, 2), (24, 3)))),
        Part("pairs", 1, pairs),
        Part("ring_attention", 4, ring((("cp=2", False), ("cp=3", True)))),
        Part("zigzag, other sizes", 1, order(((16, 4), (4, 1), (80, 5))), hidden=True),
        Part(
            "ring_attention, other meshes", 2, ring((("cp=4", True), ("cp=5", False))), hidden=True
        ),
    ),
)
