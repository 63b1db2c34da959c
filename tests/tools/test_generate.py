"""Generation: neither the cache nor the mesh changes anything, and sampling follows its
settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from dtron import checkpoint
from dtron.data.tokenization import load_tokenizer
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.mla import MLAConfig
from dtron.mesh import Layout, stage_mesh
from dtron.model.batch import make_batch
from dtron.model.transformer import declare_model, predict
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime import cli
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.runtime.generation import Decoder, Sampling, draw_tokens, generate
from dtron.testing import meshes
from dtron.tools.generate import check_sampling, main
from dtron.training.optimizer import init_state
from dtron.training.pipeline import on_ranks, one_stage, pipeline
from dtron.tree import flat, tree_map
from tests.helpers.real_mesh import destroy_groups, real_mesh
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import ADAMW, ONE

M = replace(MODEL, qk_norm=False, context=64, init_std=0.3)
MODELS = {
    "grouped": replace(M, kv_heads=2, qk_norm=True),
    "window": replace(M, window=5),
    "sinks": replace(M, sinks=True, window=5, full_every=2, qkv_bias=True, bias=True),
    "softcap": replace(M, softcap=2.0),
    "learned": replace(M, positions="learned", norm="layernorm", activation="gelu", tied=True),
    "latent": replace(M, mla=MLAConfig(kv_rank=12, q_rank=8, nope_dim=6, rope_dim=4, v_dim=5)),
    "experts": replace(M, moe=MoEConfig(experts=4, top_k=2, mlp=16)),
}
F64 = torch.float64


def weights(m: ModelConfig, layout: Layout = ONE, spec=None):
    spec = (declare_model(m),) if spec is None else spec
    return init(spec, m.dims(), 0, layout, F64)


def texts(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(61, (n,), generator=g).tolist() for n in lengths]


def uncached(m: ModelConfig, text: list[int]) -> Tensor:
    rows = torch.tensor([[*text, 0]])
    with torch.no_grad():
        return predict(weights(m)[0], make_batch(rows, ONE), m, ONE)


def cached(
    m: ModelConfig, rows: list[list[int]], pieces: list[list[int]], late: int = 0
) -> list[list[Tensor]]:
    """The logits after each piece, when rows are fed in pieces of these lengths.

    ``late``: the error of the second piece's positions."""
    decoder, found = (
        Decoder(weights(m), len(rows), 40, m, one_stage(m, 1, ONE), "cpu"),
        [[] for _ in rows],
    )
    starts = [0] * len(rows)
    for step in range(len(pieces[0])):
        ends = [a + piece[step] for a, piece in zip(starts, pieces, strict=True)]
        new = [row[a:b] for row, a, b in zip(rows, starts, ends, strict=True)]
        at = [a + late if step else a for a in starts]
        logits = decoder(new, at)
        for row, got in zip(found, logits, strict=True):
            row.append(got)
        starts = ends
    return found


PIECES = [[3, 1, 4], [1, 1, 1], [6, 2, 1]]


def assert_cached(m: ModelConfig, pieces: list[list[int]] = PIECES) -> None:
    """Rows of unequal lengths, fed in these pieces, have the logits of whole rows."""
    rows = texts(*map(sum, pieces))
    for row, cuts, got in zip(rows, pieces, cached(m, rows, pieces), strict=True):
        want, ends = uncached(m, row), torch.tensor(cuts).cumsum(0) - 1
        torch.testing.assert_close(torch.stack(got), want[ends].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4)
@given(st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=3), min_size=1, max_size=3))
def test_the_cache_changes_nothing(name, pieces):
    """Rows of unequal lengths, fed in any pieces. A position that is off by one is noticed."""
    m, rows = MODELS[name], texts(*(sum(row) for row in pieces))
    assert_cached(m, pieces)
    late = cached(m, rows, pieces, late=1)
    assert any(
        (b[1] - uncached(m, r)[c[0] + c[1] - 1]).abs().max() > 1e-4
        for r, c, b in zip(rows, pieces, late)
    )


PROMPTS = texts(5, 2, 7)  # outside, because every simulated rank would draw its own


def greedy(
    m: ModelConfig, params, pipe, ends=frozenset(), device="cpu", **options
) -> list[list[int]]:
    sampling = Sampling(**{"temperature": 0.0, **options})
    return generate(params, PROMPTS, 12, m, pipe, sampling, device, ends)


def on_mesh(m: ModelConfig, mesh: str, layout: Layout, device_mesh=None) -> list[list[int]]:
    shape = MeshShape.parse(mesh)
    config = RunConfig(mesh=mesh, model=m)
    template = torch.empty(0, m.embed, dtype=F64)
    pipe = on_ranks(pipeline(config, shape, 1, config.data.seq_len, layout), device_mesh, template)
    text = greedy(m, weights(m, layout, pipe.spec), pipe)
    destroy_groups(pipe)
    return text


