"""Folders under another model_type, and the text model of folders with images."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dtron.hf import Source
from dtron.hf.source_files import keep_origin
from dtron.hf.weight_files import Reader, write
from dtron.json_files import read_object
from dtron.runtime.export_run import export_run
from tests.helpers.hf_configs import saved
from tests.hf.test_families import as_run, logits
from tests.hf.test_family_cases import DELTA, LLAMA4
from tests.hf.test_random_configs import compare, config_of, rope, theirs, yarn

pytest.importorskip("transformers")


@pytest.mark.parametrize("names", [None, ["DeepseekV3ForCausalLM"]])
def test_kimi_k2_is_a_deepseek_v3(names):
    """transformers has no model_type kimi_k2. It reads the same folder as deepseek_v3. The ramp of
    this YaRN is between two neighbouring pairs."""
    ramp = {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}
    ramp["original_max_position_embeddings"] = 128
    config = config_of("DeepseekV3", rope_scaling=yarn(**ramp), n_group=1, topk_group=1)
    with saved("DeepseekV3", config, "plain") as at:
        assert compare(at) == "equal"
        m, bad = Source(at).model, Source(at, rope(beta_fast=32.0)(Source(at).model))
        assert (logits(bad, torch.float64) - theirs(at)).abs().max() > 1e-3
        own = config | {"model_type": "kimi_k2", "architectures": names, "auto_map": {"a": "b.C"}}
        (at / "config.json").write_text(json.dumps(own))
        assert Source(at).model == m and Source(at).family.kind == "deepseek_v3"


IN_CONTAINERS = {
    "qwen3.5": (
        "Qwen3_5Text",
        DELTA,
        "qwen3_5",
        r"^model\.",
        "model.language_model.",
        "model.visual.a",
    ),
    "qwen3.5, tied": (
        "Qwen3_5Text",
        DELTA | {"tie_word_embeddings": True},
        "qwen3_5",
        r"^model\.",
        "model.language_model.",
        "model.visual.a",
    ),
    "llama4": ("Llama4Text", LLAMA4, "llama4", "^", "language_model.", "vision_model.a"),
}


@pytest.mark.parametrize("name", IN_CONTAINERS)
def test_the_text_of_a_folder_with_images(name, tmp_path):
    """The weights and the entries of the text model have another place there. Where the outer
    entries contradict the inner, the inner ones count, as in transformers."""
    kind, changes, container, old, new, image = IN_CONTAINERS[name]
    config = config_of(kind, **changes)
    with saved(kind, config, "plain") as at:
        reader = Reader(at)
        tensors = {re.sub(old, new, name): reader.read(name) for name in reader.entries}
        tensors[image] = torch.zeros(3)
        shapes = {name: x.shape for name, x in tensors.items()}
        write(tmp_path, shapes, torch.float32, tensors.__getitem__, 10**9)
        outer = {
            "architectures": [f"{container}ForConditionalGeneration"],
            "model_type": container,
            "text_config": config | {"model_type": f"{container}_text"},
            "tie_word_embeddings": not config.get("tie_word_embeddings"),
        }
        (tmp_path / "config.json").write_text(json.dumps(outer))
        assert compare(tmp_path) == "equal"
        want = logits(Source(at))
    source, run = Source(tmp_path), tmp_path / "run"
    assert (logits(source) - want).abs().max() == 0
    run.mkdir()
    keep_origin(tmp_path, run)
    as_run(source, run)
    export_run(run, tmp_path / "out", dtype=torch.float32)
    entries = read_object(tmp_path / "out" / "config.json")
    assert entries["model_type"] == f"{container}_text" and "text_config" not in entries
    assert compare(tmp_path / "out") == "equal"
