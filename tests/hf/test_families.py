"""Every family: the logits and the text of Hugging Face transformers, and back to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtron import checkpoint
from dtron.generation.sampling import Sampling
from dtron.hf import Source
from dtron.hf.config import best_family, from_hf, to_hf
from dtron.hf.families import FAMILIES as TABLES
from dtron.hf.weight_files import INDEX, Reader
from dtron.json_files import read_object
from dtron.model.batch import make_batch
from dtron.model.flops import parameter_count
from dtron.model.presets import PRESETS
from dtron.model.transformer import declare_model, predict
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.runtime.export_run import export_run
from dtron.runtime.generation import generate
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage
from tests.helpers.hf_models import FAMILIES, folder, model
from tests.helpers.values import ADAMW, ONE
from tests.helpers.wide_transformers import in_float64, module_of

hf = pytest.importorskip("transformers")


def rows() -> torch.Tensor:
    return torch.randint(61, (3, 41), generator=torch.Generator().manual_seed(1))


def logits(source: Source, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    params = source.load(declare_model(source.model), ONE, dtype)
    with torch.no_grad():
        return predict(params, make_batch(rows(), ONE), source.model, ONE)


def wide(made: torch.nn.Module) -> torch.Tensor:
    """The logits in float64."""
    made = copy.deepcopy(made).double()
    made.config._experts_implementation = "eager"  # the other has no float64
    with in_float64(module_of(made)):
        return theirs(made)


def theirs(made: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return made(input_ids=rows()[:, :-1], use_cache=False).logits.flatten(0, 1)


# Per family: two rows of its table that have the same shape, to be exchanged.
SWAPPED = {
    "gpt2": ("attention.w_k", "attention.w_v"),
    "nemotron-h": ("mamba.w_b", "mamba.w_c"),
    "mixtral": ("moe.experts.w_gate", "moe.experts.w_up"),
}
SWAPPED |= dict.fromkeys(
    ("qwen3-moe", "gpt-oss", "minimax-m2", "qwen3-next", "qwen3.5-moe", "llama4", "kimi-linear"),
    SWAPPED["mixtral"],
)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name):
    """The comparison notices a table with two exchanged rows."""
    source, want = Source(folder(name)), wide(model(name))
    assert (logits(source, torch.float64) - want).abs().max() <= 1e-4
    assert source.bytes_read == sum(e.stop - e.start for e in source.reader.entries.values())
    a, b = (f"blocks.{{l}}.{path}" for path in SWAPPED.get(name, ("mlp.w_gate", "mlp.w_up")))
    table = source.family.weights
    source.family = replace(source.family, weights={**table, a: table[b], b: table[a]})
    assert (logits(source) - want).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted(name):
    """The bias that balances experts is no parameter there, but a buffer."""
    m, made = replace(Source(folder(name)).model, vocab_multiple=1), model(name)
    biases = (b for path, b in made.named_buffers() if path.endswith("e_score_correction_bias"))
    assert parameter_count(m) == sum(w.numel() for w in (*made.parameters(), *biases))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("deepseek")])
def test_rotary_columns_are_in_another_order_there(name):
    source, want = Source(folder(name)), theirs(model(name))
    unpaired = {path: row._replace(paired=False) for path, row in source.family.weights.items()}
    source.family = replace(source.family, weights=unpaired)
    assert (logits(source) - want).abs().max() > 1e-2


def as_run(source: Source, run_dir: Path) -> None:
    """The checkpoint that a run from this folder has before its first step."""
    spec = (declare_model(source.model),)
    params = source.load(spec, ONE)
    cli.save(RunConfig(model=source.model), run_dir / "config.json")
    checkpoint.save(
        run_dir, checkpoint.TrainState(0, 0, params, init_state(ADAMW, spec, params)), spec, {}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name, tmp_path):
    """From bfloat16 to float32 masters and back: the same names, shapes, dtypes and bytes.
    transformers computes the same model."""
    source = Source(folder(name, torch.bfloat16))
    as_run(source, tmp_path)
    out, family = tmp_path / "out", source.family.kind
    done = export_run(tmp_path, out, dtype=torch.bfloat16, family=family, largest=30_000)
    assert len(done.files) > 1 and (out / INDEX).is_file()
    before, after = Reader(source.folder), Reader(out)
    assert before.entries.keys() == after.entries.keys()
    for key in before.entries:
        a, b = before.read(key), after.read(key)
        assert a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16)), key
    assert Source(out).model == source.model
    again = hf.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    assert torch.equal(theirs(again), theirs(model(name)))


def test_their_library_reads_what_is_written_and_the_reverse(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    source = Source(folder("llama"))
    as_run(source, tmp_path)
    export_run(tmp_path, tmp_path / "out", dtype=torch.float32)
    ours = library.load_file(tmp_path / "out" / "model.safetensors")
    want = library.load_file(source.folder / "model.safetensors")
    assert ours.keys() == want.keys() and all(torch.equal(ours[key], want[key]) for key in want)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text(name):
    """32 tokens after prompts of unequal lengths are the tokens that transformers generates for
    each prompt alone."""
    source, g = Source(folder(name)), torch.Generator().manual_seed(3)
    prompts = [torch.randint(61, (n,), generator=g).tolist() for n in (11, 4)]
    params = (source.load(declare_model(source.model), ONE),)
    pipe = one_stage(source.model, 1, ONE)
    got = generate(params, prompts, 32, source.model, pipe, Sampling(temperature=0))
    for prompt, ids in zip(prompts, got, strict=True):
        want = model(name).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        )
        assert ids == want[0].tolist()


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"bench-1.3b-hybrid"}))  # of no family
def test_every_preset_has_a_family_and_comes_back(name):
    m = PRESETS[name]
    family = best_family(m)
    said = to_hf(m, family)
    assert to_hf(from_hf(said, family), family) == said


def test_a_model_that_no_family_has():
    with pytest.raises(ValueError, match="softcap=30.0") as error:
        best_family(replace(PRESETS["tiny"], softcap=30.0))
    assert "\n" not in str(error.value)


def test_config_json_is_theirs():
    """Every field of transformers' own config that both configs have."""
    for name in FAMILIES:
        said = read_object(folder(name) / "config.json")
        family = next(f for f in TABLES if f.kind == said["model_type"])
        made = getattr(hf, type(model(name).config).__name__)(
            **to_hf(from_hf(said, family), family)
        )
        there = model(name).config.to_dict()
        unsaid = {
            "dtype",
            "architectures",
            "_name_or_path",
            "transformers_version",
            "initializer_range",
        }
        unsaid |= {"bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef"}
        unsaid |= {"use_bidirectional_attention"}  # null is false
        wrong = {
            key: (value, there[key])
            for key, value in made.to_dict().items()
            if key in there and key not in unsaid and value != there[key]
        }
        assert not wrong, (name, wrong)
