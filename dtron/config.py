"""What a run is: frozen dataclasses, one field per choice, checked once where they are made.

A field is a flag (``--optim.lr 3e-4``); see cli.py. Presets are in presets.py. Sizes use the names of the
logical axes, so that ``ModelConfig.dims()`` is all that a params declaration needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dtron.fp8.recipe import SMALLEST
from dtron.how import Fp8, How
from dtron.layers.context import Method
from dtron.layers.cores import AttentionPath
from dtron.layers.mla import Latent
from dtron.layers.mlp import Activation
from dtron.layers.rope import Rope
from dtron.moe.config import MoE
from dtron.moe.dispatch import Dispatch
from dtron.mtp import Ahead

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer: a preset, and what overrides it."""

    vocab: int = 4096
    """words of the tokenizer; the embedding has this rounded up to vocab_multiple"""
    embed: int = 256
    """width of the residual stream"""
    layers: int = 4
    """transformer blocks"""
    heads: int = 8
    """attention heads (of queries)"""
    kv_heads: int = 4
    """heads of keys and values; fewer than heads is grouped-query attention"""
    head_dim: int = 32
    """width of one head"""
    mlp: int = 704
    """width of the feed-forward layer"""
    activation: Activation = "swiglu"
    """of the feed-forward layer; swiglu and geglu have a gate"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """before attention, the feed-forward layer and the head"""
    norm_eps: float = 1e-5
    """added to the variance"""
    positions: Literal["rotary", "learned"] = "rotary"
    """how attention knows where a token is"""
    rope: Rope = field(default_factory=Rope)
    mla: Latent = field(default_factory=Latent)
    mtp: Ahead = field(default_factory=Ahead)
    context: int = 2048
    """longest sequence; learned positions have this many rows"""
    qk_norm: bool = False
    """normalise every head's queries and keys"""
    qkv_bias: bool = False
    """biases on queries, keys and values"""
    bias: bool = False
    """biases on all other matrices"""
    tied: bool = False
    """the output head is the token embedding"""
    window: int | None = None
    """sliding-window attention: tokens seen back, counting itself"""
    full_every: int = 0
    """with a window: every layer of this number has none, and sees all; 0: all layers have it"""
    softcap: float | None = None
    """attention scores are bounded to this by tanh"""
    sinks: bool = False
    """each head has a learned score that attends to nothing"""
    z_loss: float = 0.0
    """weight of z-loss, logsumexp squared per token"""
    init_std: float = 0.02
    """standard deviation of initial matrices"""
    vocab_multiple: int = 128
    """pad the embedding's rows to a multiple, for the speed of its matrix product; padded logits are
    masked"""
    moe: MoE = field(default_factory=MoE)

    def __post_init__(self) -> None:
        for name in (
            "vocab",
            "embed",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "mlp",
            "context",
            "vocab_multiple",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: a size is at least 1; raise it")
        if self.latent:
            self._check_latent()
        elif self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads}, model.kv_heads={self.kv_heads}: kv_heads must divide heads; "
                f"use --model.kv-heads {nearest_divisor(self.heads, self.kv_heads)}"
            )
        if self.positions == "rotary" and not self.latent and self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: rotary positions turn pairs; make it even")
        _under(self, "model", {name: float("inf") for name in ("init_std", "z_loss", "norm_eps")})
        for name in ("window", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(
                    f"model.{name}={getattr(self, name)}: must be positive; or None to turn it off"
                )
        if self.full_every < 0:
            raise ValueError(f"model.full_every={self.full_every}: a number of layers; use 0 for none")
        if self.moe.experts and self.moe.dense_layers >= self.layers:
            raise ValueError(
                f"model.moe.dense_layers={self.moe.dense_layers} of model.layers={self.layers}: no layer "
                "would have experts; use fewer, or --model.moe.experts 0"
            )

    def _check_latent(self) -> None:
        others = {"qk_norm": False, "qkv_bias": False, "bias": False, "sinks": False, "positions": "rotary"}
        for name, only in others.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} with model.mla.kv_rank={self.mla.kv_rank}: latent "
                    f"attention has {only} alone; leave {name} out, or use --model.mla.kv-rank 0"
                )

    @property
    def latent(self) -> bool:
        """Whether attention is multi-head latent attention; then kv_heads and head_dim mean nothing."""
        return self.mla.kv_rank > 0

    @property
    def head_dims(self) -> tuple[int, int]:
        """Widths of a head's queries and keys, and of its values."""
        return (self.mla.qk_dim, self.mla.v_dim) if self.latent else (self.head_dim, self.head_dim)

    @property
    def rotary_dim(self) -> int:
        return self.mla.rope_dim if self.latent else self.head_dim

    @property
    def score_scale(self) -> float | None:
        """What attention scores are multiplied by; None: 1 / sqrt(head_dim)."""
        warm = self.rope.temperature if self.positions == "rotary" else 1.0
        return None if warm == 1 else warm / self.head_dims[0] ** 0.5

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    def dims(self) -> dict[str, Any]:
        """What declarations look names up in: sizes by logical axis, and the ``when`` conditions."""
        return {
            **{
                name: getattr(self, name)
                for name in ("embed", "layers", "heads", "kv_heads", "head_dim", "mlp")
            },
            "vocab": self.padded_vocab,
            "positions": self.context,
            "init_std": self.init_std,
            "gated": self.activation in ("swiglu", "geglu"),
            "layernorm": self.norm == "layernorm",
            "learned_positions": self.positions == "learned",
            "untied": not self.tied,
            **{name: getattr(self, name) for name in ("qk_norm", "qkv_bias", "bias", "sinks")},
            "plain_attention": not self.latent,
            **self.mla.dims(),
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
        """What layer i has of its own."""
        sparse = self.moe.experts > 0 and i >= self.moe.dense_layers
        full = self.full_every and (i + 1) % self.full_every == 0
        return {"sparse": sparse, "dense": not sparse, "window": None if full else self.window}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-3
    """learning rate after warm-up"""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """after warm-up: constant; down to min_lr by the last step, linearly or as a cosine; wsd stays, then
    decays"""
    warmup: int = 20
    """steps from 0 to lr"""
    min_lr: float = 0.1
    """the last step's rate, as a share of lr"""
    decay: float = 0.2
    """wsd: the share of steps that decay at the end"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the second moment's root"""
    weight_decay: float = 0.1
    """of matrices; norms and biases have none"""
    clip: float = 1.0
    """largest global gradient norm; 0: do not clip"""

    def __post_init__(self) -> None:
        inf = float("inf")
        _from_to(self, "optim", {"min_lr": (0, 1), "decay": (0, 1)})
        _under(self, "optim", {"beta1": 1, "beta2": 1})
        _under(self, "optim", {name: inf for name in ("lr", "warmup", "eps", "weight_decay", "clip")})
        if self.eps == 0:
            raise ValueError("optim.eps=0: a weight that never had a gradient would be 0/0; use 1e-8")


def _from_to(config: Any, prefix: str, limits: dict[str, tuple[float, float]]) -> None:
    for name, (low, high) in limits.items():
        if not low <= getattr(config, name) <= high:  # so that NaN is refused
            raise ValueError(
                f"{prefix}.{name}={getattr(config, name)}: must be from {low} to {high}; change it"
            )


def _under(config: Any, prefix: str, limits: dict[str, float]) -> None:
    for name, high in limits.items():
        if not 0 <= getattr(config, name) < high:
            raise ValueError(
                f"{prefix}.{name}={getattr(config, name)}: must be from 0 to under {high}; change it"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    path: str | None = None
    """a .txt, .jsonl, .parquet or .arrow file, a folder of them, or the name of a .bin/.idx pair; several
    with weights as '0.7 web.jsonl, 0.3 code'; None: the source of Python's standard library"""
    tokenizer: str | None = None
    """a tokenizer.json, or a folder with one; None: that beside a .bin/.idx pair, or else a byte-level BPE of
    model.vocab words, trained on the text and cached"""
    column: str | None = None
    """the field or column that holds the text; None: text, or messages with chat"""
    sequence: int = 256
    """tokens per sample"""
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    """cut one long line of documents, or put whole documents into rows, masked from each other"""
    chat: bool = False
    """rows are conversations, packed by best fit; only what the assistant says is learned"""
    streaming: bool = False
    """tokenise text while training, in the order of the files, rather than before"""
    document_mask: bool = False
    """tokens attend within their document only"""
    document_positions: bool | None = None
    """positions restart in each document; None: where tokens attend within it only"""
    validation: float = 0.02
    """share of the text held out"""
    split: str | None = None
    """of a .bin/.idx pair: the documents' shares for training, validation and test, as 969,30,1; None: by
    validation"""
    samples: int | None = None
    """of a .bin/.idx pair: how many samples the order is made for; None: steps times batch"""

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise ValueError(f"data.sequence={self.sequence}: a sample has at least 1 token; raise it")
        if not 0 < self.validation < 1:
            raise ValueError(f"data.validation={self.validation}: a share between 0 and 1; change it")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"data.samples={self.samples}: must be at least 1; raise it, or leave it out")
        if self.streaming and self.fitted:
            name = "--data.chat" if self.chat else "--data.packing best-fit"
            raise ValueError(f"--data.streaming {name}: all lengths must be known first; drop one of the two")

    @property
    def fitted(self) -> bool:
        """Whether whole documents are packed by best fit."""
        return self.chat or self.packing == "best-fit"

    @property
    def masked(self) -> bool:
        """Whether tokens attend within their document only."""
        return self.document_mask or self.fitted

    @property
    def restarts(self) -> bool:
        """Whether positions restart in each document."""
        return self.masked if self.document_positions is None else self.document_positions

    @property
    def marked(self) -> bool:
        """Whether it matters where documents are."""
        return self.masked or self.restarts


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is cut into pipeline stages."""

    virtual: int = 2
    """interleaved: stages on each rank"""
    split: str = ""
    """blocks of each stage, as 7,9; empty: as even as FLOPs allow"""
    gather: Literal["step", "microbatch"] = "step"
    """zero 3 with pp: when weights are gathered, once a step (and kept) or in every block and microbatch"""

    def __post_init__(self) -> None:
        if self.virtual < 1:
            raise ValueError(f"pipeline.virtual={self.virtual}: a rank has at least 1 stage; raise it")
        if not all(part.strip().isdigit() for part in filter(None, self.split.split(","))):
            raise ValueError(
                f"pipeline.split={self.split!r}: must be numbers of blocks, as in 7,9; change it"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in filter(None, self.split.split(",")))


@dataclass(frozen=True)
class RunConfig:
    """Train a transformer on any device mesh, with the same result on every mesh."""

    mesh: str = ""
    """how the ranks are arranged, as dp=2,tp=2 (axes pp, dp_replicate, dp, cp, tp, and ep, etp for experts);
    a dp left out takes the rest"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage, what is sharded over dp: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights in
    use"""
    steps: int = 150
    """optimizer steps of the whole run"""
    batch: int = 16
    """sequences per step, over all ranks"""
    micro_batch: int | None = None
    """sequences per rank at once; None: all of a rank's share, or with pp a part that fills the pipeline"""
    schedule: Schedule = "1f1b"
    """pipeline schedule, for pp over 1; python -m dtron.schedules compare shows them"""
    seed: int = 0
    """of weights and data order"""
    run_dir: str = "runs/latest"
    """where metrics, the resolved config and checkpoints go"""
    init_from: str | None = None
    """begin with the weights, and the model, of a Hugging Face folder (config.json and safetensors)"""
    resume: bool = False
    """go on from the newest checkpoint in run_dir; mesh, zero and micro_batch may differ"""
    save_every: int = 0
    """steps between checkpoints, which are written while training goes on; 0: none but where a signal stops
    the run"""
    keep: int = 0
    """how many of the newest checkpoints stay; 0: all"""
    keep_every: int = 0
    """checkpoints of steps that this divides stay too"""
    max_skips: int = 10
    """steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops"""
    simulate: bool = False
    """run all ranks of the mesh in this one process, on the CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of computation; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32 (or float64)"""
    recompute: str = "none"
    """activations computed again in backward to save memory: none, selective, full; or, compiled, budget=0.5:
    keep half of what none keeps"""
    attention: AttentionPath = "auto"
    """kernels of attention; auto: sdpa where the mask is plain causal, flex on a GPU elsewhere"""
    cp: Method = "ring"
    """attention over cp: keys and values gathered, or exchanged in a ring, or heads for parts of sequences"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: a rank has an early and a late part of each sequence, so that all have the same work; auto:
    not for ulysses, where they have it anyway"""
    fp8: Fp8 = "none"
    """matrix products of blocks in FP8, with one scale per tensor or per row; the last with the weight's
    gradient in high precision"""
    fp8_ends: bool = False
    """in the first and the last block too, which are kept in high precision otherwise"""
    dispatch: Dispatch = "auto"
    """how tokens reach experts on other ranks: all-to-alls of as many rows as there are, or of a fixed number
    (static), or every rank gets all tokens of its group (allgather). auto: allgather where compiled, else
    alltoall"""
    fp8_smallest: int = SMALLEST
    """weights that a product has, on one rank, for FP8 to be worth its casts; smaller ones are left as they
    are"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile stages and the optimizer, once, in a minute or so; auto: on GPUs"""
    graph: Literal["auto", "on", "off"] = "auto"
    """record a compiled step as one CUDA graph, which the host launches at once; auto: on GPUs, without pp"""
    reduce_bf16: bool = False
    """accumulate and reduce gradients in bfloat16 instead of float32"""
    log_every: int = 10
    """steps between progress lines; metrics.jsonl has every step"""
    eval_every: int = 50
    """steps between measurements of the validation loss; 0: only at the end"""
    sample: int = 60
    """tokens of text to generate at the end; 0: none"""
    tensorboard: bool = False
    """also write TensorBoard events to run_dir"""
    profile: bool = False
    """record one step, the fifth or the last: a trace of each process in run_dir, and where its time went"""
    timeout: int = 600
    """seconds after which a rank that does not answer counts as dead"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for name, low in (
            ("seed", 0),
            ("steps", 1),
            ("batch", 1),
            ("save_every", 0),
            ("keep", 0),
            ("keep_every", 0),
            ("max_skips", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("sample", 0),
            ("timeout", 1),
        ):
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} {getattr(self, name)}: must be at least {low}; use --{flag} {low}"
                )
        _ = self.how  # refuses what cannot be

    @property
    def how(self) -> How:
        return How(
            self.recompute, self.attention, self.fp8, self.fp8_ends, self.fp8_smallest, self.cp, self.dispatch
        )

    @property
    def zigzags(self) -> bool:
        return self.zigzag == "on" or (self.zigzag == "auto" and self.cp != "ulysses")


def nearest_divisor(n: int, near: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - near), d))
