"""The pieces of attention over shards of rows: token order, merging, backward of a block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.layers import attention_block_kernels, context_parallel, ring_attention
from dtron.layers.attention_kernels import attention_and_lse, attention_reference, with_sinks
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import RowSharding, attend, prepare
from dtron.layers.token_order import as_rows, as_tokens, row_order
from dtron.mesh import Layout
from dtron.testing import meshes
from tests.helpers.values import close, normal, same


@settings(max_examples=30)
@given(
    mesh=meshes(12, ("dp_replicate", "dp", "cp")),
    rows=st.integers(1, 3),
    chunk=st.integers(1, 3),
    zigzag=st.booleans(),
)
def test_the_order_is_a_permutation_that_is_undone(mesh, rows, chunk, zigzag):
    """Every rank has its chunks of each row, an early and a late one. All ranks have equally many
    tokens."""
    shape = MeshShape.parse(mesh)
    n, seq_len = shape.cp, 2 * shape.cp * chunk
    x = torch.arange(rows * shape.data * seq_len).view(-1, seq_len)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh)
        placed = layout.shard(as_tokens(x, layout, zigzag), "tokens")
        held = list(placed.to_local()._local_tensors.values())
    assert torch.equal(as_rows(as_tokens(x, layout, zigzag), layout, seq_len, zigzag), x)
    for rank, got in enumerate(held):
        data, part = divmod(rank, n)
        early = (
            slice(part * chunk, (part + 1) * chunk)
            if zigzag
            else slice(2 * part * chunk, (2 * part + 1) * chunk)
        )
        last = 2 * n - 1 - part if zigzag else 2 * part + 1
        mine = x[data * rows : (data + 1) * rows]
        want = torch.cat([mine[:, early], mine[:, last * chunk : (last + 1) * chunk]], dim=1)
        assert torch.equal(got, want.flatten())


class Called(TorchDispatchMode):
    """The operators of a call."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["allgather", "ring"])
def test_places_are_made_by_arithmetic(method, monkeypatch):
    """A compiler fuses the computation of positions into flex's kernels. Under torch 2.11 these
    kernels take no concatenated tensors: with zigzag, a stage with ``allgather`` did not compile on
    a GPU."""

    def called() -> set[str]:
        with simulated(MeshShape.parse("cp=2")) as mesh, Called() as seen:
            prepare(
                AttentionMask(16),
                None,
                False,
                (8, 8),
                torch.ones(8, 4),
                Layout(mesh),
                sharding=RowSharding(method, zigzag=True),
            )
        return seen.names

    def laid(seq_len, parts, zigzag, device="cpu"):  # the mutant
        chunks = torch.arange(seq_len).view(2 * parts, -1)
        return torch.stack([chunks[:parts], chunks[parts:].flip(0)], dim=1).flatten()

    assert "arange" in called() and not called() & {"cat", "stack"}
    assert torch.equal(laid(48, 3, True), row_order(48, 3, True))
    monkeypatch.setattr(context_parallel, "row_order", laid)
    assert called() & {"cat", "stack"}


def test_a_row_that_zigzag_cannot_cut_is_refused():
    with pytest.raises(
        ValueError, match="sequence 10: zigzag over cp=2 wants a multiple of 4; use --zigzag off"
    ):
        row_order(10, 2, True)


def test_zigzag_gives_all_ranks_the_same_number_of_pairs():
    for n in (2, 3, 8):
        order = row_order(48, n, True).view(n, -1)
        assert (
            len(set((order + 1).sum(1).tolist())) == 1
        )  # a query sees as many keys as its position, and itself
        assert len(set((row_order(48, n, False).view(n, -1) + 1).sum(1).tolist())) == n


