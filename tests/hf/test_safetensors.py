"""Reading ranges of bytes on every mesh: what a rank reads, and its memory."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, to_local
from dtron.distributed.simulated_ranks import simulated
from dtron.hf import Source
from dtron.hf.config import best_family, to_hf
from dtron.hf.load import weights_of
from dtron.hf.tensor_pattern import Pattern, halves, pairs, pattern
from dtron.hf.weight_files import Reader, write
from dtron.mesh import Layout, stage_mesh
from dtron.model.stages import split_into_stages
from dtron.model.transformer import declare_model
from dtron.rules import rules_for
from dtron.runtime.config import ModelConfig
from dtron.tree import flat, tree_map
from tests.helpers.hf_models import folder
from tests.helpers.real_mesh import real_mesh
from tests.helpers.values import ONE

PATTERNS = [
    "(n h) d -> d n h",
    "d (n h) -> n h d",
    "d (1/3 n h) -> d n h",
    "n d (h 1/2) -> n d h",
    "h d -> n d h",
    "([n h] + k h + k h) d -> d n h",
    "d (n h + [k h] + k) -> k d h",
    "(n + k + [1/2 h]) -> h",
    "(n: [h] + h + k h) d -> d n h",
    "(n: h + h + [k h] + k h) d -> d (n k) h",
    "(n d: h + [k]) 0/1 -> (n d k)",
    "d (n: [1/2 h] + k) -> n d h",
]


@st.composite
def parts(draw):
    """A pattern, the sizes of its axes and a range on each axis; whole on the inner axes of a dim
    with several axes."""
    p = pattern(draw(st.sampled_from(PATTERNS)))
    sizes = {axis: draw(st.integers(1, 4)) for axis in {*p.ours, "n", "k"}}
    sizes |= {axis: 3 for axis in "dh" if axis not in sizes}
    some = lambda n: draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted))
    ranges = {axis: tuple(some(sizes[axis])) for axis in p.ours}
    ranges |= {axis: (0, sizes[axis]) for axes in p.dims for axis in axes[1:]}
    return p, sizes, ranges


def ours_of(p: Pattern, x: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor:
    ranges = {axis: (0, n) for axis, n in sizes.items()}
    return p.take(x[tuple(slice(a, b) for a, b in p.box(ranges, sizes))], ranges, sizes)


def _shape(p: Pattern, sizes: dict[str, int]) -> list[int]:
    return [math.prod(sizes[axis] for axis in axes) for axes in p.dims]


@given(parts())
def test_a_part_is_read_from_its_box_and_written_to_it(case):
    """``take`` of a range is that part of the tensor. ``put`` is its inverse."""
    p, sizes, ranges = case
    shape = p.shape(sizes)
    x = torch.arange(math.prod(shape)).view(shape)
    inside = [axes for axes in p.dims if axes[0] not in p.outside]
    units = [math.prod(sizes[axis] for axis in axes[1:]) for axes in inside]
    whole = ours_of(p, x, sizes)
    assert whole.shape == tuple(sizes[axes[0]] * n for axes, n in zip(inside, units, strict=True))
    assert p.sizes(_shape(p, sizes), sizes) == {axis: sizes[axis] for axis in p.ours}
    shard = [tuple(n * at for at in ranges[axes[0]]) for axes, n in zip(inside, units, strict=True)]
    box = tuple(slice(a, b) for a, b in p.box(ranges, sizes))
    part = p.take(x[box], ranges, sizes)
    assert torch.equal(part, whole[tuple(slice(*range_) for range_ in shard)])
    if not p.outside:
        assert p.ranges(shard, sizes) == ranges
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
    fused = pattern("(n + [k] + k) d -> k d")
    assert torch.equal(ours_of(fused, x, {"n": 2, "k": 2, "d": 5}), x[2:4])
    by_head = pattern("(n: k + [k]) d -> (n k) d")
    assert torch.equal(ours_of(by_head, x, {"n": 3, "k": 1, "d": 5}), x[1::2])


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
    write(
        at,
        {"pad": [3], "x": shape},
        torch.bfloat16,
        {"pad": torch.zeros(3), "x": x}.__getitem__,
        10**6,
    )
    reader = Reader(at)
    box = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    got = reader.read("x", box)
    want = x[tuple(slice(a, b) for a, b in box)]
    assert torch.equal(got, want) and reader.bytes_read == 2 * want.numel()
    reader.close()


# ------------------------------------------------------------------------------------------- on
# every mesh

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


BIG = ModelConfig(
    vocab=4000, embed=256, layers=3, heads=8, kv_heads=4, head_dim=32, mlp=1000, norm_eps=1e-6
)


# A model of 327 MB.
LARGE = replace(
    BIG, vocab=8_000, embed=1024, layers=2, heads=16, kv_heads=16, head_dim=64, mlp=2600
)


def big(at: Path, m: ModelConfig = BIG) -> Path:
    """Save a model of random weights. The default has 20 MB."""
    names, values = {}, torch.Generator().manual_seed(0)
    family = best_family(m)
    for _, place in weights_of(m, family):
        names |= dict.fromkeys(place.names(), place.shape)
    write(
        at, names, torch.float32, lambda name: torch.randn(names[name], generator=values), 6_000_000
    )
    (at / "config.json").write_text(json.dumps(to_hf(m, family)))
    return at


def read_on_pool(at: str, mesh: str, zero: int) -> dict:
    """A job for the pool: load, and return the bytes read by count, the bytes read by the kernel,
    and the bytes of this rank's shards."""
    shape, source = MeshShape.parse(mesh), Source(at)
    device_mesh = real_mesh(mesh)
    layout = Layout(stage_mesh(device_mesh), rules_for(zero))
    stages = (
        split_into_stages(source.model, [2, 1]) if shape.pp > 1 else [declare_model(source.model)]
    )
    mine = dist.get_rank() // (shape.size // shape.pp)
    whole = Source(at).load(stages[mine], ONE)
    before = kernel_count()
    params = source.load(stages[mine], layout)
    read = kernel_count() - before
    same = all(torch.equal(full(a), b) for a, b in zip(flat(params), flat(whole), strict=True))
    share = sum(to_local(w).numel() for w in flat(params)) * 4
    wanted = sum(e.stop - e.start for e in source.reader.entries.values())
    return {"same": same, "counted": source.bytes_read, "read": read, "share": share, "all": wanted}


