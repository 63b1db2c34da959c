"""Random config.json files of every family, over all fields that transformers reads."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from dtron.hf.weight_files import INDEX, SINGLE, Reader, write
from tests.helpers import hf_expert_fields as experts
from tests.helpers import hf_fields as fields
from tests.helpers import hf_recurrent_fields as recurrent
from tests.helpers.hf_models import causal, draw_weights

# By the class in transformers, the strategy of its fields.
FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Llama": fields.llama,
    "Mistral": fields.mistral,
    "Qwen2": fields.qwen2,
    "Qwen3": fields.qwen3,
    "GPT2": fields.gpt2,
    "Mixtral": fields.mixtral,
    "Qwen3Moe": fields.qwen3_moe,
    "GptOss": fields.gpt_oss,
    "DeepseekV2": fields.deepseek_v2,
    "DeepseekV3": fields.deepseek_v3,
    "DeepseekV32": experts.deepseek_v32,
    "Olmo2": fields.olmo2,
    "Olmo3": fields.olmo3,
    "Gemma2": fields.gemma2,
    "Gemma3Text": fields.gemma3,
    "Phi3": fields.phi3,
    "SmolLM3": fields.smollm3,
    "SeedOss": fields.seed_oss,
    "Granite": fields.granite,
    "Glm4Moe": experts.glm4_moe,
    "MiniMaxM2": experts.minimax_m2,
    "Llama4Text": experts.llama4,
    "Qwen3Next": recurrent.qwen3_next,
    "Qwen3_5Text": recurrent.qwen3_5,
    "Qwen3_5MoeText": recurrent.qwen3_5_moe,
    "OlmoHybrid": recurrent.olmo_hybrid,
    "NemotronH": recurrent.nemotron_h,
    "KimiLinear": recurrent.kimi_linear,
}


@st.composite
def configs(draw: Any, kind: str) -> dict[str, Any]:
    """A config.json of a family: some fields left out, RoPE under any of its keys."""
    out = FAMILIES[kind](draw)
    if kind in fields.LAYERED_ROPE and draw(st.booleans()):
        nested = {name: fields.rope(draw) for name in ("full_attention",)}
        nested |= draw(
            fields.optional(sliding_attention=st.builds(dict, rope_theta=fields.numbers(50, 1000)))
        )
        out["rope_parameters"] = nested
        out |= draw(fields.optional(rope_theta=fields.numbers(50, 1000)))
    elif kind != "GPT2":
        keys = draw(st.sampled_from(["", "rope_parameters", "rope_scaling", "both"]))
        out |= draw(fields.optional(rope_theta=fields.numbers(50, 1000)))
        for key in ("rope_parameters", "rope_scaling"):
            if keys in (key, "both"):
                out[key] = fields.rope(
                    draw, fields.PHI3_ROPE if kind == "Phi3" else fields.ROPE_TYPES
                )
        share = st.sampled_from([1.0, 0.5]) if kind in fields.PARTIAL else fields.rare(1.0, 0.5)
        out |= draw(fields.optional(partial_rotary_factor=share))
    return out


# Ways to save the same weights.
WAYS = ("plain", "stacked", "sharded", "stale index", "frequencies")
TIED_WAYS = ("head only", "head too", "another head")


@contextmanager
def saved(kind: str, config: dict[str, Any], way: str) -> Iterator[Path]:
    """The folder of a random model with this config.json, saved in one of ``WAYS``. Raises what
    transformers raises if it does not have such a model."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**copy.deepcopy(config))
    made = getattr(transformers, causal(kind))(settings)
    named = [(n, w) for n, w in made.named_parameters() if w.is_floating_point()]
    draw_weights(named + [(n, w) for n, w in made.named_buffers() if "correction" in n])
    at = Path(tempfile.mkdtemp(prefix="dtron-config-"))
    try:
        size = "20KB" if way == "sharded" else "1GB"
        made.save_pretrained(at, save_original_format=way != "stacked", max_shard_size=size)
        if way == "stale index":
            (at / INDEX).write_text(json.dumps({"weight_map": {"gone.weight": "gone.safetensors"}}))
        elif way in ("frequencies", *TIED_WAYS):
            _edit(at, way, "transformer.wte" if kind == "GPT2" else "model.embed_tokens")
        names = {"architectures": [causal(kind)], "model_type": settings.model_type}
        (at / "config.json").write_text(json.dumps(config | names))
        yield at
    finally:
        shutil.rmtree(at, ignore_errors=True)


def _edit(at: Path, way: str, embedding: str) -> None:
    reader = Reader(at)
    tensors = {name: reader.read(name) for name in reader.entries}
    name = embedding + ".weight"
    if way == "frequencies":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    elif way == "head only":
        tensors["lm_head.weight"] = tensors.pop(name)
    elif way == "head too":
        tensors["lm_head.weight"] = tensors[name].clone()
    else:
        tensors["lm_head.weight"] = tensors[name].flip(0)
    (at / SINGLE).unlink()
    write(at, {n: x.shape for n, x in tensors.items()}, torch.float32, tensors.__getitem__, 10**9)
