"""Tiny random models of every family, as Hugging Face transformers makes and saves them."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = _SIZES | {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
}
_LITE = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
_GEMMA = {"query_pre_attn_scalar": 9, "sliding_window": 7, "pad_token_id": 0}
_GROUPS = {"n_group": 4, "topk_group": 2}
_QWEN3_NEXT = _SIZES | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
    "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
}
_QWEN3_5 = {k: v for k, v in _QWEN3_NEXT.items() if "expert" not in k and "moe" not in k}
_NEMOTRON_H = {key: value for key, value in _SIZES.items() if key != "num_hidden_layers"} | {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 10,
    "n_groups": 2,
    "ssm_state_size": 6,
    "pad_token_id": None,
}
_KIMI_LINEAR = {
    key: value
    for key, value in _DEEPSEEK.items()
    if key not in ("rope_parameters", "n_routed_experts", "first_k_dense_replace")
} | {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    "q_lora_rank": None,
    "linear_num_heads": 2,
    "linear_head_dim": 10,
    "num_local_experts": 8,
    "pad_token_id": None,
}

# By name: the class in transformers, and its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES | {"rope_parameters": _LLAMA3}),
    "llama-tied": ("Llama", _SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", _SIZES | {"sliding_window": 7, "rope_parameters": _ROPE}),
    "qwen2": ("Qwen2", _SIZES | {"rope_parameters": _ROPE}),
    "qwen3": ("Qwen3", _SIZES | {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 61,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "n_inner": 96,
            "bos_token_id": None,
            "eos_token_id": None,
            "attn_implementation": "eager",
        },
    ),
    "mixtral": ("Mixtral", _SIZES | _EXPERTS | {"rope_parameters": _ROPE}),
    "qwen3-moe": (
        "Qwen3Moe",
        _SIZES
        | _EXPERTS
        | {"moe_intermediate_size": 32, "norm_topk_prob": True, "rope_parameters": _ROPE},
    ),
    "gpt-oss": (
        "GptOss",
        _SIZES | _EXPERTS | {"sliding_window": 7, "rope_parameters": _YARN | {"truncate": False}},
    ),
    "olmo2": ("Olmo2", _SIZES | {"rope_parameters": _ROPE}),
    "olmo3": (
        "Olmo3",
        _SIZES
        | {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": _YARN, "sliding_attention": _ROPE},
        },
    ),
    "gemma2": (
        "Gemma2",
        _SIZES
        | _GEMMA
        | {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0, "rope_parameters": _ROPE},
    ),
    "gemma3": (
        "Gemma3Text",
        _SIZES
        | _GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        _SIZES | {"pad_token_id": 0, "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "smollm3": ("SmolLM3", _SIZES | {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "seed-oss": ("SeedOss", _SIZES | {"rope_parameters": _ROPE}),
    "granite": (
        "Granite",
        _SIZES
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.7,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        },
    ),
    "glm4-moe": (
        "Glm4Moe",
        {key: value for key, value in _DEEPSEEK.items() if "lora" not in key}
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": _ROPE,
        },
    ),
    "minimax-m2": (
        "MiniMaxM2",
        _SIZES
        | _EXPERTS
        | {"rotary_dim": 6, "rope_theta": 500.0, "num_experts_per_tok": 3, "num_local_experts": 8},
    ),
    "llama4": (
        "Llama4Text",
        {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
        | _EXPERTS
        | {
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "moe_layers": [0, 2],
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attention_chunk_size": 7,
            "floor_scale": 5,
            "attn_scale": 0.3,
            "rope_parameters": _LLAMA3,
        },
    ),
    "qwen3-next": ("Qwen3Next", _QWEN3_NEXT),
    "qwen3.5": ("Qwen3_5Text", _QWEN3_5),
    "qwen3.5-moe": (
        "Qwen3_5MoeText",
        {key: value for key, value in _QWEN3_NEXT.items() if key != "intermediate_size"},
    ),
    "olmo-hybrid": (
        "OlmoHybrid",
        _SIZES
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 12,  # transformers saves channels in three equal parts
            "linear_value_head_dim": 6,
            "rope_theta": 500.0,
            "pad_token_id": None,
        },
    ),
    "nemotron-h": ("NemotronH", _NEMOTRON_H),
    "kimi-linear": ("KimiLinear", _KIMI_LINEAR),
    "deepseek-v2": ("DeepseekV2", _DEEPSEEK | _GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": ("DeepseekV2", _DEEPSEEK | _LITE),
    "deepseek-v3": ("DeepseekV3", _DEEPSEEK | _GROUPS),
    "deepseek-v32": (
        "DeepseekV32",
        _DEEPSEEK | _GROUPS | {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 7},
    ),
}


def causal(kind: str) -> str:
    """The name of the model's class, by the name of its config's class."""
    return kind.removesuffix("Text") + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM")


@cache
def model(name: str) -> torch.nn.Module:
    """Draw large weights, so that attention is far from uniform and experts differ. Norms are away
    from 1, biases away from 0."""
    import transformers

    kind, config = FAMILIES[name]
    config = copy.deepcopy(config)  # transformers changes RoPE in place
    made = getattr(transformers, causal(kind))(getattr(transformers, f"{kind}Config")(**config))
    named = {
        path: w
        for path, w in (*made.named_parameters(), *made.named_buffers())
        if not path.endswith(("inv_freq", "embed_scale")) and w.is_floating_point()
    }
    draw_weights(named.items())
    with torch.no_grad():
        for w in named.values():  # bfloat16 represents it, so the model is the same in both dtypes
            w.copy_(w.bfloat16())
    return made.eval()


def draw_weights(
    named: Iterable[tuple[str, torch.Tensor]], matrices: float = 0.2, vectors: float = 0.3
) -> torch.Generator:
    """Draw large weights, so that attention is far from uniform. Norms are away from 1, biases away
    from 0. Return the generator, for more numbers.

    ``matrices``, ``vectors``: the standard deviations."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in named:
            center = 1.0 if w.ndim == 1 and name.endswith("weight") else 0.0
            w.copy_(
                center + torch.randn(w.shape, generator=g) * (matrices if w.ndim > 1 else vectors)
            )
    return g


@cache
def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save the model, and return its folder. It is removed when Python ends."""
    out = Path(tempfile.mkdtemp(prefix="dtron-hf-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    copy.deepcopy(model(name)).to(dtype).save_pretrained(out)
    return out
