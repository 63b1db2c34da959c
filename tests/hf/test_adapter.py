"""Low-rank updates as PEFT adapter files, in and out: the logits of ``peft`` on transformers'
model."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtron import checkpoint
from dtron.checkpoint.safetensors import TensorReader, header
from dtron.checkpoint.safetensors_writer import write_file
from dtron.errors import UserError
from dtron.hf import Source
from dtron.hf.adapter import CONFIG, WEIGHTS, Adapter, places
from dtron.model.batch import make_batch
from dtron.model.lora import LoraConfig, can_update, is_update, with_lora
from dtron.model.transformer import declare_model, predict
from dtron.params import draw, normal, stored_dtype
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.runtime.export_run import export_adapter, export_run
from dtron.training.optimizer import init_state
from dtron.tree import fill, flat
from tests.helpers.hf_models import folder, model
from tests.helpers.values import ADAMW, ONE
from tests.helpers.wide_transformers import in_float64, module_of
from tests.hf.test_families import rows

peft = pytest.importorskip("peft")

# Layers by the end of their names. A family with two of a layer's weights in one matrix is missing.
LAYERS = {
    "llama": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
    "qwen3": "q_proj|v_proj|down_proj",
    "gemma3": "k_proj|o_proj|up_proj",
    "deepseek-v3": "q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj",
    "qwen3-moe": "q_proj|o_proj",
}


def theirs(made: torch.nn.Module) -> torch.Tensor:
    """The logits in float64."""
    made = copy.deepcopy(made).double()
    made.config._experts_implementation = "eager"  # the other has no float64
    with in_float64(module_of(made)), torch.no_grad():
        return made(input_ids=rows()[:, :-1], use_cache=False).logits.flatten(0, 1)


def ours(source: Source, config: LoraConfig, updates: Adapter | None) -> torch.Tensor:
    spec = with_lora(declare_model(source.model), config)

    def load(w):
        return (updates if is_update(w) else source).weight(w, ONE, torch.float64, "cpu")

    with torch.no_grad():
        return predict(fill(spec, load), make_batch(rows(), ONE), source.model, ONE)


@pytest.fixture
def trained(request, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A model with updates that have an effect, by ``peft``, and its adapter files."""
    torch.manual_seed(0)
    name, _, dora = request.param.partition(" ")
    layers = rf".*\.({LAYERS[name]})"
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=layers, use_dora=bool(dora), init_lora_weights=False
    )
    made = peft.get_peft_model(copy.deepcopy(model(name)), config)
    for path, w in made.named_parameters():
        if "magnitude" in path:
            w.data.mul_(torch.rand_like(w) + 0.5)
    made.save_pretrained(tmp_path / "adapter")
    return made, tmp_path / "adapter"


@pytest.mark.parametrize(
    "trained", [*LAYERS, "llama dora", "deepseek-v3 dora"], indirect=True, ids=str
)
def test_adapter_files_of_peft(trained, request):
    """The comparison notices updates without effect."""
    made, at = trained
    name = request.node.callspec.params["trained"].partition(" ")[0]
    source = Source(folder(name))
    updates = Adapter(at, source.family, source.model)
    assert (updates.config.rank, updates.config.scale) == (3, 5 / 3)
    want = theirs(made)
    assert (ours(source, updates.config, updates) - want).abs().max() <= 1e-4
    assert (theirs(model(name)) - want).abs().max() > 1e-2


def as_run(source: Source, config: LoraConfig, run_dir: Path) -> None:
    """A checkpoint of a run with updates that have an effect."""
    spec = with_lora((declare_model(source.model),), config)

    def load(w):
        if not is_update(w):
            return source.weight(w, ONE, stored_dtype(w, ONE, torch.float32), "cpu")
        x = draw(replace(w, init=normal), {"init_std": 0.1}, 0)
        return 1 + x if w.derived else x

    params = fill(spec, load)
    run = RunConfig(model=source.model, lora=config, init_from=str(source.folder))
    cli.save(run, run_dir / "config.json")
    state = checkpoint.TrainState(0, 0, params, init_state(ADAMW, spec, params))
    checkpoint.save(run_dir, state, spec, {})


