"""The attention layer against a layer of transformers: sinks, biases and a sliding window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.layers.attention import Attention, AttentionInputs, attention
from dtron.layers.attention_mask import AttentionMask
from dtron.mesh import Layout

hf = pytest.importorskip("transformers")

ONE = Layout()


def test_attention_with_sinks():
    """gpt-oss's layer: sinks, biases, grouped queries and a sliding window."""
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").GptOssAttention(
        hf.GptOssConfig(
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention"],
            attn_implementation="eager",
        ),
        0,
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in theirs.parameters():
            w.copy_(torch.randn(w.shape, generator=g))
    w = dict(theirs.named_parameters())
    matrix = lambda x, n: w[f"{x}_proj.weight"].T.reshape(12, n, 8)
    ours = Attention(
        matrix("q", 4),
        None,
        matrix("k", 2),
        matrix("v", 2),
        w["o_proj.weight"].T.reshape(4, 8, 12),
        *(w[f"{x}_proj.bias"].reshape(-1, 8) for x in "qkv"),
        w["o_proj.bias"],
        w["sinks"],
        *[None] * 4,
    )
    x = torch.randn(2, 16, 12, generator=g)
    back = torch.arange(16)[:, None] - torch.arange(16)
    hidden = torch.where((back >= 0) & (back < 5), 0.0, -torch.inf)
    unturned = torch.ones(1, 16, 1), torch.zeros(1, 16, 1)
    want, _ = theirs(x, unturned, hidden)

    def run(p, window):
        return attention(
            p, x.flatten(0, 1), AttentionInputs(mask=AttentionMask(16, window)), ONE
        ).view(2, 16, 12)

    torch.testing.assert_close(run(ours, 5), want, rtol=1e-4, atol=1e-5)
    for wrong in (run(ours, 6), run(replace(ours, sinks=None), 5)):
        assert (wrong - want).abs().max() > 0.1
    names = [
        name for name in w if name != "k_proj.bias"
    ]  # a softmax is invariant to this bias: its gradient is noise
    slopes = [
        torch.autograd.grad(y.square().sum(), [w[n] for n in names]) for y in (run(ours, 5), want)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-2)
