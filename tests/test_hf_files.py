"""Reading by ranges of bytes, on every mesh; and all that is refused, in one line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_models import folder
from hypothesis import given
from hypothesis import strategies as st
from test_hf import as_run
from texts import one_line
from values import ONE

from dtron import checkpoint, cli
from dtron.cli import parse
from dtron.config import ModelConfig, RunConfig
from dtron.dtensor import full, local
from dtron.hf import Source, keep_origin
from dtron.hf.__main__ import main as hf_main
from dtron.hf.config import best_family, to_hf
from dtron.hf.export import export
from dtron.hf.load import weights_of
from dtron.hf.pattern import Pattern, halves, pairs, pattern
from dtron.hf.safetensors import INDEX, SINGLE, Reader, write
from dtron.mesh import Layout, build_mesh, rules_for, stage_mesh
from dtron.model import declare_model
from dtron.optim import adam_init
from dtron.params import flat, init
from dtron.pipeline import cut
from dtron.presets import PRESETS
from dtron.shape import MeshShape
from dtron.simulate import simulated

PATTERNS = [
    "(n h) d -> d n h",
    "d (n h) -> n h d",
    "d (1/3 n h) -> d n h",
    "n d (h 1/2) -> n d h",
    "h d -> n d h",
]


@st.composite
def parts(draw):
    """A pattern, the sizes of its axes and a range of each."""
    p = pattern(draw(st.sampled_from(PATTERNS)))
    sizes = {axis: draw(st.integers(1, 4)) for axis in p.ours}
    ranges = {
        axis: draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) for axis, n in sizes.items()
    }
    return p, sizes, {axis: tuple(r) for axis, r in ranges.items()}


def ours_of(p: Pattern, x: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor:
    ranges = {axis: (0, n) for axis, n in sizes.items()}
    return p.take(x[tuple(slice(a, b) for a, b in p.box(ranges, sizes))], ranges, sizes)


@given(parts())
def test_a_part_is_read_from_its_box_and_written_to_it(case):
    """``take`` of a box is a part of the whole, and ``put`` its reverse."""
    p, sizes, ranges = case
    shape = p.shape(sizes)
    x = torch.arange(math.prod(shape)).view(shape)
    inside = [axis for axis in p.ours if axis not in p.outside]
    whole = ours_of(p, x, sizes)
    assert whole.shape == tuple(sizes[axis] for axis in inside)
    box = tuple(slice(a, b) for a, b in p.box(ranges, sizes))
    part = p.take(x[box], ranges, sizes)
    assert torch.equal(part, whole[tuple(slice(*ranges[axis]) for axis in inside)])
    out = torch.full(shape, -1)
    p.put(out, whole, sizes)
    assert torch.equal(out[out >= 0], x[out >= 0]) and (out >= 0).sum() == whole.numel()


def test_a_pattern_says_what_einops_would():
    x = torch.randn(6, 5)
    assert torch.equal(
        ours_of(pattern("(n h) d -> d n h"), x, {"n": 2, "h": 3, "d": 5}), x.T.reshape(5, 2, 3)
    )
    assert torch.equal(ours_of(pattern("(1/3 n) d -> n d"), x, {"n": 2, "d": 5}), x.chunk(3)[1])
    assert torch.equal(ours_of(pattern("(n 1/3) d -> n d"), x, {"n": 2, "d": 5}), x[1::3])


@given(st.integers(0, 3), st.integers(1, 4))
def test_rotary_columns_go_and_come_back(plain, turned):
    x = torch.arange(2 * (plain + 2 * turned)).view(2, -1)
    assert torch.equal(pairs(halves(x, 2 * turned), 2 * turned), x)
    assert halves(x, 2 * turned)[0, plain:].tolist() == [
        plain + 2 * i + j for j in (0, 1) for i in range(turned)
    ]


@given(st.data())
def test_any_box_of_a_file(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    at = tmp_path_factory.mktemp("box")
    x = torch.randn(shape).bfloat16()
    write(at, {"pad": [3], "x": shape}, torch.bfloat16, {"pad": torch.zeros(3), "x": x}.__getitem__, 10**6)
    reader = Reader(at)
    box = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    got = reader.read("x", box)
    want = x[tuple(slice(a, b) for a, b in box)]
    assert torch.equal(got, want) and reader.bytes_read == 2 * want.numel()
    reader.close()


# ------------------------------------------------------------------------------------------- on every mesh

MESHES = ["tp=2", "dp=3,tp=2", "pp=2,tp=2", "dp_replicate=2,dp=2"]


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss", "deepseek-v3"])
def test_the_same_weights_on_simulated_ranks(name):
    source = Source(folder(name))
    want = [full(w) for w in flat(source.load(declare_model(source.model), ONE))]
    for mesh in MESHES[:2]:
        with simulated(MeshShape.parse(mesh)) as device_mesh:
            layout = Layout(device_mesh, rules_for(3))
            got = [full(w) for w in flat(source.load(declare_model(source.model), layout))]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BIG = ModelConfig(vocab=4000, embed=256, layers=3, heads=8, kv_heads=4, head_dim=32, mlp=1000, norm_eps=1e-6)


def big(at: Path) -> Path:
    """A model of 20 MB, of random weights."""
    names, values = {}, torch.Generator().manual_seed(0)
    family = best_family(BIG)
    for _, place in weights_of(BIG, family):
        names |= dict.fromkeys(place.names(), place.shape)
    write(at, names, torch.float32, lambda name: torch.randn(names[name], generator=values), 6_000_000)
    (at / "config.json").write_text(json.dumps(to_hf(BIG, family)))
    return at


def read_on_pool(at: str, mesh: str, zero: int) -> dict:
    """A job: load, and say what was read, by the count and by the kernel's, and what of the model is here."""
    shape, source = MeshShape.parse(mesh), Source(at)
    device_mesh = build_mesh(shape, "cpu")
    layout = Layout(stage_mesh(device_mesh), rules_for(zero))
    stages = cut(source.model, [2, 1]) if shape.pp > 1 else [declare_model(source.model)]
    mine = dist.get_rank() // (shape.size // shape.pp)
    whole = Source(at).load(stages[mine], ONE)
    before = kernel_count()
    params = source.load(stages[mine], layout)
    read = kernel_count() - before
    same = all(torch.equal(full(a), b) for a, b in zip(flat(params), flat(whole), strict=True))
    share = sum(local(w).numel() for w in flat(params)) * 4
    wanted = sum(e.stop - e.start for e in source.reader.entries.values())
    return {"same": same, "counted": source.bytes_read, "read": read, "share": share, "all": wanted}


