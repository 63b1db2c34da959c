"""The keys of config.json: dtron's field of each key, and the value of a key that is left out.

A row of keys is ``dtron's field: Hugging Face's key``; ``a|b`` if the key has two names. A row of
defaults is ``Hugging Face's key: the value of a config.json without this key``. The defaults are
those of transformers' config classes. They differ between families: a head of qwen3 has 128 dims
if nothing is said, a head of llama ``hidden_size / num_attention_heads``. So a missing key never
takes dtron's own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# ---------------------------------------------------------------------------- keys

_SIZES = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "mlp": "intermediate_size",
    "tied": "tie_word_embeddings",
}
LLAMA_KEYS = _SIZES | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
MISTRAL_KEYS = LLAMA_KEYS | {"window": "sliding_window"}
_MOE = {"moe.top_k": "num_experts_per_tok", "moe.mlp": "moe_intermediate_size"}
QWEN3_MOE_KEYS = (
    LLAMA_KEYS
    | _MOE
    | {"moe.experts": "num_experts|num_local_experts", "moe.normalize": "norm_topk_prob"}
)
MIXTRAL_KEYS = MISTRAL_KEYS | {
    "moe.experts": "num_local_experts|num_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.mlp": "intermediate_size",
}
GPT_OSS_KEYS = {name: key for name, key in MIXTRAL_KEYS.items() if name != "window"}
GPT2_KEYS = {
    "vocab": "vocab_size",
    "embed": "n_embd|hidden_size",
    "layers": "n_layer|num_hidden_layers",
    "heads": "n_head|num_attention_heads",
    "context": "n_positions|max_position_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "mlp": "n_inner",
    "tied": "tie_word_embeddings",
}
DEEPSEEK_KEYS = {
    **_SIZES,
    **_MOE,
    "mla.kv_rank": "kv_lora_rank",
    "mla.q_rank": "q_lora_rank",
    "mla.nope_dim": "qk_nope_head_dim",
    "mla.rope_dim": "qk_rope_head_dim",
    "mla.v_dim": "v_head_dim",
    "moe.experts": "n_routed_experts|num_experts|num_local_experts",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.scale": "routed_scaling_factor",
    "moe.normalize": "norm_topk_prob",
    "moe.groups": "n_group",
    "moe.group_top_k": "topk_group",
}

# ---------------------------------------------------------------------------- defaults

Defaults = Mapping[str, Any]

# None: config.py computes the value. All heads have keys and values; a head has hidden_size /
# num_attention_heads dims; a feed-forward layer of GPT-2 has 4 * n_embd.
LLAMA: Defaults = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
MISTRAL: Defaults = {
    **LLAMA,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
QWEN2: Defaults = {
    **LLAMA,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN3: Defaults = {**QWEN2, "head_dim": 128}
QWEN3_MOE: Defaults = {
    **LLAMA,
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}
MIXTRAL: Defaults = {
    **MISTRAL,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1_000_000.0,
}
GPT_OSS: Defaults = {
    **LLAMA,
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "layer_types": None,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
GPT2: Defaults = {
    "vocab_size": 50_257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "tie_word_embeddings": True,
}
DEEPSEEK_V2: Defaults = {
    **LLAMA,
    "vocab_size": 102_400,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
}
DEEPSEEK_V3: Defaults = {
    **DEEPSEEK_V2,
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
}
