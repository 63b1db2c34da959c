"""The table, the pictures and the figures show what simulated ranks hold."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import ModelConfig
from dtron.testing import meshes
from dtron.tools.shard_shapes import coordinates, local_range
from dtron.tools.show import main, picture, rows, size, total
from dtron.training.optimizer import init_state
from dtron.tree import flat
from tests.helpers.paths import ROOT
from tests.helpers.values import ADAMW

SMALL = ModelConfig(
    vocab=37,
    embed=10,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=4,
    mlp=12,
    vocab_multiple=1,
    qk_norm=True,
)


@settings(max_examples=25)
@given(
    mesh=meshes(),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    axes=st.sampled_from([("embed", "mlp"), ("vocab", "embed"), ("tokens_sp", "act_embed")]),
)
def test_ranges_are_what_ranks_hold(mesh, shape, axes):
    """The values of a tensor are its indices. The shard of each rank must be the range computed for
    it."""
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        x = Layout(device_mesh).shard(whole, *axes)
        held = x.to_local()._local_tensors
        sizes = tuple(device_mesh.shape)
        for rank, at in coordinates(sizes):
            (a, b), (c, d) = local_range(shape, sizes, x.placements, at)
            assert torch.equal(held[rank], whole[a:b, c:d])


@pytest.mark.parametrize("mesh", ["dp=1", "dp=3,tp=2", "dp_replicate=2,dp=2,tp=2", "tp=4"])
@pytest.mark.parametrize("zero", [0, 3])
def test_the_bytes_are_those_of_real_shards(mesh, zero):
    """ZeRO stages 0 and 3 hold nothing but shards. Compute is float32, so stage 0 has no copies
    either."""
    shape = MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(zero))
        params = init(declare_model(SMALL), SMALL.dims(), 0, layout)
        opt = init_state(ADAMW, declare_model(SMALL), params)
        held = lambda tree: sum(4 * _first_rank(t).numel() for t in flat(tree))
        assert total(rows(SMALL, shape, zero, compute=4)) == (
            held(params),
            held(params),
            sum(map(held, opt.trees.values())),
        )


def _first_rank(t):
    t = t.to_local() if hasattr(t, "to_local") else t
    return getattr(t, "_local_tensors", [t])[0]


def test_what_each_stage_saves():
    """bf16 compute over dp=4, and embed is divisible. A weight has 18 bytes. Stage 0 shards none of
    them, and stage 1 all but the gradient's 4. Stages 1 and 2 gather 2 bytes more. Norms are
    replicated everywhere."""
    model, shape = ModelConfig(), MeshShape(dp=4)
    matrices = sum(w.numel for w in flat(declare_model(model)) if w.decays)
    norms = sum(w.numel for w in flat(declare_model(model)) if not w.decays)
    for zero, (params, grads, optimizer) in {
        0: (6, 4, 8),
        1: (3.5, 4, 2),
        2: (3.5, 1, 2),
        3: (1.5, 1, 2),
    }.items():
        assert total(rows(model, shape, zero)) == (
            matrices * params + norms * 6,
            matrices * grads + norms * 4,
            matrices * optimizer + norms * 8,
        )


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2,tp=2", "dp=64,tp=8", "dp_replicate=2,dp=3"])
def test_pictures_are_svg_with_every_weight(mesh):
    text = picture(SMALL, MeshShape.parse(mesh), 1)
    words = [t.text for t in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    for w in flat(declare_model(SMALL).blocks[0]):
        assert w.path.removeprefix("blocks.0.") in words


def test_the_figures_of_the_docs_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "draw"))
    import figures
    from plan_figure import FILES

    drawn = figures.figures()
    assert {f.name for f in figures.FOLDER.glob("*.svg")} == {*drawn, *FILES}
    for name, svg in drawn.items():
        assert (figures.FOLDER / name).read_text() == svg, "run python docs/draw/figures.py"
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert all(f"figures/{name}" in pages for name in (*drawn, *FILES))


def test_the_sheet_has_twelve_figures_and_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "draw"))
    from sheet import sheet

    figures = {f.name: f.read_text() for f in (ROOT / "docs" / "figures").glob("*.svg")}
    page = (ROOT / "docs" / "sheet.html").read_text()
    assert page == sheet(figures), "run python docs/draw/figures.py"
    shown = [i.get("src") for i in ET.fromstring(page.partition("\n")[2]).iter("img")]
    assert len({*shown}) == len(shown) == 12
    assert all((ROOT / "docs" / src).is_file() for src in shown)


def test_the_command_prints_every_weight(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "mesh.svg"
    assert (
        main(["--mesh", "dp=8,tp=4", "--model", "llama3-8b", "--zero", "3", "--svg", str(out)]) == 0
    )
    said = capsys.readouterr().out
    assert "[embed@dp, mlp@tp]" in said and "4096 x 14336" in said and "512 x 3584" in said
    assert said.count("blocks.0-31.") == 9 and out.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--svg", "/dev/null/x.svg"], "cannot be written"),
        (["--mesh", "tp=3"], "tp must divide heads"),
        (["--steps", "3"], "unknown flag"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_sizes_for_people():
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_blocks_that_differ_have_rows_of_their_own():
    """A dense layer before two with experts. Rows and shards of experts on a folded mesh."""
    m = replace(ModelConfig(layers=3), moe=MoEConfig(8, 2, 64, dense_layers=1))
    shape = MeshShape.parse("dp=4,tp=2,ep=4")
    found = {r.path: r for r in rows(m, shape, 3)}
    assert found["blocks.0.mlp.w_up"].count == 1 and "blocks.0.moe.router.w" not in found
    w = found["blocks.1-2.moe.experts.w_up"]
    assert (w.count, w.axes) == (2, "[experts@ep, expert_embed@edp, expert_mlp]")
    assert w.local == (2, 128, 64) and w.placement == "(dp.edp: S1, dp.ep: S0, tp.ep: S0)"
    paths = list(found)
    assert paths[0] == "embedding.w_tokens" and paths[-2:] == ["norm.scale", "w_head"]
