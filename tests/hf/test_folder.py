"""Folders of other programs: what is refused in one line, and what returns unchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from dtron import checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.hf import Source, keep_origin
from dtron.hf.__main__ import main as hf_main
from dtron.hf.config import read_config
from dtron.hf.weight_files import INDEX, SINGLE, Reader, write
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.presets import PRESETS
from dtron.model.transformer import declare_model, predict
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime import cli
from dtron.runtime.cli import parse
from dtron.runtime.config import RunConfig
from dtron.runtime.export_run import export_run
from dtron.training.optimizer import init_state
from dtron.tree import flat
from tests.helpers.hf_models import FAMILIES, folder
from tests.helpers.texts import one_line
from tests.helpers.values import ADAMW, ONE
from tests.hf.test_families import as_run, logits, rows


@pytest.fixture
def copy(tmp_path):
    def make(name: str = "llama") -> Path:
        return Path(shutil.copytree(folder(name), tmp_path / name, dirs_exist_ok=True))

    return make


def change(at: Path, file: str = "config.json", **values) -> Path:
    said = json.loads((at / file).read_text()) | values
    (at / file).write_text(
        json.dumps({key: value for key, value in said.items() if value != "drop"})
    )
    return at


def rewrite(at: Path, edit) -> Path:
    """Save the weights again, after ``edit`` of their dictionary."""
    reader = Reader(at)
    tensors = {name: reader.read(name) for name in reader.entries}
    edit(tensors)
    write(at, {n: x.shape for n, x in tensors.items()}, torch.float32, tensors.__getitem__, 10**9)
    return at


def test_another_config_is_refused(copy, tmp_path):
    refused = lambda at, *said: one_line(lambda: Source(at), *said)
    refused(tmp_path / "nothing", "is no folder")
    refused(tmp_path, "config.json")
    at = copy()
    refused(change(at, architectures=["BertForMaskedLM"]), "BertForMaskedLM", "llama")
    refused(
        change(at, architectures=["LlamaForCausalLM"], hidden_act="relu"),
        "hidden_act",
        "'relu'",
        "'silu'",
    )
    refused(change(at, hidden_act="silu", hidden_size="drop"), "lacks hidden_size (4096")
    refused(change(at, hidden_size=64, quantization_config={"quant_method": "awq"}), "awq", "fp8")
    refused(change(at, quantization_config="drop", hidden_size="64"), "type")
    refused(change(at, hidden_size=64, rope_parameters={"rope_type": "longrope"}), "longrope")
    for key in ("quantization_config", "rope_parameters", "rope_scaling"):
        refused(change(copy(), **{"rope_parameters": "drop", key: "x"}), f"{key} is 'x'", "object")
    refused(change(copy(), architectures="x"), "architectures is 'x'", "list")
    refused(change(copy(), model_type="llama4", text_config="x"), "text_config is 'x'", "object")
    (at / "config.json").write_text("{")
    refused(at, "JSON")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_is_read_or_refused_whatever_is_in_it(name, tmp_path):
    """Any value in the place of any other."""
    good = json.loads((folder(name) / "config.json").read_text())
    for key, value in product(
        good, ["x", None, -1, 0, 0.5, True, [], {}, 1 << 70, 10**30, {"rope_type": 3}]
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | {key: value}))
        try:
            _, m = read_config(tmp_path)
            assert abs(m.norm_eps) < 1 << 63
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 600


def test_other_weights_are_refused(copy):
    refused = lambda at, *said: one_line(lambda: Source(at), *said)
    at, name = copy(), "model.layers.1.mlp.up_proj.weight"
    original = (at / SINGLE).read_bytes()

    def wider(tensors):
        tensors[name] = torch.zeros(97, 64)

    refused(rewrite(at, wider), name, "[97, 64]", "[96, 64]")
    (at / SINGLE).write_bytes(original)
    refused(rewrite(at, lambda tensors: tensors.pop(name)), "lacks " + name)
    (at / SINGLE).write_bytes(original)
    refused(rewrite(at, lambda tensors: tensors.update(more=torch.zeros(2))), "has more")
    (at / SINGLE).write_bytes(original)
    Source(at)


def test_damaged_files_are_refused(copy):
    refused = lambda at, *said: one_line(lambda: Source(at), *said)
    at = copy()
    original = (at / SINGLE).read_bytes()
    for cut_at in (4, 100, len(original) - 1):
        (at / SINGLE).write_bytes(original[:cut_at])
        refused(at, SINGLE, "cut short")
    for garbage in (b"\xff" * 64, b"\x80\x02}q\x00." * 20, (2).to_bytes(8, "little") + b"[]"):
        (at / SINGLE).write_bytes(garbage)
        refused(at, SINGLE)
    (at / SINGLE).unlink()
    refused(at, "no " + SINGLE)
    (at / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(at, "pytorch_model.bin", "pickle", "any code")
    for name in ("../away.safetensors", "not-there.safetensors"):
        (at / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(at, INDEX if ".." in name else name)


def test_a_quantised_tensor_is_refused(copy):
    at = copy()
    raw = (at / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["lm_head.weight"]["dtype"] = "I32"
    text = json.dumps(header).encode()
    (at / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    source = Source(at)
    one_line(lambda: source.load(declare_model(source.model), ONE), "lm_head.weight", "I32")


def test_flags_beside_init_from(copy):
    at = copy()
    one_line(lambda: parse(["--init-from", str(at)]), "tokenizer.json", "--data.tokenizer")
    (at / "tokenizer.json").write_text("{}")
    config = parse(["--init-from", str(at), "--model.z-loss", "0.001", "--model.context", "64"])
    assert config.data.tokenizer == str(at / "tokenizer.json")
    assert config.model == replace(Source(at).model, z_loss=0.001, context=64)
    assert parse(["--init-from", str(at), "--data.tokenizer", "mine"]).data.tokenizer == "mine"
    one_line(
        lambda: parse(["--init-from", str(at), "--model", "tiny"]), "--model tiny", "drop --model"
    )
    one_line(
        lambda: parse(["--init-from", str(at), "--model.embed", "32"]), "--model.embed 32", "64"
    )
    one_line(
        lambda: parse(["--init-from", str(at), "--model.moe.experts", "4"]), "--model.moe.experts 4"
    )
    one_line(lambda: parse(["--init-from", str(at / "no")]), "is no folder")


def test_what_is_not_exported(copy, tmp_path):
    refused = lambda argv, *said: one_line(lambda: hf_main(argv), *said)
    out, run_dir = tmp_path / "out", tmp_path / "run"
    refused(["export", str(tmp_path), str(out)], "no run directory")
    run_dir.mkdir()
    shutil.copy(copy() / "config.json", run_dir / "config.json")
    refused(["export", str(run_dir), str(out)], "no config of a run")
    as_run(Source(folder("llama")), run_dir)
    refused(["export", str(run_dir), str(out), "--family", "bert"], "bert", "llama")
    refused(["export", str(run_dir), str(out), "--family", "qwen3"], "qk_norm")
    refused(["export", str(run_dir), str(out), "--shard-size", "5XB"], "shard-size")
    out.mkdir()
    (out / "precious").write_text("")
    refused(["export", str(run_dir), str(out)], "not empty")
    assert [file.name for file in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    assert hf_main(["export", str(run_dir), str(out), "--dtype", "float32"]) == 0


def test_what_training_does_not_change_comes_back(copy, tmp_path):
    """The tokenizer's files return unchanged, and the fields of config.json that dtron does not
    use."""
    at = change(copy("mistral"), bos_token_id=7, sliding_window=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (at / name).write_text('{"as": "it was"}')
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    as_run(Source(at), run_dir)
    keep_origin(at, run_dir)
    export_run(run_dir, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["bos_token_id"] == 7 and said["dtype"] == "float32"
    assert said["architectures"] == [
        "MistralForCausalLM"
    ]  # and no llama, although the weights would fit
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"as": "it was"}'


def test_modules_of_multi_token_prediction(tmp_path):
    """MTP modules are blocks after the last block in the folder. Without the flag they are left
    out."""
    m = replace(
        PRESETS["tiny-deepseek"],
        vocab=300,
        embed=32,
        mtp=replace(PRESETS["tiny-deepseek"].mtp, depth=2),
    )
    spec = (declare_model(m),)
    params = init(spec, m.dims(), 0, ONE)
    cli.save(RunConfig(model=m), tmp_path / "config.json")
    checkpoint.save(
        tmp_path, checkpoint.TrainState(0, 0, params, init_state(ADAMW, spec, params)), spec, {}
    )
    export_run(tmp_path, tmp_path / "out", dtype=torch.float32)
    assert "model.layers.4.eh_proj.weight" in Reader(tmp_path / "out").entries
    plain = Source(tmp_path / "out")
    assert plain.model.mtp.depth == 0 and len(flat(declare_model(plain.model))) < len(flat(spec))
    again = Source(tmp_path / "out", replace(plain.model, mtp=m.mtp))
    got = flat(again.load(declare_model(again.model), ONE))
    rows = [
        (a[:300], b[:300]) if len(a) == m.padded_vocab else (a, b)
        for a, b in zip(got, flat(params), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in rows)


def test_what_is_missing_is_named(copy, tmp_path):
    """Which files and tensors there are, and which there are not."""
    at = copy()
    library = pytest.importorskip("safetensors.torch")
    tensors = library.load_file(at / SINGLE)
    (at / SINGLE).unlink()
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        library.save_file({n: tensors[n] for n in part}, at / file)
        where |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": where})
    (at / INDEX).write_text(index)
    assert set(Source(at).reader.entries) == set(names)
    second = at / "model-00002-of-00002.safetensors"
    second.rename(at / "later")
    one_line(lambda: Source(at), "names 2 files", second.name, "is missing", "there is model-00001")
    (at / "later").rename(second)
    (at / INDEX).write_text(json.dumps({"weight_map": {n: where[n] for n in names[:5]}}))
    one_line(lambda: Source(at), "lacks", "it has 5 of the 21 tensors", "in 1 file")
    (at / INDEX).write_text(index)
    library.save_file({n: tensors[n] for n in names[4:]}, second)
    one_line(lambda: Source(at), f"{names[4]} is in model-00001", "and in model-00002")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_vocabulary_grows(copy, name):
    """New rows are the mean of the old rows, in embedding and head, on any mesh. Old words keep
    their logits. Rows of the padding stay zero."""
    at = copy(name)
    old = Source(at)
    m = replace(old.model, vocab=130, vocab_multiple=16)
    grown = Source(at, m)
    assert "grows by 69, from 61 to 130" in grown.notes[-1] and not old.notes
    spec = declare_model(m)
    params = grown.load(spec, ONE)
    for new, was in zip(flat(params), flat(old.load(declare_model(old.model), ONE)), strict=True):
        if len(new) != m.padded_vocab:
            assert torch.equal(new, was)
            continue
        assert torch.equal(new[:61], was[:61]) and not new[130:].any()
        mean = was[:61].double().mean(0).float()
        torch.testing.assert_close(new[61:130], mean.expand(69, -1), rtol=0, atol=1e-7)
    assert torch.equal(
        predict(params, make_batch(rows(), ONE), m, ONE)[:, :61],
        logits(old),
    )
    for mesh in ("tp=2", "dp=3", "dp=2,tp=2"):
        with simulated(MeshShape.parse(mesh)) as device_mesh:
            got = [full(w) for w in flat(grown.load(spec, Layout(device_mesh, rules_for(3))))]
        assert all(torch.equal(a, b) for a, b in zip(got, flat(params), strict=True))


def test_flags_of_a_vocabulary(copy):
    at = copy()
    (at / "tokenizer.json").write_text("{}")
    assert parse(["--init-from", str(at), "--model.vocab", "70"]).model.vocab == 70
    one_line(
        lambda: parse(["--init-from", str(at), "--model.vocab", "60"]),
        "--model.vocab 60",
        "only grow",
    )
