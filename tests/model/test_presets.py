"""Presets: the published parameter counts, and shapes that a mesh can hold."""

import re
from dataclasses import replace

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.flops import active_count, parameter_count
from dtron.model.mtp import MTPConfig
from dtron.model.presets import PRESETS, preset
from dtron.model.transformer import declare_model
from dtron.runtime.config import ModelConfig
from dtron.runtime.validate import check
from dtron.tree import leaves

# By the published weights; tied weights count once.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "deepseek-v3": 671_026_419_200,  # and 11.6e9 of its own, in multi-token prediction
    "deepseek-v3.2": 671_877_944_064,  # 61 indexers of 13,959,424 more
}
# Active parameters of a token (the card of gpt-oss says 3.6e9, without the embedding).
ACTIVE = {
    "mixtral-8x7b": 12.9e9,
    "qwen3-30b-a3b": 3.3e9,
    "qwen3-235b-a22b": 22e9,
    "gpt-oss-20b": 4.2e9,
    "qwen3-next-80b-a3b": 3.9e9,  # the card: 3e9, without embedding and head
}
ACTIVE |= {
    "deepseek-v2-lite": 2.66e9,
    "deepseek-v3": 37.5e9,
    "deepseek-v3.2": 38.4e9,
}  # the card of V2-Lite: 2.4e9, without it
OURS = {"tiny", "tiny-moe", "tiny-deepseek", "bench-1.3b", "bench-8b-width", "bench-moe"}
OURS |= {"tiny-deepseek-v3.2", "tiny-qwen3-next", "tiny-nemotron-h", "bench-1.3b-hybrid"}

each = pytest.mark.parametrize("name", PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    """Without padding of the vocabulary and without multi-token prediction."""
    m = replace(preset(name), vocab_multiple=1)
    assert parameter_count(replace(m, mtp=MTPConfig())) == PUBLISHED[name]


def test_what_prediction_ahead_adds_to_deepseek_v3():
    """The model card says 14e9, with an embedding and a head that the main model shares."""
    m = preset("deepseek-v3")
    more = parameter_count(m) - parameter_count(replace(m, mtp=MTPConfig()))
    assert more + 2 * m.vocab * m.embed == pytest.approx(14e9, rel=0.05)


@pytest.mark.parametrize("name", ACTIVE)
def test_parameters_that_a_token_uses(name):
    """By the model cards, rounded as there."""
    assert active_count(replace(preset(name), mtp=MTPConfig())) == pytest.approx(
        ACTIVE[name], rel=0.02
    )


def test_every_preset_of_others_is_counted():
    assert set(PUBLISHED) | OURS == set(PRESETS)


def test_our_own_presets_are_what_their_names_say():
    assert preset("tiny") == ModelConfig()
    assert parameter_count(preset("bench-1.3b")) == 1_266_780_160
    wide, llama = preset("bench-8b-width"), preset("llama3-8b")
    assert all(
        getattr(wide, n) == getattr(llama, n)
        for n in ("embed", "heads", "kv_heads", "head_dim", "mlp")
    )


@each
def test_padding_the_vocabulary_adds_rows_of_the_embedding_and_nothing_else(name):
    m = preset(name)
    rows = m.padded_vocab - m.vocab
    assert 0 <= rows < m.vocab_multiple and m.padded_vocab % m.vocab_multiple == 0
    extra = parameter_count(m) - parameter_count(replace(m, vocab_multiple=1))
    assert extra == rows * m.embed * (1 if m.tied else 2)


@each
def test_the_sizes_of_a_preset_fit_each_other(name):
    m = preset(name)
    own = {k: v for mixer in m.mixers for k, v in mixer.dims().items()}
    dims, spec = m.dims() | own, declare_model(m)
    assert len(spec.blocks) == m.layers
    for path, w in leaves(spec):
        assert w.shape == tuple(dims[a.removeprefix("act_")] for a in w.axes), path
    own_width = ("qwen3", "gpt-oss", "bench-moe")  # of heads
    assert m.latent or m.heads * m.head_dim == m.embed or name.startswith(own_width)
    assert (m.norm, m.positions) in (("rmsnorm", "rotary"), ("layernorm", "learned"))
    assert (spec.w_head is None) == m.tied and m.embed % 32 == 0 and m.mlp % 32 == 0


@each
def test_a_preset_fits_its_meshes(name):
    """tp is the number of key heads, up to a host of 8, at any sequence length up to the
    context."""
    m = preset(name)
    widest = max(tp for tp in range(1, 9) if m.kv_heads % tp == m.heads % tp == m.mlp % tp == 0)
    assert widest >= 2
    for tp in (1, widest):
        for seq_len in (tp, m.context // tp * tp):
            check(m, MeshShape(dp=8, tp=tp), seq_len)
    with pytest.raises(ValueError, match=r"longer than model\.context"):
        check(m, MeshShape(), m.context + 1)


def test_a_mesh_that_does_not_fit_a_preset_is_refused_with_one_that_does():
    for name, tp, near in [
        ("gpt2-1.5b", 2, 1),
        ("gpt2-1.5b", 4, 5),
        ("qwen2.5-7b", 8, 7),
        ("llama3-8b", 3, 2),
    ]:
        with pytest.raises(ValueError, match=rf"tp must divide heads; use tp={near} ") as error:
            check(preset(name), MeshShape(tp=tp), 840)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama3-8B", "llama3-8b"),
        ("lama3-70b", "llama3-70b"),
        ("llama-3.2-1b", "llama3.2-1b"),
        ("gpt2", "gpt2-124m"),
        ("GPT2-124M", "gpt2-124m"),
        ("mistral", "mistral-7b"),
        ("qwen3-06b", "qwen3-0.6b"),
        ("tny", "tiny"),
        ("", "tiny"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(typed, meant):
    with pytest.raises(ValueError) as error:
        preset(typed)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--model {typed}: unknown; did you mean ")
    assert meant in re.findall(r"[\w.-]+", message)