@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in LAYERS), ("qwen3", True)])
def test_a_run_as_adapter_files_and_merged(name, dora, tmp_path):
    """Both give the logits of the run: with peft, and without it. The checkpoint has no frozen
    weight."""
    source = Source(folder(name))
    m = source.model
    able = [
        w for w in flat(declare_model(m)) if can_update(w) and places(w, source.family, m, dora)
    ]
    # Of a model with experts, peft takes gate_proj, up_proj and down_proj for the experts' alone.
    paths = [
        w.path for w in able if not m.moe.experts or re.search("attention|mla|experts", w.path)
    ]
    config = LoraConfig(rank=2, alpha=3, targets=",".join(paths), dora=dora)
    as_run(source, config, tmp_path)
    newest = checkpoint.newest(tmp_path)
    names = checkpoint.read_meta(newest).tensors
    assert all(re.search("lora_|magnitude|balance", n) for n in names)
    count = export_adapter(tmp_path, tmp_path / "adapter")
    names = [
        len(at.names) for w in able if w.path in paths for at in places(w, source.family, m, dora)
    ]
    assert count == sum(names)
    updates = Adapter(tmp_path / "adapter", source.family, m)
    assert {*updates.config.target_patterns} != set() and updates.config.scale == config.scale
    want = ours(source, updates.config, updates)
    made = peft.PeftModel.from_pretrained(copy.deepcopy(model(name)), tmp_path / "adapter")
    assert (theirs(made) - want).abs().max() <= 1e-4
    export_run(tmp_path, tmp_path / "merged", dtype=torch.float32)
    merged = Source(tmp_path / "merged")
    assert (ours(merged, LoraConfig(), None) - want).abs().max() <= 1e-4
    assert (ours(source, LoraConfig(), None) - want).abs().max() > 1e-2


def test_updates_of_experts_have_a_matrix_for_each_expert(tmp_path):
    source = Source(folder("qwen3-moe"))
    config = LoraConfig(rank=2, targets="moe.experts.*")
    as_run(source, config, tmp_path)
    export_adapter(tmp_path, tmp_path / "adapter")
    entries = header(tmp_path / "adapter" / WEIGHTS)
    assert "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_B.weight" in entries
    updates = Adapter(tmp_path / "adapter", source.family, source.model)
    assert updates.config == replace(
        config, targets=updates.config.targets, alpha=4.0, adapter=str(tmp_path / "adapter")
    )
    export_run(tmp_path, tmp_path / "merged", dtype=torch.float32)
    got = ours(Source(tmp_path / "merged"), LoraConfig(), None)
    assert (ours(source, updates.config, updates) - got).abs().max() <= 1e-4


def changed(at: Path, **entries) -> None:
    said = json.loads((at / CONFIG).read_text())
    (at / CONFIG).write_text(json.dumps(said | entries))


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "entries, message",
    [
        ({"peft_type": "IA3"}, "dtron has LORA alone"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 4}}, "one of each"),
        ({"r": 4}, "for this model and r=4 must be"),
        ({"r": "many"}, "must be numbers"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_refused(trained, entries, message):
    _, at = trained
    changed(at, **entries)
    source = Source(folder("llama"))
    with pytest.raises(UserError, match=message):
        Adapter(at, source.family, source.model)


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_rank_stabilised(trained):
    """arXiv:2312.03732: the factor is alpha / sqrt(rank)."""
    changed(trained[1], use_rslora=True)
    source = Source(folder("llama"))
    config = Adapter(trained[1], source.family, source.model).config
    assert math.isclose(config.scale, 5 / math.sqrt(3))


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_tensors_that_are_missing_or_too_many(trained):
    at, source = trained[1], Source(folder("llama"))
    reader = TensorReader(header(at / WEIGHTS))
    tensors = {name: reader.read(name) for name in reader.entries}
    first = next(iter(tensors))

    def write(kept):
        write_file(
            at / WEIGHTS, {n: (x.dtype, x.shape) for n, x in kept.items()}, kept.__getitem__, {}
        )

    write({name: x for name, x in tensors.items() if name != first})
    with pytest.raises(UserError, match=f"lacks {first}"):
        Adapter(at, source.family, source.model)
    write(tensors | {"base_model.model.lm_head.lora_A.weight": tensors[first]})
    with pytest.raises(UserError, match="is no update of this model"):
        Adapter(at, source.family, source.model)


def test_a_family_with_several_weights_in_a_matrix_is_refused(tmp_path):
    source = Source(folder("phi3"))
    as_run(source, LoraConfig(rank=2), tmp_path)
    with pytest.raises(UserError, match="in one matrix with other weights.*without --adapter"):
        export_adapter(tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    as_run(source, LoraConfig(rank=2, targets="mlp.w_down"), tmp_path)
    export_adapter(tmp_path, tmp_path / "adapter")