@settings(max_examples=20)
@given(
    owners=st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(lambda xs: 0 in xs),
    window=st.none() | st.integers(1, 12),
    softcap=st.sampled_from([None, 0.5]),
    sinks=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_attention_to_parts_of_the_keys_merges_to_that_to_all(
    owners, window, softcap, sinks, packed, seed
):
    """Tokens are dealt out at random, so a query may see no token of a shard. It sees itself, and
    its own shard is first."""
    q, k, v = (normal(2, n, 12, 4, seed=seed + 100 * i) for i, n in enumerate((4, 2, 2)))
    sink = normal(4, seed=seed + 7) if sinks else None
    documents = (normal(2, 12, seed=seed) > 0.5).cumsum(-1) if packed else None
    mask, owner, found = AttentionMask(12, window, softcap), torch.tensor(owners), None
    own = (owner == 0).nonzero().flatten()
    want = attention_reference(q, k, v, documents, sink, mask)[:, :, own]
    for part in ((owner == i).nonzero().flatten() for i in range(4)):
        if len(part):
            step = replace(mask, queries=own[None], keys=part)
            got = attention_and_lse(q[:, :, own], k[:, :, part], v[:, :, part], documents, step)
            found = got if found is None else ring_attention.merge(found, got)
    got = found[0] if sink is None else with_sinks(*found, sink)
    same(got, want, [q, k, v, *([sink] if sinks else [])])


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_backward_under_the_softmax_of_all_keys(causal):
    """The gradients of the shards, each from output and log-sum-exp of the whole row, are the
    gradients of the whole row."""
    q, k, v = (normal(2, n, 6, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    more_k, more_v = normal(2, 2, 5, 4, seed=7), normal(2, 2, 5, 4, seed=8)
    one, two = (
        attention_block_kernels.block_forward(q, k, v, causal),
        attention_block_kernels.block_forward(q, more_k, more_v, False),
    )
    o, lse = ring_attention.merge(one[:2], two[:2])
    result = attention_block_kernels.BlockResult(o, lse, None)
    inputs = [q, k, v, more_k, more_v]
    g = normal(*o.shape, seed=9).detach()
    want = torch.autograd.grad(o, inputs, g)
    with torch.no_grad():
        a = attention_block_kernels.block_backward(g, q, k, v, result, causal)
        b = attention_block_kernels.block_backward(g, q, more_k, more_v, result, False)
        alone = attention_block_kernels.block_backward(g, q, k, v, one, causal)
    close((a[0] + b[0], *a[1:], *b[1:]), want)
    with pytest.raises(AssertionError):  # with its own log-sum-exp a shard ignores the other shards
        close((alone[0] + b[0], *alone[1:], *b[1:]), want)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_heads_of_values_may_have_another_width(method, path):
    """As in latent attention: width 4 for queries and keys, 6 for values; on two ranks."""
    q, k, v = (normal(16, n, h, seed=i) for i, (n, h) in enumerate(((4, 4), (2, 4), (2, 6))))
    by_head = lambda x: x.unflatten(0, (2, 8)).transpose(1, 2)
    want = attention_reference(
        by_head(q), by_head(k), by_head(v), None, None, AttentionMask(8)
    ).transpose(1, 2)
    direction = normal(*want.shape, seed=9).detach()
    want_grads = torch.autograd.grad(want, (q, k, v), direction)
    with simulated(MeshShape(cp=2)) as mesh:
        layout, lies = Layout(mesh), ("tokens", "heads", None)
        turn = as_tokens(torch.arange(16).view(2, 8), layout, True)
        place = lambda x: layout.shard(x.detach()[turn], *lies).requires_grad_()
        xs = [place(x) for x in (q, k, v)]
        mask, chosen = prepare(
            AttentionMask(8), None, False, (4, 6), xs[0], layout, path, RowSharding(method, True)
        )
        fn = lambda q, k, v: attend(q, k, v, None, None, mask, layout, chosen)
        got = layout.local_map(fn, (lies,) * 3, lies)(*xs)
        g = layout.shard(direction.flatten(0, 1)[turn], *lies)
        grads = [full(x) for x in torch.autograd.grad(got, xs, g)]
        got = full(got)
    close(got, want.flatten(0, 1)[turn])
    close(grads, [x[turn] for x in want_grads])