def kernel_count() -> int:
    """Bytes that this process has asked the kernel to read."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.parametrize("mesh, zero", [("tp=4", 1), ("dp=2,tp=2", 3), ("pp=2,tp=2", 1)])
def test_a_rank_reads_its_share(pool, tmp_path, mesh, zero):
    """No more than 5 % over the bytes of its own shards, as the kernel counts them: so nobody had more."""
    for rank in pool.run(read_on_pool, str(big(tmp_path)), mesh, zero):
        assert rank["same"]
        assert rank["counted"] <= rank["read"] <= 1.05 * rank["share"], rank
        assert rank["share"] < 0.3 * rank["all"] if mesh == "tp=4" else rank["share"] < 0.6 * rank["all"]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def copy(tmp_path):
    def make(name: str = "llama") -> Path:
        return Path(shutil.copytree(folder(name), tmp_path / name))

    return make


def change(at: Path, file: str = "config.json", **values) -> Path:
    said = json.loads((at / file).read_text()) | values
    (at / file).write_text(json.dumps({key: value for key, value in said.items() if value != "drop"}))
    return at


def rewrite(at: Path, edit) -> Path:
    """The weights again, after ``edit`` of their dictionary."""
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
    refused(change(at, architectures=["BertForMaskedLM"]), "BertForMaskedLM", "LlamaForCausalLM")
    refused(
        change(at, architectures=["LlamaForCausalLM"], hidden_act="relu"), "hidden_act", "'relu'", "'silu'"
    )
    refused(change(at, hidden_act="silu", hidden_size="drop"), "lacks hidden_size")
    refused(change(at, hidden_size=64, quantization_config={"quant_method": "mxfp4"}), "mxfp4")
    refused(change(at, quantization_config="drop", hidden_size="64"), "type")
    refused(change(at, hidden_size=64, rope_parameters={"rope_type": "longrope"}), "longrope")
    (at / "config.json").write_text("{")
    refused(at, "JSON")


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
    one_line(lambda: parse(["--init-from", str(at), "--model", "tiny"]), "--model tiny", "drop --model")
    one_line(lambda: parse(["--init-from", str(at), "--model.embed", "32"]), "--model.embed 32", "64")
    one_line(lambda: parse(["--init-from", str(at), "--model.moe.experts", "4"]), "--model.moe.experts 4")
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
    """The tokenizer's files, and the words of config.json that dtron has no use for."""
    at = change(copy("mistral"), bos_token_id=7, sliding_window=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (at / name).write_text('{"as": "it was"}')
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    as_run(Source(at), run_dir)
    keep_origin(at, run_dir)
    export(run_dir, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["bos_token_id"] == 7 and said["dtype"] == "float32"
    assert said["architectures"] == ["MistralForCausalLM"]  # and not a llama, which it could be
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"as": "it was"}'


def test_modules_of_multi_token_prediction(tmp_path):
    """They are blocks after the last there. Without the flag they are left out."""
    m = replace(
        PRESETS["tiny-deepseek"], vocab=300, embed=32, mtp=replace(PRESETS["tiny-deepseek"].mtp, depth=2)
    )
    spec = (declare_model(m),)
    params = init(spec, m.dims(), 0, ONE)
    cli.save(RunConfig(model=m), tmp_path / "config.json")
    checkpoint.save(tmp_path, checkpoint.TrainState(0, 0, params, adam_init(params)), spec, {})
    export(tmp_path, tmp_path / "out", torch.float32)
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
