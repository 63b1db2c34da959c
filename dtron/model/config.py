"""The config of a transformer: frozen, and checked once where it is made.

Sizes have the names of logical axes, so a params declaration needs only ``ModelConfig.dims()``.
Presets are in presets.py. The other settings of a run are in runtime/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dtron.layers.attention_mixer import AttentionMixer, NoPEMixer
from dtron.layers.context_parallel import Method
from dtron.layers.gated_delta_net import DeltaNetConfig, GatedDeltaNetMixer
from dtron.layers.kimi_delta import KimiDeltaMixer
from dtron.layers.lightning_indexer import IndexerConfig
from dtron.layers.mamba2 import Mamba2Config, Mamba2Mixer
from dtron.layers.mixer import Mixer, NoMixer
from dtron.layers.mla import MLAConfig, MLAMixer, NoPEMLAMixer
from dtron.layers.mlp import Activation
from dtron.layers.rope import RopeConfig
from dtron.layers.sparse_attention import SparseMLAMixer
from dtron.layers.token_order import TokenOrder
from dtron.model.check_model import check_model
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig
from dtron.tree import Leaf

# The letters of ``ModelConfig.pattern``. A program may add its own.
MIXERS: dict[str, type[Mixer]] = {
    "A": AttentionMixer,
    "M": MLAMixer,
    "I": SparseMLAMixer,
    "L": GatedDeltaNetMixer,
    "K": KimiDeltaMixer,
    "N": NoPEMixer,
    "P": NoPEMLAMixer,
    "S": Mamba2Mixer,
    "_": NoMixer,
}


@dataclass(frozen=True)
class ModelConfig(Leaf):
    """The sizes and features of the transformer: a preset, and the fields that override it."""

    kinds: ClassVar[Mapping[str, type[Mixer]]] = MIXERS

    vocab: int = 4096
    """words of the tokenizer; the embedding's rows are rounded up to vocab_multiple"""
    embed: int = 256
    """width of the residual stream"""
    layers: int = 4
    """transformer blocks"""
    pattern: str = "A"
    """mixers of the blocks, a letter each, repeated over the layers: A attention, M multi-head
    latent attention, N and P the same two without positions (NoPE), I latent attention to the keys
    that an indexer selects, L linear attention (gated delta net), K Kimi delta attention, S
    Mamba-2, _ none; with model.mla.kv_rank, A is M too, unless the pattern has an M"""
    feed_forwards: str = "F"
    """feed-forward layers of the blocks, a letter each, repeated over the layers: F as model.moe
    says, D a dense one, _ none; a block needs a mixer or a feed-forward layer"""
    heads: int = 8
    """attention heads (of queries)"""
    kv_heads: int = 4
    """heads of keys and values; fewer than heads is grouped-query attention"""
    head_dim: int = 32
    """width of one head"""
    mlp: int = 704
    """width of the feed-forward layer"""
    activation: Activation = "swiglu"
    """activation of the feed-forward layer; swiglu and geglu have a gate"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """norm of attention, the feed-forward layer and the head"""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """norms of attention and the feed-forward layer: before them, on their outputs (OLMo 2), or
    both (Gemma 2)"""
    post_norm_mixers: str = ""
    """mixers, letters of pattern, whose blocks have norms on outputs alone, whatever norm_position
    is: attention in OLMo Hybrid"""
    norm_eps: float = 1e-5
    """added to the variance"""
    positions: Literal["rotary", "learned"] = "rotary"
    """positional encoding"""
    rope: RopeConfig = field(default_factory=RopeConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    delta: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    mamba: Mamba2Config = field(default_factory=Mamba2Config)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    context: int = 2048
    """longest sequence; learned positions have this many rows"""
    qk_norm: bool = False
    """normalise every head's queries and keys"""
    qk_norm_over: Literal["head", "projection", "rotated"] = "head"
    """with qk_norm: normalise each head by itself, all heads of a token together (OLMo 2), or each
    head after its rotation, without a weight (Llama 4)"""
    qkv_bias: bool = False
    """biases on queries, keys and values"""
    bias: bool = False
    """biases on all other matrices"""
    tied: bool = False
    """the output head is the token embedding"""
    window: int | None = None
    """sliding-window attention: tokens seen back, counting itself; or the tokens of a chunk"""
    window_kind: Literal["sliding", "chunked"] = "sliding"
    """with a window: a token sees the last model.window tokens, or the earlier tokens of its chunk
    of model.window tokens (Llama 4)"""
    full_every: int = 0
    """with a window: every layer of this number has no window; 0: all layers have the window"""
    softcap: float | None = None
    """attention scores are bounded to this by tanh"""
    window_rope_theta: float | None = None
    """base of the rotary frequencies in layers with a window, without scaling; None: model.rope"""
    attention_scale: float | None = None
    """factor on attention scores; None: 1 / sqrt(head_dim)"""
    attention_temperature: float = 0.0
    """attention without positions, N: queries are multiplied by 1 + this
    * log(1 + floor((position + 1) / attention_temperature_floor)); 0: no factor (Llama 4)"""
    attention_temperature_floor: int = 8192
    """tokens after which this factor grows"""
    embedding_scale: float = 1.0
    """factor on the embedding of tokens"""
    residual_scale: float = 1.0
    """factor on what attention and the feed-forward layer add to the residual stream"""
    logit_scale: float = 1.0
    """factor on the logits, before final_softcap"""
    final_softcap: float | None = None
    """logits are bounded to this by tanh"""
    attention_gate: bool = False
    """attention's outputs are multiplied by a learned sigmoid of the layer's input (Qwen3-Next)"""
    sinks: bool = False
    """each head has a learned score that attends to nothing"""
    z_loss: float = 0.0
    """weight of z-loss, logsumexp squared per token"""
    init_std: float = 0.02
    """standard deviation of initial matrices"""
    mup_base_width: int = 0
    """muP: the embed of the model whose hyperparameters this model has; 0: the standard
    parametrization"""
    mup_base_head_dim: int = 0
    """muP: the head_dim of that model (with latent attention nope_dim + rope_dim); 0: the same as
    this model's"""
    vocab_multiple: int = 128
    """pad the embedding's rows to a multiple, for the speed of its matmul; padded logits are
    masked"""
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def mup(self) -> bool:
        """Whether the model has the maximal update parametrization (mup.py)."""
        return self.mup_base_width > 0

    @property
    def width(self) -> float:
        """The width as a multiple of muP's base width; 1 in the standard parametrization."""
        return self.embed / self.mup_base_width if self.mup else 1.0

    @property
    def latent(self) -> bool:
        """Whether the model has multi-head latent attention, which ignores kv_heads and
        head_dim."""
        return self.mla.kv_rank > 0

    def letter(self, i: int) -> str:
        """Return the letter of block i. The blocks of multi-token prediction come last."""
        letter = self.pattern[i % len(self.pattern)]
        only_latent = self.latent and "M" not in self.pattern
        return "M" if letter == "A" and only_latent else letter

    def feed_forward(self, i: int) -> str:
        """Return the letter of block i's feed-forward layer."""
        return self.feed_forwards[i % len(self.feed_forwards)]

    def sparse(self, i: int) -> bool:
        """Whether block i has experts."""
        c = self.moe
        return self.feed_forward(i) == "F" and c.experts > 0 and i >= c.dense_layers

    def dense(self, i: int) -> bool:
        """Whether block i has a dense feed-forward layer."""
        return self.feed_forward(i) in "FD" and not self.sparse(i)

    @property
    def blocks(self) -> range:
        """The indices of all blocks. The blocks of multi-token prediction come last."""
        return range(self.layers + self.mtp.depth)

    def mixer(self, letter: str) -> Mixer:
        """Return the mixer of a letter of ``pattern``."""
        return self.kinds[letter](self)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers of the model's blocks, each kind once."""
        letters = dict.fromkeys(map(self.letter, self.blocks))
        return tuple(self.mixer(letter) for letter in letters)

    def token_order(self, method: Method) -> TokenOrder:
        """Return the token order over cp that all mixers support. If there are several, or if there
        is no such order, return the first mixer's preferred order among them."""
        first, *others = [mixer.orders(method) for mixer in self.mixers]
        common = (order for order in first if all(order in orders for orders in others))
        return next(common, first[0])

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    def dims(self) -> dict[str, Any]:
        """Return the values of the names in declarations: sizes by logical axis, and the ``when``
        conditions."""
        return {
            **{
                name: getattr(self, name)
                for name in ("embed", "layers", "heads", "kv_heads", "head_dim", "mlp")
            },
            "vocab": self.padded_vocab,
            "positions": self.context,
            "init_std": self.init_std,
            "width": self.width,
            "gated": self.activation in ("swiglu", "geglu"),
            "layernorm": self.norm == "layernorm",
            "learned_positions": self.positions == "learned",
            "untied": not self.tied,
            "qk_norm": self.qk_norm and self.qk_norm_over == "head",
            "qk_heads_norm": self.qk_norm and self.qk_norm_over == "projection",
            **{
                name: getattr(self, name)
                for name in ("qkv_bias", "bias", "sinks", "attention_gate")
            },
            **self._expert_dims(),
            "blocks": [self._block(i) for i in range(self.layers)],
            "mtp_depth": self.mtp.depth,
            "mtp": [self._block(self.layers + k) for k in range(self.mtp.depth)],
        }

    def _expert_dims(self) -> dict[str, Any]:
        c = self.moe
        return {
            "experts": c.experts,
            "expert_embed": self.embed,
            "expert_mlp": c.mlp,
            "expert_bias": c.bias,
            "router_bias": c.router_bias,
            "balance_bias": c.bias_rate > 0,
            "shared_mlp": c.shared,
            "shared_expert": c.shared > 0,
            "shared_gate": c.shared_gate,
        }

    def _block(self, i: int) -> dict[str, Any]:
        """Return the names that differ from block to block, for block i."""
        sparse, dense = self.sparse(i), self.dense(i)
        full = self.full_every and (i + 1) % self.full_every == 0
        letter = self.letter(i)
        position = "post" if letter in self.post_norm_mixers else self.norm_position
        pre, post = position != "post", position != "pre"
        mixer = self.mixer(letter)
        return {
            "letter": letter,
            "mixer": (mixer.params, mixer.dims()),
            "mixes": mixer.present,
            "sparse": sparse,
            "dense": dense,
            "pre_norm_1": pre and mixer.present,
            "post_norm_1": post and mixer.present,
            "pre_norm_2": pre and (sparse or dense),
            "post_norm_2": post and (sparse or dense),
            "window": None if full else self.window,
        }