def kernel_count() -> int:
    """Bytes that this process has requested from the kernel."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("mesh, zero", [("tp=4", 1), ("dp=2,tp=2", 3), ("pp=2,tp=2", 1)])
def test_a_rank_reads_its_share(pool, tmp_path, mesh, zero):
    """The kernel counts at most 5 % more than the bytes of the rank's own shards. So no rank had
    more in memory."""
    for rank in pool.run(read_on_pool, str(big(tmp_path)), mesh, zero):
        assert rank["same"]
        assert rank["counted"] <= rank["read"] <= 1.05 * rank["share"], rank
        assert (
            rank["share"] < 0.3 * rank["all"]
            if mesh == "tp=4"
            else rank["share"] < 0.6 * rank["all"]
        )


def resident(key: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or the maximum since ``grown`` began
    (``VmHWM``)."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def grown(fn) -> int:
    """Run ``fn``, and return by how many bytes the process grew at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory returns to the system, so that it hides nothing
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = fn()
    del kept
    return resident("VmHWM") - before


def memory_on_pool(at: str, mesh: str, careless: bool) -> dict[str, float]:
    """A job for the pool: what a rank holds and needs while it loads, as fractions of the model.
    ``careless``: each rank loads everything and keeps its shard."""
    source = Source(at)
    layout = Layout(stage_mesh(real_mesh(mesh)), rules_for(3))
    spec, parts = declare_model(source.model), []

    def load():
        if careless:
            whole = source.load(spec, ONE)
            tree = tree_map(lambda w, x: layout.shard(x, *w.axes), spec, whole)
        else:
            tree = source.load(spec, layout)
        parts.extend(to_local(w).numel() * 4 for w in flat(tree))
        return tree

    load()  # what a first load brings into memory, libraries' pages and tables, is no weight
    parts.clear()
    model = sum(e.stop - e.start for e in source.reader.entries.values())
    return {"grown": grown(load) / model, "share": sum(parts) / model}


@pytest.mark.xdist_group("pool")
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc how large a process was")
def test_a_rank_has_its_share_in_memory_and_never_the_model(pool, tmp_path):
    """The kernel measures it. The measure notices a rank that loads everything."""
    at = str(big(tmp_path, LARGE))
    for rank in pool.run(memory_on_pool, at, "tp=4", False):
        assert rank["share"] < 0.26 and rank["share"] < rank["grown"] + 0.01 < 0.4, rank
    for rank in pool.run(memory_on_pool, at, "tp=4", True):
        assert rank["grown"] > 1.0
