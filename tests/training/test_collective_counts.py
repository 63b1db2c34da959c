"""Collectives are those that are written down: counts per layer and mesh, and collectives that must
not exist."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import one_rank, simulated
from dtron.layers.attention import Attention, AttentionInputs, attention
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.mlp import MLP, mlp
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.transformer import declare_model, forward
from dtron.params import init, unshard
from dtron.rules import rules_for
from dtron.testing import LayerCase, run_layer
from dtron.tools.count_collectives import Collective, CollectiveCounter, no_hidden_communication
from dtron.tools.verify_step import one_step
from dtron.tree import flat, tree_map
from tests.helpers.runs import train
from tests.helpers.same_step import model_config

DIMS = {
    "embed": 8,
    "mlp": 8,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 2,
    "layers": 1,
    "layernorm": False,
}
DIMS |= {"gated": True, "bias": False, "qkv_bias": False, "qk_norm": True, "sinks": False}
DIMS |= {"qk_heads_norm": False, "attention_gate": False, "mixes": True}
DIMS |= {"pre_norm_1": True, "post_norm_1": False, "pre_norm_2": True, "post_norm_2": False}
MLP_WEIGHTS, ATTENTION_WEIGHTS = 3, 4


def counts(**named: int) -> Counter:
    """``counts(all_gather_tp=1)`` as a counter of collectives."""
    return Counter({Collective(*name.rsplit("_", 1)): n for name, n in named.items() if n})


def attend(p, x, layout):
    return attention(p, x, AttentionInputs(mask=AttentionMask(12)), layout)


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp_replicate=2,tp=2"])
@pytest.mark.parametrize(("fn", "params"), [(mlp, MLP), (attend, Attention)])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_layer_gathers_and_scatters_its_tokens_once_each_way(fn, params, mesh, zero):
    weights = MLP_WEIGHTS if params is MLP else ATTENTION_WEIGHTS
    dp = MeshShape.parse(mesh).dp > 1
    got = run_layer(LayerCase(fn, params, DIMS, tokens=48, zero=zero), mesh)
    gathered = weights if zero == 3 and dp else 0
    assert got.forward.count == counts(all_gather_tp=1, reduce_scatter_tp=1, all_gather_dp=gathered)
    tp = {c: n for c, n in got.total.count.items() if c.axis == "tp" and c.kind != "all_reduce"}
    assert tp == counts(all_gather_tp=2, reduce_scatter_tp=2)
    norms = params is Attention  # of q and k: replicated, summed once over each axis, in one bucket
    assert got.total.count[Collective("all_reduce", "tp")] == norms
    if dp:
        assert got.total.count[Collective("reduce_scatter", "dp")] == (weights if zero else 0)
        # Without ZeRO the weights are in one bucket, too.
        assert got.total.count[Collective("all_reduce", "dp")] == norms + (not zero)


def test_bytes_of_a_layer_follow_the_formula():
    """2 all-gathers and 2 reduce-scatters of the layer's tokens, of T * D * 8 bytes each
    (float64)."""
    got = run_layer(LayerCase(mlp, MLP, DIMS, tokens=48), "tp=4")
    for kind in ("all_gather", "reduce_scatter"):
        assert got.total.bytes[Collective(kind, "tp")] == 2 * 48 * 8 * 8


@pytest.mark.parametrize(("zero", "per_microbatch"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_what_zero_communicates_per_microbatch(zero, per_microbatch):
    config = model_config("dp=2", 2, zero=zero, micro_batch=1, tied=True)
    one, three = (
        one_step(replace(config, batch=2 * n), MeshShape(dp=2)).collectives for n in (1, 3)
    )
    extra = {
        c: three.count[c] - one.count[c] for c in three.count if three.count[c] != one.count[c]
    }
    matrices = sum(w.decays for w in flat(declare_model(config.model)))
    if not per_microbatch:
        assert extra == {}
    else:
        # Stage 2 buckets these small weights. Stage 3 has one gather for each, in the block that it
        # belongs to, and gathers a tied embedding for the look-up and again for the head.
        assert extra[Collective("reduce_scatter", "dp")] == 2 * (matrices + 1 if zero == 3 else 1)
        assert set(extra) <= {Collective("reduce_scatter", "dp"), Collective("all_gather", "dp")}
        assert (Collective("all_gather", "dp") in extra) == (zero == 3)


def test_a_hidden_redistribution_raises():
    """The guard works: x is sharded by tokens over tp, w by columns over tp, and nothing gathered
    x."""
    with simulated(MeshShape(tp=2)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.ones(4, 6), "tokens_sp", "act_embed")
        w = layout.shard(torch.ones(6, 8), "embed", "mlp")
        with pytest.raises(RuntimeError), no_hidden_communication():
            x @ w
        with no_hidden_communication():
            layout.constrain(x, "tokens", "act_embed") @ w


def test_the_counter_sees_a_collective():
    with simulated(MeshShape(tp=2)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.ones(4, 6), "tokens_sp", "act_embed")
        with CollectiveCounter(mesh) as c:
            layout.constrain(x, "tokens", "act_embed")
        assert (
            c.count == counts(all_gather_tp=1)
            and c.bytes[Collective("all_gather", "tp")] == 4 * 6 * 4
        )


class Watch(TorchDispatchMode):
    """Record the placements of every DTensor that an operation takes, and the local shape of every
    result."""

    def __init__(self):
        super().__init__()
        self.placements, self.shapes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [
            a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, DTensor)
        ]
        self.placements |= {type(p).__name__ for t in tensors for p in t.placements}
        if tensors:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        outs = [
            one_rank(t) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
        ]
        self.shapes |= {tuple(n if isinstance(n, int) else -1 for n in t.shape) for t in outs}
        return out


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [("dp=2,tp=2", 1), ("dp=2,tp=2", 3), ("dp=3,tp=2", 3), ("dp_replicate=2,dp=2,tp=2", 3)],
)
def test_no_strided_shard_anywhere(mesh, zero):
    config, shape = (
        model_config(mesh, 2, zero=zero, batch=12, qk_norm=True, steps=1),
        MeshShape.parse(mesh),
    )
    with simulated(shape) as device_mesh, Watch() as seen:
        train(Layout(device_mesh, rules_for(zero)), shape, config)
    assert seen.placements <= {"Shard", "Replicate", "Partial"} and "Shard" in seen.placements


def test_the_watch_sees_a_strided_shard():
    """Two sharded dims that are flattened into one have a strided placement."""
    with simulated(MeshShape(dp=2, tp=2)) as mesh, Watch() as seen:
        x = DTensor.from_local(torch.ones(2, 2, 3), mesh, [Shard(0), Shard(1)], run_check=False)
        try:
            y = x.flatten(0, 1)
        except RuntimeError:
            pytest.skip("this torch refuses to flatten two sharded dims")
        y + y
    assert "_StridedShard" in seen.placements


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp=2"])
def test_logits_of_the_whole_batch_never_exist(mesh):
    """With T tokens a rank, V words and chunks of C < T tokens, no tensor is [T, V] or [T, V /
    tp]."""
    from dtron.layers.cross_entropy import Loss, cross_entropy

    shape = MeshShape.parse(mesh)
    t, v, c = 40, 94, 8
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(1))
        x = (
            layout.shard(torch.randn(t * shape.dp, 6), "tokens_sp", "act_embed")
            .detach()
            .requires_grad_()
        )
        w = (
            layout.unshard(layout.shard(torch.randn(v, 6), "vocab", "embed"), "vocab", "embed")
            .detach()
            .requires_grad_()
        )
        targets = layout.shard(torch.zeros(t * shape.dp, dtype=torch.long), "tokens")
        with Watch() as seen:
            cross_entropy(x, w, targets, Loss(v, c), layout)
    words = v // shape.tp
    assert (c, words) in seen.shapes
    assert not [s for s in seen.shapes if len(s) == 2 and s[0] > c and s[1] in (v, words)]
    if shape.tp > 1:
        assert not [s for s in seen.shapes if v in s and s != (v,) and s[-1] == v]


class Recording(Layout):
    """Record the storage of every gathered block weight, without keeping it alive."""

    def unshard(self, w, *axes, **named):
        out = super().unshard(w, *axes, **named)
        if out is not w and w.ndim > 1:
            self.rules["_unshard"].append(
                StorageWeakRef(one_rank(out.to_local()).untyped_storage())
            )
        return out


def gathered_alive(recompute: str, checkpointed: bool) -> tuple[int, int]:
    """The number of gathered weights in a forward, and of those still alive before its backward."""
    config = model_config("dp=2", 2, zero=3, batch=4, layers=2, tied=False)
    m, spec = config.model, declare_model(config.model)
    with simulated(MeshShape(dp=2)) as mesh:
        layout = Recording(mesh, {**rules_for(3), "_unshard": []})
        params = init(spec, m.dims(), 0, layout, torch.float64)
        weights = tree_map(lambda w: w.detach().requires_grad_(), params)
        batch = make_batch(torch.zeros(4, 13, dtype=torch.long), layout)
        if not checkpointed:  # the mutant: a gather that autograd sees
            weights_used = replace(weights, blocks=unshard(weights.blocks, layout))
            loss = forward(weights_used, batch, m, layout)
        else:
            loss = forward(weights, batch, m, layout, ComputeConfig(recompute))
        gc.collect()
        refs = layout.rules["_unshard"]
        alive = sum(not r.expired() for r in refs)
        assert loss.requires_grad
    return len(refs), alive


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_zero_3_keeps_no_gathered_weight_for_backward(recompute):
    gathered, alive = gathered_alive(recompute, checkpointed=True)
    assert gathered == 2 * (MLP_WEIGHTS + ATTENTION_WEIGHTS) + 2 and alive == 0


def test_a_gather_outside_a_recomputed_block_is_noticed():
    assert gathered_alive("none", checkpointed=False)[1] > 0
