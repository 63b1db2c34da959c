"""A configuration that does not fit is one error, and the error's remedy works."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.mla import MLAConfig
from dtron.layers.rope import RopeConfig
from dtron.moe.config import MoEConfig
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.runtime.validate import check, check_attention, microbatches


@pytest.mark.parametrize(
    ("values", "message", "remedy"),
    [
        (
            {"mesh": "tp=3"},
            "model.heads=8 over tp=3.*use tp=2 or --model.heads 9",
            {"mesh": "tp=2"},
        ),
        (
            {"mesh": "tp=8"},
            "model.kv_heads=4 over tp=8.*use tp=4 or --model.kv-heads 8",
            {"kv_heads": 8},
        ),
        (
            {"mesh": "dp=3,tp=2", "mlp": 7},
            "model.mlp=7 over tp=2.*use tp=1 or --model.mlp 8",
            {"mlp": 8},
        ),
        (
            {"mesh": "tp=2", "seq_len": 15},
            "seq_len=15 over tp=2.*--data.seq-len 16",
            {"seq_len": 16},
        ),
        ({"seq_len": 2049}, "data.seq_len=2049.*2048 or --model.context 2049", {"context": 2049}),
        (
            {"mesh": "tp=3", "heads": 3, "kv_heads": 3, "mlp": 6, "vocab": 4, "vocab_multiple": 1},
            "model.vocab=4 over tp=3.*use --model.vocab-multiple 3",
            {"vocab_multiple": 3},
        ),
        (
            {"mesh": "cp=2", "seq_len": 18},
            "seq_len=18 over cp=2.*--data.seq-len 20",
            {"seq_len": 20},
        ),
    ],
)
def test_check(values, message, remedy):
    """Every error has the value and a remedy, and the remedy helps."""
    run = lambda mesh="", seq_len=24, **m: check(ModelConfig(**m), MeshShape.parse(mesh), seq_len)
    with pytest.raises(ValueError, match=message):
        run(**values)
    run(**values | remedy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final_softcap": -1.0}, "model.final_softcap=-1.0: must be positive"),
        ({"attention_scale": float("inf")}, "model.attention_scale=inf: must be positive"),
        ({"embedding_scale": 0.0}, "model.embedding_scale=0.0: must be positive"),
        ({"residual_scale": float("nan")}, "model.residual_scale=nan: must be positive"),
        ({"logit_scale": -2.0}, "model.logit_scale=-2.0: must be positive"),
        ({"window_rope_theta": 1.0}, "model.window_rope_theta=1.0: must be over 1"),
        ({"window_rope_theta": 9.0}, "model.window_rope_theta=9.0.*give --model.window"),
        ({"qk_norm_over": "projection"}, "model.qk_norm_over=projection.*--model.qk-norm and"),
        (
            {"qk_norm": True, "qk_norm_over": "projection", "norm": "layernorm"},
            "model.qk_norm_over=projection with model.norm=layernorm.*--model.norm rmsnorm",
        ),
        ({"qk_norm_over": "rotated"}, "model.qk_norm_over=rotated.*--model.qk-norm and"),
        ({"attention_temperature": -1.0}, "model.attention_temperature=-1.0.*must be from 0"),
        ({"attention_temperature": 0.1}, "model.attention_temperature=0.1.*a pattern with N"),
        (
            {"mup_base_width": 64, "mup_base_head_dim": 8, "qk_norm": True}
            | {"qk_norm_over": "rotated"},
            "model.mup_base_head_dim=8 with model.qk_norm_over=rotated.*use 0",
        ),
        ({"rope": RopeConfig(partial=0.1), "head_dim": 16}, "model.rope.partial=0.1.*1 dims"),
        ({"mla": MLAConfig(8), "rope": RopeConfig(partial=0.5)}, "rope.partial=0.5 with .*kv_rank"),
    ],
)
def test_values_that_no_model_has(values, message):
    with pytest.raises(UserError, match=message) as error:
        ModelConfig(**values)
    assert "\n" not in str(error.value)


def test_a_rope_that_rotates_nothing():
    with pytest.raises(UserError, match="partial=0.0.*partial over 0"):
        RopeConfig(partial=0.0)


@pytest.mark.parametrize(
    ("path", "model", "dtype", "device", "message"),
    [
        (
            "sdpa",
            {"softcap": 30.0},
            torch.float32,
            "cpu",
            "sdpa with model.softcap=30.0: .*no soft-cap",
        ),
        (
            "sdpa",
            {"sinks": True},
            torch.bfloat16,
            "cuda:0",
            "sdpa with model.sinks=True: .*no sinks",
        ),
        ("flex", {}, torch.float32, "cpu", "flex with device=cpu: .*no backward"),
        (
            "flex",
            {"head_dim": 8},
            torch.bfloat16,
            "cuda:0",
            "flex with model.head_dim=8: .*16 and more",
        ),
        ("flex", {}, torch.float64, "cuda:0", "flex with dtype=float64: .*float32"),
    ],
)
def test_a_path_of_attention_that_cannot(path, model, dtype, device, message):
    with pytest.raises(ValueError, match=message + ".*; use --attention-kernel auto"):
        check_attention(path, ModelConfig(**model), dtype, device)
    for able in ("auto", "reference"):
        check_attention(able, ModelConfig(**model), dtype, device)
    check_attention(
        "flex", ModelConfig(softcap=1.0, sinks=True, window=3), torch.bfloat16, "cuda:0"
    )
    check_attention("sdpa", ModelConfig(window=3), torch.float64, "cpu")


@given(
    batch=st.integers(1, 60),
    micro_batch=st.none() | st.integers(1, 9),
    mesh=st.builds(
        MeshShape, dp_replicate=st.integers(1, 3), dp=st.integers(1, 4), tp=st.integers(1, 2)
    ),
)
def test_microbatches(batch, micro_batch, mesh):
    """The microbatches make up the batch exactly. Otherwise the error names a batch that fits."""
    ranks = mesh.dp_replicate * mesh.dp
    try:
        count, rows = microbatches(batch, micro_batch, mesh)
    except ValueError as error:
        said = re.search(rf"batch={batch}:.* {ranks} data ranks; use --batch (\d+)", str(error))
        batch = int(said[1])
        count, rows = microbatches(batch, micro_batch, mesh)
    assert count * rows == batch
    assert rows == micro_batch * ranks if micro_batch else rows % ranks == 0


def test_microbatches_suggest_the_nearest_batch():
    with pytest.raises(
        ValueError, match="use --batch 9"
    ):  # 3 ranks; 6 would do too, but 9 is nearer
        microbatches(8, None, MeshShape(dp=3))


@pytest.mark.parametrize(("batch", "micro_batch"), [(0, None), (4, 0)])
def test_microbatches_are_not_empty(batch, micro_batch):
    with pytest.raises(ValueError, match=f"batch={batch}, micro_batch={micro_batch}.*at least 1"):
        microbatches(batch, micro_batch, MeshShape())


@pytest.mark.parametrize(
    ("text", "world", "want"),
    [
        ("", None, MeshShape()),
        ("", 6, MeshShape(dp=6)),
        ("tp=2,dp=3", None, MeshShape(dp=3, tp=2)),
        (" tp = 2 , dp_replicate=2,", 12, MeshShape(dp_replicate=2, dp=3, tp=2)),
        ("tp=4", 4, MeshShape(tp=4)),
    ],
)
def test_mesh_text(text, world, want):
    assert MeshShape.parse(text, world) == MeshShape.parse(str(want)) == want


@pytest.mark.parametrize(
    ("text", "world", "message"),
    [
        (
            "xp=2",
            None,
            "'xp=2': unknown axis 'xp'; the axes are pp, dp_replicate, dp, cp, tp, ep, etp",
        ),
        ("4", None, "unknown axis '4'.*as in dp=2,tp=2"),
        ("tp=2,tp=2", None, "'tp=2,tp=2': axis 'tp' is given twice; write it once"),
        ("tp=0", None, "tp has size '0'.*positive integer, as in tp=2"),
        ("tp=-1", None, "tp has size '-1'"),
        ("dp=²", None, "dp has size '²'"),
        ("dp", None, "dp has size ''"),
        (
            "dp=2",
            4,
            r"'dp=2' has 2 ranks, but 4 are running: start 2 processes "
            r"\(torchrun --nproc-per-node 2",
        ),
        ("tp=4", 1, "has 4 ranks, but 1 is running.*or add --simulate"),
        ("tp=2", 3, "has 2 ranks, but 3 are running: choose sizes whose product divides 3"),
    ],
)
def test_bad_mesh_text(text, world, message):
    with pytest.raises(ValueError, match=message):
        MeshShape.parse(text, world)


@pytest.mark.parametrize(
    ("mesh", "experts", "zero", "halves"),
    [
        ("pp=2,dp=2", 0, 1, True),
        ("pp=2,dp=2", 0, 3, False),
        ("pp=2,cp=2", 0, 3, False),
        ("pp=2,tp=2", 0, 3, True),
        ("pp=2,tp=2", 4, 3, False),  # experts are sharded over edp, which contains tp
        ("pp=2,tp=2,ep=2", 4, 3, True),
    ],
)
def test_a_backward_is_in_halves_where_blocks_gather_nothing(mesh, experts, zero, halves):
    model = ModelConfig(moe=MoEConfig(experts=experts, top_k=2)) if experts else ModelConfig()
    config = RunConfig(mesh=mesh, zero=zero, model=model, zero3_gather="microbatch")
    assert config.splits(MeshShape.parse(mesh)) == halves
