"""What a run is: frozen dataclasses, one field per choice, checked once where they are made.

A field is a flag (``--optim.lr 3e-4``); see runtime/cli.py. The model's own are in model/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dtron.bounds import from_to, under
from dtron.errors import UserError
from dtron.fp8.recipe import SMALLEST
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.compute_config import Fp8, How
from dtron.model.config import ModelConfig
from dtron.moe.dispatch import Dispatch

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]


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
        from_to(self, "optim", {"min_lr": (0, 1), "decay": (0, 1)})
        under(self, "optim", {"beta1": 1, "beta2": 1})
        under(self, "optim", {name: inf for name in ("lr", "warmup", "eps", "weight_decay", "clip")})
        if self.eps == 0:
            raise UserError("optim.eps=0: a weight that never had a gradient would be 0/0; use 1e-8")


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
            raise UserError(f"data.sequence={self.sequence}: a sample has at least 1 token; raise it")
        if not 0 < self.validation < 1:
            raise UserError(f"data.validation={self.validation}: a share between 0 and 1; change it")
        if self.samples is not None and self.samples < 1:
            raise UserError(f"data.samples={self.samples}: must be at least 1; raise it, or leave it out")
        if self.streaming and self.fitted:
            name = "--data.chat" if self.chat else "--data.packing best-fit"
            raise UserError(f"--data.streaming {name}: all lengths must be known first; drop one of the two")

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
            raise UserError(f"pipeline.virtual={self.virtual}: a rank has at least 1 stage; raise it")
        if not all(part.strip().isdigit() for part in filter(None, self.split.split(","))):
            raise UserError(f"pipeline.split={self.split!r}: must be numbers of blocks, as in 7,9; change it")

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
    """ZeRO stage, what is sharded over dp and cp: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    weights in use"""
    steps: int = 100
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
    fp8_gather: bool = False
    """with --zero 3: weights for products in FP8 are gathered in 8 bits, which is half the traffic of
    bfloat16"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile stages and the optimizer, once, in a minute or so; auto: on GPUs"""
    graph: Literal["auto", "on", "off"] = "auto"
    """record a compiled step as one CUDA graph, which the host launches at once; auto: on GPUs, without pp"""
    copy_engines: Literal["auto", "off"] = "auto"
    """auto: with --zero 3, GPUs of one host copy weights and gradients from each other's memory, which takes
    no processors from matrix products; off: NCCL sends them"""
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
                raise UserError(f"--{flag} {getattr(self, name)}: must be at least {low}; use --{flag} {low}")
        _ = self.how  # refuses what cannot be

    @property
    def how(self) -> How:
        return How(
            self.recompute, self.attention, self.fp8, self.fp8_ends, self.fp8_smallest, self.fp8_gather,
            self.cp, self.dispatch,
        )  # fmt: skip

    @property
    def zigzags(self) -> bool:
        return self.zigzag == "on" or (self.zigzag == "auto" and self.cp != "ulysses")
