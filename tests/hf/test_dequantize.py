"""Quantised folders: the weights that transformers dequantises, whole and in parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.hf import Source, dequantize
from dtron.hf.dequantize import Dequantizer
from dtron.hf.weight_files import SINGLE, Reader
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.rules import rules_for
from dtron.tree import flat
from tests.helpers.hf_models import folder
from tests.helpers.texts import one_line
from tests.helpers.values import ONE
from tests.hf.test_families import logits

pytest.importorskip("transformers")
library = pytest.importorskip("safetensors.torch")

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def blocks(x: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the last two dims in blocks: float8 values and the scale of each block."""
    rows, columns = x.shape[-2:]
    scale = torch.zeros(*x.shape[:-2], -(-rows // size[0]), -(-columns // size[1]))
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            at = (..., slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
            scale[..., i, j] = x[at].abs().amax((-2, -1)) / 448
            q[at] = (x[at] / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return q, scale


def quantised(at: Path, quantization: dict, tensors: dict[str, torch.Tensor]) -> Path:
    at.mkdir()
    library.save_file(tensors, at / SINGLE, {"format": "pt"})
    return at


def fp8_folder(name: str, at: Path) -> Path:
    """The folder of a model with all its projections in float8."""
    quantization = FP8 | {"weight_block_size": [4, 4]}
    shutil.copytree(folder(name), at)
    tensors = library.load_file(at / SINGLE)
    for key in [key for key in tensors if "_proj" in key and tensors[key].ndim > 1]:
        tensors[key], tensors[key + "_scale_inv"] = blocks(tensors[key], (4, 4))
    library.save_file(tensors, at / SINGLE, {"format": "pt"})
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return at


def mxfp4_folder(at: Path) -> Path:
    """The folder of a small gpt-oss with its experts as in the published model."""
    shutil.copytree(folder("gpt-oss"), at)
    tensors, g = library.load_file(at / SINGLE), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(key).shape
        shape = (experts, columns, rows // 32)
        tensors[key + "_blocks"] = torch.randint(256, (*shape, 16), generator=g, dtype=torch.uint8)
        tensors[key + "_scales"] = torch.randint(120, 126, shape, generator=g, dtype=torch.uint8)
    library.save_file(tensors, at / SINGLE, {"format": "pt"})
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    return at


def plain_folder(at: Path, out: Path) -> Path:
    """The same folder, dequantised by transformers' functions."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(at, out)
    stored, tensors = library.load_file(at / SINGLE), {}
    for key, x in stored.items():
        if key.endswith(("_scale_inv", "_scales")):
            continue
        if key.endswith("_blocks"):
            key = key.removesuffix("_blocks")
            scales = stored[key + "_scales"]
            tensors[key] = convert_moe_packed_tensors(x, scales, dtype=torch.float32).contiguous()
        elif key + "_scale_inv" in stored:
            scale = stored[key + "_scale_inv"]
            tensors[key] = Fp8Dequantize(None)._dequantize_one(x, scale, torch.float32)
        else:
            tensors[key] = x
    library.save_file(tensors, out / SINGLE, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    at = tmp_path_factory.mktemp("quantised")
    made = {"mxfp4": mxfp4_folder(at / "mxfp4")}
    made |= {name: fp8_folder(name, at / name) for name in ("llama", "deepseek-v3")}
    return {name: (one, plain_folder(one, at / f"{name}-plain")) for name, one in made.items()}


NAMES = ("llama", "deepseek-v3", "mxfp4")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_transformers(folders, name, monkeypatch):
    """The comparison notices scales that are one block off, and bits that are swapped."""
    at, plain = (Source(one) for one in folders[name])
    spec = declare_model(at.model)
    want = flat(plain.load(spec, ONE))
    got = flat(at.load(spec, ONE))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(logits(at), logits(plain))
    assert at.bytes_read < 0.6 * plain.bytes_read or name == "deepseek-v3"  # of small tensors
    if name == "mxfp4":
        monkeypatch.setattr(dequantize, "_FP4_VALUES", dequantize._FP4_VALUES[::-1])
    else:
        monkeypatch.setattr(dequantize, "_factors", lambda scale: scale.roll(1))
    got = flat(Source(folders[name][0]).load(spec, ONE))
    assert not all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", ["dp=3", "tp=2", "dp=2,tp=2,ep=2"])
def test_each_rank_reads_the_blocks_of_its_shard(folders, name, mesh):
    at, shape = Source(folders[name][0]), MeshShape.parse(mesh)
    if shape.ep > 1 and not at.model.moe.experts:
        shape = replace(shape, ep=1)
    spec = declare_model(at.model)
    want = flat(at.load(spec, ONE))
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(3))
        got = [full(x) for x in flat(at.load(spec, layout))]
    assert all(torch.equal(a[: len(b)], b) for a, b in zip(got, want, strict=True))


@pytest.fixture(scope="module")
def readers(folders) -> dict[str, tuple[Dequantizer, str]]:
    up = "model.layers.1.mlp."
    return {
        "llama": (
            Dequantizer(Reader(folders["llama"][0]), {"weight_block_size": [4, 4]}),
            up + "up_proj.weight",
        ),
        "mxfp4": (Dequantizer(Reader(folders["mxfp4"][0]), MXFP4), up + "experts.gate_up_proj"),
    }


@given(data=st.data())
def test_any_box(readers, data):
    for reader, name in readers.values():
        box = []
        for n in reader.entries[name].shape:
            a = data.draw(st.integers(0, n))
            box.append((a, data.draw(st.integers(a, n))))
        whole = reader.read(name)
        assert torch.equal(reader.read(name, box), whole[tuple(slice(a, b) for a, b in box)])


def test_a_matrix_with_one_scale_and_exponents(tmp_path):
    """Scales of a whole matrix, blocks at an edge, exponents, and blocks of another size."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(20, 40, generator=g).to(torch.float8_e4m3fn)
    grid = torch.rand(2, 2, generator=g)
    exponents = torch.randint(120, 130, (2, 2), generator=g, dtype=torch.uint8)
    stored = {
        "one.weight": (q, torch.tensor(0.5)),
        "edge.weight": (q, grid),
        "bits.weight": (q, exponents),
        "power.weight": (q, torch.exp2(exponents.float() - 127).to(torch.float8_e8m0fnu)),
        "other.weight": (q, torch.rand(4, 5, generator=g)),
    }
    tensors = {name: x.clone() for name, (x, _) in stored.items()}
    tensors |= {name + "_scale_inv": scale for name, (_, scale) in stored.items()}
    at = quantised(tmp_path / "at", FP8, tensors | {"one.input_scale": torch.ones(())})
    reader = Dequantizer(Reader(at), FP8)
    assert set(reader.entries) == set(stored)
    x = q.float()
    rows, columns = torch.arange(20) // 16, torch.arange(40) // 32
    assert torch.equal(reader.read("one.weight"), x * 0.5)
    assert torch.equal(reader.read("edge.weight"), x * grid[rows][:, columns])
    powers = torch.exp2(exponents.float() - 127)[rows][:, columns]
    assert torch.equal(reader.read("bits.weight"), x * powers)
    assert torch.equal(reader.read("power.weight"), x * powers)
    other = stored["other.weight"][1][torch.arange(20) // 5][:, torch.arange(40) // 8]
    assert torch.equal(reader.read("other.weight"), x * other)


def test_what_is_refused(tmp_path):
    q = torch.zeros(20, 40).to(torch.float8_e4m3fn)
    packed = {"w_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8)}
    for name, tensors, said in (
        ("lost", {"w": q}, ("w_scale_inv", "is not in the folder")),
        ("odd", {"w": q, "w_scale_inv": torch.ones(3, 7)}, ("[3, 7]", "[20, 40]", "[16, 32]")),
        ("flat", {"w": q, "w_scale_inv": torch.ones(3)}, ("[3]", "[20, 40]")),
        ("half", packed, ("w_blocks", "w_scales")),
        ("short", packed | {"w_scales": torch.zeros(2, 3, 5, dtype=torch.uint8)}, ("[2, 3, 5]",)),
    ):
        at = quantised(tmp_path / name, FP8, tensors)
        one_line(lambda at=at: Dequantizer(Reader(at), FP8), str(at), *said)
