"""The logits and the training of Hugging Face transformers, from random weights mapped by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.layers.rope import RopeConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import Transformer, declare_model, predict
from dtron.params import WeightSpec
from dtron.runtime.config import ModelConfig, OptimConfig
from dtron.training.grad_norm import clip_scale, global_norm
from dtron.training.gradients import gradients
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import tree_map
from tests.helpers.hf_models import draw_weights

hf = pytest.importorskip("transformers")

ONE = Layout()
LLAMA = ModelConfig(
    vocab=61,
    embed=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=96,
    context=128,
    vocab_multiple=8,
)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "beta_slow": 1.0, "beta_fast": 2.0}


def transformers_model(kind: str, m: ModelConfig, scaling: dict[str, Any]) -> torch.nn.Module:
    """Draw large weights, so that attention is far from uniform. Norms are away from 1, biases away
    from 0."""
    if kind == "GPT2":
        config = hf.GPT2Config(
            vocab_size=m.vocab,
            n_embd=m.embed,
            n_layer=m.layers,
            n_head=m.heads,
            n_positions=m.context,
            n_inner=m.mlp,
            activation_function="gelu_new",
            layer_norm_epsilon=m.norm_eps,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
        model = hf.GPT2LMHeadModel(config)
    else:
        if scaling:
            scaling = scaling | {
                "factor": m.rope.factor,
                "original_max_position_embeddings": m.rope.original,
            }
        config = getattr(hf, f"{kind}Config")(
            vocab_size=m.vocab,
            hidden_size=m.embed,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.head_dim,
            intermediate_size=m.mlp,
            max_position_embeddings=m.context,
            rms_norm_eps=m.norm_eps,
            tie_word_embeddings=m.tied,
            rope_theta=m.rope.theta,
            rope_scaling=scaling or None,
            attn_implementation="eager",
            **({"sliding_window": m.window} if m.window else {}),
        )
        model = getattr(hf, f"{kind}ForCausalLM")(config)
    draw_weights(model.named_parameters())
    return model.eval()


LLAMA_NAMES = {
    "embedding.w_tokens": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "w_head": "lm_head.weight",
    "norm_1.scale": "input_layernorm.weight",
    "norm_2.scale": "post_attention_layernorm.weight",
    **{f"attention.w_{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attention.b_{x}": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attention.{x}_norm.scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"mlp.w_{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
GPT2_NAMES = {
    "embedding.w_tokens": "transformer.wte.weight",
    "embedding.w_positions": "transformer.wpe.weight",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    **{f"norm_{i}.scale": f"ln_{i}.weight" for i in (1, 2)},
    **{f"norm_{i}.bias": f"ln_{i}.bias" for i in (1, 2)},
    **{f"attention.w_{x}": "attn.c_attn.weight" for x in "qkv"},
    **{f"attention.b_{x}": "attn.c_attn.bias" for x in "qkv"},
    "attention.w_o": "attn.c_proj.weight",
    "attention.b_o": "attn.c_proj.bias",
    **{f"mlp.{x}_up": f"mlp.c_fc.{y}" for x, y in (("w", "weight"), ("b", "bias"))},
    **{f"mlp.{x}_down": f"mlp.c_proj.{y}" for x, y in (("w", "weight"), ("b", "bias"))},
}


def mapped(model: torch.nn.Module, m: ModelConfig) -> Transformer:
    """The same weights as a dtron tree.

    Llama's matrices are [out, in]. GPT-2's are [in, out], with queries, keys and values
    concatenated. Rows of the padded vocabulary are ones: they must not count."""
    theirs, is_gpt2 = dict(model.named_parameters()), isinstance(model, hf.GPT2LMHeadModel)
    used = set()

    def convert(w: WeightSpec) -> Tensor:
        block, name = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", w.path).groups()
        prefix = f"{'transformer.h' if is_gpt2 else 'model.layers'}.{block}." if block else ""
        source = prefix + (GPT2_NAMES if is_gpt2 else LLAMA_NAMES)[name]
        used.add(source)
        x = theirs[source].detach()
        if w.axes[0] == "vocab":
            x = F.pad(x, (0, 0, 0, w.shape[0] - len(x)), value=1.0)
        elif "c_attn" in source:
            x = x.chunk(3, dim=-1)["qkv".index(name[-1])]
        elif not is_gpt2 and x.ndim == 2:
            x = x.T
        return x.reshape(w.shape).clone(
            memory_format=torch.contiguous_format
        )  # a copy, because it is updated

    params = tree_map(convert, declare_model(m))
    assert used == set(theirs)
    return params


def random_rows(seed: int, rows: int = 4, seq_len: int = 48) -> Tensor:
    return torch.randint(61, (rows, seq_len + 1), generator=torch.Generator().manual_seed(seed))


def differ(model: torch.nn.Module, m: ModelConfig) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    rows = random_rows(1)
    with torch.no_grad():
        want = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
        got = predict(mapped(model, m), make_batch(rows, ONE), m, ONE)
    assert got.dtype == want.dtype == torch.float32 and got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


ROPE_LLAMA3, ROPE_YARN = (
    RopeConfig(100.0, "llama3", 4.0, 32),
    RopeConfig(100.0, "yarn", 4.0, 32, beta_fast=2.0),
)
GPT2 = ModelConfig(
    vocab=61,
    embed=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp=96,
    context=64,
    vocab_multiple=8,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    qkv_bias=True,
    bias=True,
    tied=True,
)

# dtron's config, its class in transformers, and a change that is wrong in the subject of the case.
CASES = {
    "llama": (LLAMA, "Llama", {}, {"rope": RopeConfig(9000.0)}),
    "llama-tied": (replace(LLAMA, tied=True, kv_heads=1), "Llama", {}, {"norm_eps": 0.1}),
    "llama3": (replace(LLAMA, rope=ROPE_LLAMA3), "Llama", LLAMA3, {"rope": RopeConfig(100.0)}),
    "yarn": (
        replace(LLAMA, rope=ROPE_YARN),
        "Llama",
        YARN,
        {"rope": replace(ROPE_YARN, beta_fast=4.0)},
    ),
    "qwen2": (
        replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
        "Qwen2",
        {},
        {"rope": RopeConfig(9000.0)},
    ),
    "qwen3": (replace(LLAMA, qk_norm=True), "Qwen3", {}, {"norm_eps": 0.1}),
    "gpt2": (GPT2, "GPT2", {}, {"norm_eps": 0.1}),
    "mistral": (replace(LLAMA, window=7), "Mistral", {}, {"window": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    """The comparison notices a slightly wrong config."""
    m, kind, scaling, wrong = CASES[name]
    model = transformers_model(kind, m, scaling)
    assert differ(model, m) <= 1e-5
    assert differ(model, replace(m, **wrong)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_training(name):
    """Five AdamW steps with clipping have the same losses, and the losses fall. dtron takes two
    microbatches a step."""
    m, kind, scaling, _ = CASES[name]
    model = transformers_model(kind, m, scaling)
    config = OptimConfig(
        lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    spec, params, rows = declare_model(m), mapped(model, m), random_rows(2)
    rows[0, -9:] = IGNORE
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    tokens = int((targets != IGNORE).sum())

    matrices, norms = (
        [w for w in model.parameters() if (w.ndim > 1) == is_matrix] for is_matrix in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
    )
    optimizer = build_optimizer(config)
    state, got, want = init_state(optimizer, spec, params), [], []
    for _ in range(5):
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        assert norm > config.max_grad_norm  # clipping is at work
        theirs.step()
        want.append(loss.item())

        batches = [make_batch(half, ONE) for half in rows.chunk(2)]
        pipe = one_stage(m, len(batches), ONE)
        loss, (grads,), _ = gradients(program(m, ONE), (params,), batches, tokens, pipe, zero=1)
        ours = global_norm(grads) / tokens
        assert ours.item() == pytest.approx(norm.item(), rel=1e-3)
        scale = clip_scale(ours, config.max_grad_norm) / tokens
        scalars = UpdateScalars(config.lr, scale)
        params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
        got.append(loss.item())
    assert got == pytest.approx(want, rel=1e-4)
    assert all(b < a for a, b in pairwise(got)) and got[-1] < 0.9 * got[0]
