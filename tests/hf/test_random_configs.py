"""A config.json means what transformers takes it to mean, or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from dtron.errors import UserError
from dtron.hf import Source
from dtron.hf.config import from_hf, to_hf
from dtron.hf.families import FAMILIES as TABLES
from dtron.layers.rope import RopeConfig
from dtron.model.config import ModelConfig
from tests.helpers.examples import examples
from tests.helpers.hf_configs import FAMILIES, TIED_WAYS, WAYS, configs, saved
from tests.helpers.hf_models import causal
from tests.helpers.wide_transformers import in_float64, module_of
from tests.hf.test_families import logits, rows

hf = pytest.importorskip("transformers")
StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

# What transformers raises for a config.json that it cannot compute.
CANNOT = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    StrictDataclassError,
)


def theirs(at: Path) -> torch.Tensor | None:
    """The logits of transformers, from this folder alone; None if transformers lacks weights for
    it or cannot compute it."""
    try:
        made, report = hf.AutoModelForCausalLM.from_pretrained(
            at,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            return None
        with torch.no_grad(), in_float64(module_of(made)):
            return made.eval()(input_ids=rows()[:, :-1], use_cache=False).logits.flatten(0, 1)
    except CANNOT:
        return None


def compare(at: Path) -> str:
    """Return whether dtron computes the logits of transformers or refuses the folder."""
    want = theirs(at)
    try:
        source = Source(at)
    except UserError as error:
        assert "\n" not in str(error) and str(at) in str(error)
        return "refused"
    if want is None:
        return "read, and not by transformers"
    assert (logits(source, torch.float64) - want).abs().max() <= 1e-4
    return "equal"


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=examples(10, thorough=200))
@given(data=st.data())
def test_random(kind, data):
    config = data.draw(configs(kind))
    ways = [*WAYS, *TIED_WAYS] if config.get("tie_word_embeddings", kind == "GPT2") else WAYS
    with ExitStack() as stack:
        try:
            folder = saved(kind, config, data.draw(st.sampled_from(ways)))
            at = stack.enter_context(folder)
        except CANNOT:
            assume(False)
        outcome = compare(at)
    event(outcome)
    assert outcome != "read, and not by transformers"


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A small config of a family with these changes; ``drop`` leaves a key out."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= experts if kind in ("Mixtral", "GptOss") else {}
    if kind.startswith("Deepseek"):
        sizes = DEEPSEEK
    return {key: value for key, value in (sizes | changes).items() if value != "drop"}


DEEPSEEK = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **more}


WIDE = {"factor": 2.0, "original_max_position_embeddings": 128, "beta_slow": 0.5}


def rope(**fields: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda m: replace(m, rope=replace(m.rope, **fields))


def fields(**values: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda m: replace(m, **values)


# By name: the class in transformers, its config.json, how it is saved, and a wrong reading of it.
CASES = {
    "rope_scaling counts, not rope_parameters": (
        "Llama",
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": yarn()},
        "plain",
        rope(scaling="none"),
    ),
    "mscale alone": ("Llama", {"rope_scaling": yarn(mscale=2.0)}, "plain", rope(mscale=2.0)),
    "mscale_all_dim alone": (
        "DeepseekV3",
        {"rope_scaling": yarn(mscale_all_dim=1.0)},
        "plain",
        rope(attention_factor=0.0),
    ),
    "mscale_all_dim is no temperature of llama": (
        "Llama",
        {"rope_scaling": yarn(mscale=0.5, mscale_all_dim=1.0)},
        "plain",
        rope(attention_factor=0.0, mscale=0.5, mscale_all=1.0),
    ),
    "a factor of its own": (
        "Qwen3",
        {"rope_scaling": yarn(attention_factor=1.5)},
        "plain",
        rope(attention_factor=0.0),
    ),
    "a mixtral's theta": ("Mixtral", {}, "plain", rope(theta=1e4)),
    "a gpt-oss's theta and yarn": ("GptOss", {}, "plain", rope(theta=1e4, scaling="none")),
    "a gpt-oss's yarn without its theta": (
        "GptOss",
        {"rope_scaling": yarn(truncate=False)},
        "plain",
        rope(theta=1e4),
    ),
    "a mistral's heads": (
        "Mistral",
        {"num_attention_heads": 8, "num_key_value_heads": "drop", "head_dim": "drop"},
        "plain",
        None,
    ),
    "a qwen3's head": ("Qwen3", {"num_attention_heads": 2, "head_dim": "drop"}, "plain", None),
    "the norms of latents": (
        "DeepseekV2",
        {"rms_norm_eps": 1e-2},
        "plain",
        lambda m: replace(m, mla=replace(m.mla, norm_eps=1e-2)),
    ),
    "windows in some layers": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "plain",
        fields(window=None),
    ),
    "max_window_layers": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        "plain",
        fields(window=None),
    ),
    "truncate is not read in the RoPE of some layers": (
        "Gemma3Text",
        {
            "sliding_window_pattern": 2,
            "rope_parameters": {"full_attention": yarn(**WIDE, truncate=False)},
        },
        "plain",
        rope(truncate=False),
    ),
    "another head": ("Llama", {"tie_word_embeddings": True}, "another head", fields(tied=True)),
    "the head only": ("Qwen3", {"tie_word_embeddings": True}, "head only", None),
    "the head twice": ("Qwen3", {"tie_word_embeddings": True}, "head too", None),
    "a stale index": ("Llama", {}, "stale index", None),
    **{
        f"stacked experts of {kind}": (kind, {}, "stacked", None)
        for kind in ("Mixtral", "Qwen3Moe", "DeepseekV2", "DeepseekV3")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_case(name):
    """The comparison notices a wrong reading."""
    kind, changes, way, wrong = CASES[name]
    if kind == "Qwen3Moe":
        changes = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    with saved(kind, config_of(kind, **changes), way) as at:
        assert compare(at) == "equal"
        if wrong is not None:
            want, source = theirs(at), Source(at)
            bad = Source(at, wrong(source.model))
            assert (logits(bad, torch.float64) - want).abs().max() > 1e-3


@pytest.mark.parametrize("table", TABLES, ids=[table.kind for table in TABLES])
def test_defaults_are_theirs(table):
    """A missing key has the value that transformers' class gives it."""
    kind = next(kind for kind in FAMILIES if causal(kind) == table.architecture)
    made = getattr(hf, f"{kind}Config")
    known = {f.name: f.default for f in dataclasses.fields(made)}
    if kind != "GPT2":
        theta = made.default_theta
        known["rope_theta"] = theta["global"] if isinstance(theta, dict) else theta
    if kind == "GptOss":
        known["rope_parameters"] = {
            key: value for key, value in made().rope_parameters.items() if key != "rope_theta"
        }
    keys = {theirs.split("|")[0] for theirs in table.keys.values()}
    assert keys <= set(table.defaults)
    for key, value in (table.defaults | table.demands).items():
        if key in known:
            assert known[key] == value or (not known[key] and not value), key


@pytest.mark.parametrize("kind", ["Llama", "DeepseekV3"])
@given(data=st.data())
def test_what_is_written_is_read_again(kind, data):
    """Every RoPE of RopeConfig that a family can express comes back as the same function."""
    number = st.sampled_from([0.0, 0.5, 1.0, 1.5])
    made = RopeConfig(
        100.0,
        "yarn",
        4.0,
        16,
        mscale=data.draw(number),
        mscale_all=data.draw(number) if kind == "DeepseekV3" else 0.0,
        attention_factor=data.draw(number),
        truncate=data.draw(st.booleans()),
    )
    table = next(table for table in TABLES if table.architecture.startswith(kind))
    m = replace(from_hf(config_of(kind), table), rope=made)
    again = from_hf(to_hf(m, table), table).rope
    assert again.attention_scaling == pytest.approx(made.attention_scaling)
    assert again.temperature == pytest.approx(made.temperature)
    assert again.truncate == made.truncate