WIDE = {
    name: replace(
        MODELS[name], layers=1, heads=12, kv_heads=12, mlp=48, moe=replace(MODELS[name].moe, mlp=24)
    )
    for name in ("grouped", "latent", "experts")
}


def same_on(mesh: str, name: str) -> None:
    m = WIDE[name]
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        got = on_mesh(m, mesh, Layout(device_mesh, rules_for(1)))
    assert got == greedy(m, weights(m), one_stage(m, 1, ONE))


@pytest.mark.parametrize(
    "mesh, name",
    [("tp=3", "grouped"), ("dp=2,tp=2", "latent"), ("tp=2,ep=2", "experts"), ("cp=2", "latent")],
)
def test_the_mesh_changes_nothing(mesh, name):
    same_on(mesh, name)


@pytest.mark.slow
@settings(max_examples=12)
@given(meshes(6, ("dp", "cp", "tp")), st.sampled_from(sorted(WIDE)))
def test_no_mesh_changes_anything(mesh, name):
    same_on(mesh, name)


def on_pool(mesh: str) -> list[list[int]]:
    """A job for the pool: text on real ranks."""
    device_mesh = real_mesh(mesh)
    return on_mesh(
        MODELS["grouped"], mesh, Layout(stage_mesh(device_mesh), rules_for(1)), device_mesh
    )


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "pp=2,tp=2"])
def test_real_ranks(pool, mesh):
    m = MODELS["grouped"]
    want = greedy(m, weights(m), one_stage(m, 1, ONE))
    assert pool.run(on_pool, mesh) == [want] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_changes_nothing(name):
    m = MODELS[name]
    there = tree_map(lambda w: w.cuda(), weights(m))
    got = greedy(m, there, one_stage(m, 1, ONE), device="cuda")
    assert got == greedy(m, weights(m), one_stage(m, 1, ONE))


