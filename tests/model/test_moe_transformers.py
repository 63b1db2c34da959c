"""Models with experts give the logits of transformers, from random weights mapped by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.rope import RopeConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import Transformer, declare_model, predict
from dtron.moe.config import MoEConfig
from dtron.params import WeightSpec
from dtron.runtime.config import ModelConfig
from dtron.tree import tree_map
from tests.helpers.hf_models import draw_weights
from tests.model.test_transformers import LLAMA_NAMES, random_rows

hf = pytest.importorskip("transformers")

ONE = Layout()
SMALL = ModelConfig(
    vocab=61,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=24,
    context=128,
    vocab_multiple=8,
    moe=MoEConfig(experts=8, top_k=3, mlp=24),
)
GPT_OSS = replace(
    SMALL,
    qkv_bias=True,
    bias=True,
    sinks=True,
    window=7,
    full_every=2,
    rope=RopeConfig(150000.0),
    moe=replace(
        SMALL.moe, score="topk_softmax", router_bias=True, activation="clamped_swiglu", bias=True
    ),
)

# dtron's config, the name and the sizes in transformers, and changes that are wrong in the subject
# of the case.
CASES = {
    "mixtral": (
        SMALL,
        "Mixtral",
        {"num_local_experts": 8, "intermediate_size": 24},
        [{"top_k": 2}],
    ),
    "qwen3-moe": (
        replace(SMALL, qk_norm=True),
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
        [{"normalize": False}],
    ),
    "qwen3-moe-unnormalised": (
        replace(SMALL, qk_norm=True, moe=replace(SMALL.moe, normalize=False)),
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": False},
        [{"normalize": True}],
    ),
    "gpt-oss": (
        GPT_OSS,
        "GptOss",
        {
            "num_local_experts": 8,
            "intermediate_size": 24,
            "sliding_window": 7,
            "rope_scaling": {"rope_type": "default", "rope_theta": 150000.0},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        [{"activation": "swiglu"}, {"score": "softmax", "normalize": False}],
    ),
}


def transformers_model(kind: str, m: ModelConfig, sizes: dict) -> torch.nn.Module:
    """Draw large weights, so that scores are far from even and clamps take effect."""
    config = getattr(hf, f"{kind}Config")(
        vocab_size=m.vocab,
        hidden_size=m.embed,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=m.context,
        rms_norm_eps=m.norm_eps,
        rope_theta=m.rope.theta,
        attn_implementation="eager",
        num_experts_per_tok=m.moe.top_k,
        **sizes,
    )
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    draw_weights(model.named_parameters(), matrices=0.3, vectors=0.5)
    return model.eval()


def mapped(model: torch.nn.Module, m: ModelConfig) -> Transformer:
    """The same weights as a dtron tree.

    The other model concatenates gate and up. In gpt-oss their columns alternate, and matrices of
    experts are [in, out] as in dtron."""
    theirs, is_gpt_oss = dict(model.named_parameters()), isinstance(model, hf.GptOssForCausalLM)
    used = set()
    router = "router" if is_gpt_oss else "gate"
    names = {
        **LLAMA_NAMES,
        "attention.b_o": "self_attn.o_proj.bias",
        "attention.sinks": "self_attn.sinks",
        "moe.router.w": f"mlp.{router}.weight",
        "moe.router.b": f"mlp.{router}.bias",
        **{f"moe.experts.w_{x}": "mlp.experts.gate_up_proj" for x in ("gate", "up")},
        **{f"moe.experts.b_{x}": "mlp.experts.gate_up_proj_bias" for x in ("gate", "up")},
        "moe.experts.w_down": "mlp.experts.down_proj",
        "moe.experts.b_down": "mlp.experts.down_proj_bias",
    }

    def convert(w: WeightSpec) -> Tensor:
        block, name = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", w.path).groups()
        source = (f"model.layers.{block}." if block else "") + names[name]
        used.add(source)
        x = theirs[source].detach()
        if x.ndim == 3 and not is_gpt_oss:
            x = x.mT
        if "gate_up" in source:
            i = name.endswith("up")
            x = x[..., i::2] if is_gpt_oss else x.chunk(2, dim=-1)[i]
        if w.axes[0] == "vocab":
            x = F.pad(x, (0, 0, 0, w.shape[0] - len(x)), value=1.0)
        elif x.ndim == 2 and "experts." not in source:
            x = x.T
        return x.reshape(w.shape)

    params = tree_map(convert, declare_model(m))
    assert used == set(theirs)
    return params


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    """The comparison notices a slightly wrong config."""
    m, kind, sizes, wrong = CASES[name]
    model, rows = transformers_model(kind, m, sizes), random_rows(1)
    with torch.no_grad():
        want = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
    params = mapped(model, m)

    def error(m: ModelConfig) -> float:
        with torch.no_grad():
            got = predict(params, make_batch(rows, ONE), m, ONE)
        return ((got - want).abs().max() / want.abs().max()).item()

    assert error(m) <= 1e-5
    for change in wrong:
        assert error(replace(m, moe=replace(m.moe, **change))) > 1e-2, change


def test_the_auxiliary_loss_is_theirs():
    """The loss is over all tokens. transformers counts each choice of a token, so its loss is top_k
    times dtron's."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from dtron.moe.router import Router, TokenInfo, route

    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(40, 32, generator=g), torch.randn(32, 8, generator=g)
    c = MoEConfig(experts=8, top_k=3, aux_loss=1.0)
    valid, rows = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.long)
    ours = route(Router(w, None, None), x, TokenInfo(valid, rows, 1), c, ONE)
    want = load_balancing_loss_func((x @ w,), 8, 3)
    assert (ours.aux / 40 * c.top_k).item() == pytest.approx(want.item(), rel=1e-5)
    assert ours.aux / 40 > 1.01  # uneven: even is 1