def test_a_row_ends_where_its_text_does():
    """A row ends at its end token. The other rows go on unchanged."""
    m = MODELS["grouped"]
    pipe, params = one_stage(m, 1, ONE), weights(m)
    free = greedy(m, params, pipe)
    end = free[0][5 + 3]  # the fourth token of the first row
    stopped = greedy(m, params, pipe, ends={end})
    for prompt, full, cut in zip(PROMPTS, free, stopped, strict=True):
        new = full[len(prompt) :]
        n = new.index(end) + 1 if end in new else len(new)
        assert cut == full[: len(prompt) + n]
    assert len(stopped[0]) < len(free[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_line(bad):
    m = MODELS["grouped"]
    pipe, params = one_stage(m, 1, ONE), weights(m)
    flat(params)[0][3] = bad
    one_line(lambda: greedy(m, params, pipe), "logits are not finite", "earlier checkpoint")


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_only_the_likeliest_are_drawn(seed, top_p, temperature):
    """The smallest set of tokens that has this probability."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 9, generator=g) * 2
    drawn = draw_tokens(logits, Sampling(temperature, top_p), g)
    odds = (logits / temperature).softmax(-1)
    for row, token in zip(odds, drawn, strict=True):
        likelier = row[row > row[token]].sum()
        assert likelier < top_p + 1e-5


def test_draws_follow_the_odds():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    g = torch.Generator().manual_seed(0)

    def share(**options) -> torch.Tensor:
        drawn = draw_tokens(logits, Sampling(**options), g)
        return torch.bincount(drawn, minlength=3) / 20_000

    torch.testing.assert_close(
        share(temperature=1.0, top_p=1.0), torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        share(temperature=1.0, top_p=0.6), torch.tensor([0.625, 0.375, 0.0]), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        share(temperature=0.5, top_p=1.0), torch.tensor([25.0, 9, 4]) / 38, atol=0.02, rtol=0
    )
    assert share(temperature=0.0, top_p=1.0).tolist() == [1.0, 0.0, 0.0]


def run_directory(folder: Path) -> Tokenizer:
    """Write a run with a byte-level tokenizer."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    m = replace(MODELS["grouped"], vocab=256)
    spec = (declare_model(m),)
    params = init(spec, m.dims(), 0, ONE)
    cli.save(RunConfig(model=m), folder / "config.json")
    checkpoint.save(
        folder, checkpoint.TrainState(3, 0, params, init_state(ADAMW, spec, params)), spec, {}
    )
    return tokenizer


def test_from_a_run_directory(tmp_path, capsys):
    """The command, on one device and on simulated ranks."""
    run_directory(tmp_path)
    argv = [
        "--from",
        str(tmp_path),
        "--prompt",
        "def",
        "--prompt",
        "x",
        "--tokens",
        "5",
        "--temperature",
        "0",
    ]
    assert main(argv) == 0
    want = capsys.readouterr().out
    assert want.startswith("def") and "\nx" in want
    assert main([*argv, "--simulate", "--mesh", "pp=2,tp=2"]) == 0
    assert capsys.readouterr().out == want
    refused = lambda more, *said: one_line(lambda: main([*argv, *more]), *said)
    refused(["--tokens", "62"], "--tokens 62", "context is 64", "use --tokens 61")
    refused(["--prompt", ""], "no tokens")
    refused(["--simulate", "--mesh", "tp=3"], "tp must divide")
    refused(["--simulate", "--mesh", "cp=2"], "cp")
    refused(["--from", str(tmp_path / "no")], "no folder")
    refused(["--top", "2"], "--top")
    refused(["--prompt", "caf\udce9"], "--prompt 'caf\\udce9'", "UTF-8", "character 3")
    refused(["--seed", str(2**70)], "--seed")
    refused(["--from", "caf\udce9"], "no folder")
    refused(["--from", "x" * 300], "--from", "cannot be opened")
    for mesh in ("caf\udce9", "tp=" + "9" * 30, "tp=1e3"):
        refused(["--mesh", mesh], "mesh")
    assert main([*argv, "--temperature", "1e-40", "--top-p", "1e-300"]) == 0
    assert capsys.readouterr().out == want
    (tmp_path / "tokenizer.json").unlink()
    refused([], "has no tokenizer.json")


def test_padding_and_truncation_of_a_tokenizer_are_left_out(tmp_path, capsys):
    tokenizer = run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "4", "--temperature", "0", "--prompt", "def f"]
    argv += ["--prompt", "x"]
    assert main(argv) == 0
    want = capsys.readouterr().out
    tokenizer.enable_padding(length=9, pad_id=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(argv) == 0 and capsys.readouterr().out == want
    tokenizer.no_padding()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(argv) == 0 and capsys.readouterr().out == want


def test_a_run_stops_as_the_model_that_it_began_with(tmp_path, monkeypatch):
    """A run with --init-from keeps the model's generation_config.json in hf/."""
    run_directory(tmp_path)
    argv = ["--from", str(tmp_path), "--tokens", "9", "--temperature", "0", "--prompt", "def"]
    texts: list[list[int]] = []

    def recorded(*args, **options):
        texts[:] = generate(*args, **options)
        return texts

    monkeypatch.setattr("dtron.tools.generate.generate", recorded)
    assert main(argv) == 0
    new = texts[0][3:]
    second = next(i for i, token in enumerate(new) if token != new[0])
    unused = next(i for i in range(256) if i not in new)
    (tmp_path / "hf").mkdir()

    def stopped(name: str, entries: object) -> int:
        (tmp_path / name).write_text(json.dumps(entries))
        assert main(argv) == 0
        return len(texts[0]) - 3

    assert stopped("hf/config.json", {"eos_token_id": new[second]}) == second + 1
    assert stopped("hf/generation_config.json", {"eos_token_id": [unused, new[0]]}) == 1
    assert stopped("hf/generation_config.json", {"eos_token_id": None}) == second + 1
    (tmp_path / "hf" / "config.json").unlink()
    eos = load_tokenizer(str(tmp_path)).id_to_token(new[second])
    assert stopped("tokenizer_config.json", {"eos_token": eos}) == second + 1


def test_extreme_settings_draw_as_their_limits_do():
    """A tiny temperature takes the most likely token, a large one draws from all alike."""
    logits = torch.tensor([[0.0, 3.0, 2.9, -80.0], [70.0, 1.0, -70.0, 69.9]])
    for rows in (logits, logits.bfloat16().float()):
        for temperature in (1e-40, 5e-324, 1e-300, 1e-4):
            drawn = draw_tokens(rows, Sampling(temperature), torch.Generator().manual_seed(0))
            assert drawn.tolist() == [1, 0]
        for top_p in (5e-324, 1e-300, 1e-40):
            drawn = draw_tokens(rows, Sampling(1.0, top_p), torch.Generator().manual_seed(0))
            assert drawn.tolist() == [1, 0]
    hot = draw_tokens(logits[:1].expand(400, 4), Sampling(1.7e308), torch.Generator())
    assert (torch.bincount(hot, minlength=4) > 60).all()


def test_what_cannot_be_sampled():
    for bad in (2**64, -(2**63) - 1, 10**30):
        one_line(lambda bad=bad: check_sampling(1, 1.0, 1.0, bad), "--seed", "64 bits")
    for good in (2**64 - 1, -(2**63)):
        torch.Generator().manual_seed(good)
        check_sampling(1, 1.0, 1.0, good)
    one_line(lambda: check_sampling(0, 1.0, 1.0), "--tokens 0")
    for bad in (-0.5, float("nan"), float("inf")):
        one_line(lambda bad=bad: check_sampling(1, bad, 1.0), "--temperature")
    for bad in (0.0, 1.5, float("nan")):
        one_line(lambda bad=bad: check_sampling(1, 1.0, bad), "--top-p")
