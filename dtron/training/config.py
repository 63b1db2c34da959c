"""The config of a training step: the model, the mesh and the options of the computation.
runtime/config.py adds the config of a run: data, steps, checkpoints and logs.

A ``RunPlan`` is a config resolved on one machine and checked once: device, dtypes, microbatches,
and whether the step is compiled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.fp8.recipe import MIN_WEIGHTS
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.losses.config import LossConfig
from dtron.model.compute_config import ComputeConfig, Fp8
from dtron.model.config import ModelConfig
from dtron.model.lora import LoraConfig, with_lora
from dtron.model.transformer import Transformer, declare_model
from dtron.moe.dispatch import Dispatch
from dtron.rules import RULES, place, whole
from dtron.training.optim_config import OptimConfig
from dtron.tree import flat

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is split into pipeline stages."""

    schedule: Schedule = "1f1b"
    """order of forwards and backwards, for pp over 1; python -m dtron.schedules compare shows the
    schedules"""
    stages_per_rank: int = 2
    """interleaved: number of stages on each rank"""
    layers: str = ""
    """number of blocks in each stage, as 7,9; empty: as even as FLOPs allow"""

    def __post_init__(self) -> None:
        if self.stages_per_rank < 1:
            raise UserError(
                f"pipeline.stages_per_rank={self.stages_per_rank}: a rank has at least 1 stage; "
                "raise it"
            )
        if not all(part.strip().isdigit() for part in filter(None, self.layers.split(","))):
            raise UserError(
                f"pipeline.layers={self.layers!r}: must be numbers of blocks, as in 7,9; change it"
            )

    @property
    def layer_counts(self) -> tuple[int, ...]:
        return tuple(int(part) for part in filter(None, self.layers.split(",")))


@dataclass(frozen=True)
class StepConfig:
    """One step of training, on any mesh."""

    mesh: str = ""
    """sizes of the mesh axes, as dp=2,tp=2 (axes pp, dp_replicate, dp, cp, tp, and ep, etp for
    experts); a dp left out takes the remaining ranks"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. Sharded over dp and cp are: 0 nothing, 1 optimizer state, 2 also gradients, 3
    also weights in use"""
    batch: int | str = 16
    """sequences per step, over all ranks; a ramp as '64:0, 256:2B, 512:10B': each size, and from
    which step (1000) or number of tokens (K, M, B) on"""
    micro_batch: int | None = None
    """sequences per rank and microbatch; None: all of a rank's share, or with pp a part that fills
    the pipeline; with a ramp, one number that divides all sizes"""
    zero3_gather: Literal["step", "microbatch"] = "step"
    """zero 3 with pp: weights are all-gathered once a step (and kept), or in every block and
    microbatch"""
    recompute: str = "none"
    """activation policy, to save memory: none, selective, full, budget (compiled only), which keeps
    the share of recompute_budget, or offload, which moves activations to the host"""
    recompute_budget: float | None = None
    """with recompute budget: the share of activations to keep, as 0.5; with offload: the share of
    blocks that stay on the device, 0 by default"""
    attention_kernel: AttentionPath = "auto"
    """kernels of attention; auto: sdpa where the mask is plain causal, flex on a GPU elsewhere"""
    cp_method: Method = "ring"
    """attention over cp. allgather: keys and values are all-gathered; ring: keys and values are
    exchanged in a ring; ulysses: heads are exchanged for parts of sequences"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: a rank has an early and a late part of each sequence, so that all ranks have the
    same work; auto: off for ulysses, where all ranks have the same work anyway"""
    fp8: Fp8 = "none"
    """recipe of the blocks' matmuls in FP8: one scale per tensor, per row or per block;
    rowwise_with_gw_hp: the weight's gradient in high precision"""
    fp8_first_last: bool = False
    """FP8 in the first and the last block too; otherwise these two stay in high precision"""
    moe_dispatch: Dispatch = "auto"
    """how tokens reach experts on other ranks. alltoall: all-to-alls of exactly the routed rows;
    static: all-to-alls of a fixed number of rows; allgather: every rank gets all tokens of its
    group; auto: allgather where compiled, else alltoall"""
    fp8_min_weights: int = MIN_WEIGHTS
    """smallest number of weights of a matmul, on one rank, for which FP8 is worth its casts;
    smaller matmuls stay in high precision"""
    fp8_gather: bool = False
    """with --zero 3: weights for FP8 matmuls are all-gathered in 8 bits, which is half the bytes of
    bfloat16"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the units of stages and the optimizer, once, in half a minute or so; auto: on
    GPUs"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """record a compiled step as one CUDA graph, which the host launches in one call; auto: on
    GPUs"""
    copy_engines: Literal["auto", "off"] = "auto"
    """auto: GPUs of one host copy the messages of a pipeline, and with --zero 3 weights and
    gradients, to each other's memory, which takes no SMs from matmuls; off: NCCL sends all of
    them"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which gradients are accumulated and reduced; float64 where weights are float64"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def declare(self) -> Transformer:
        """Declare the weights of the model, with LoRA's updates."""
        return with_lora(declare_model(self.model), self.lora)

    @property
    def how(self) -> ComputeConfig:
        return ComputeConfig(
            self.recompute,
            self.recompute_budget,
            self.attention_kernel,
            self.fp8,
            self.fp8_first_last,
            self.fp8_min_weights,
            self.fp8_gather,
            self.cp_method,
            self.moe_dispatch,
            self.optim.qk_clip > 0,
        )

    @property
    def zigzags(self) -> bool:
        """Whether the tokens of a sequence are in zig-zag order over cp."""
        auto = self.zigzag == "auto" and self.model.token_order(self.cp_method) == "zigzag"
        return auto or self.zigzag == "on"

    def gathers_each(self, shape: MeshShape) -> bool:
        """Whether ZeRO-3 unshards weights in every microbatch, and not once a step."""
        return self.zero == 3 and (shape.pp == 1 or self.zero3_gather == "microbatch")

    def splits(self, shape: MeshShape) -> bool:
        """Whether a backward can run in two halves. It cannot where blocks all-gather weights,
        because these blocks are recomputed."""
        axes = tuple(shape.atoms)
        sharded = any(
            place(RULES, axes, *w.axes) != place(whole(RULES), axes, *w.axes)
            for w in flat(self.declare())
        )
        return not (self.gathers_each(shape) and sharded)


@dataclass(frozen=True)
class RunPlan:
    """A config resolved on this machine, and checked."""

    shape: MeshShape
    device: str
    compute: torch.dtype
    master: torch.dtype
    counts: tuple[int, ...]
    """microbatches per step, for each size of the batch ramp"""
    rows: int
    """sequences in each microbatch, over all ranks"""
    gather_each: bool
    """a stage all-gathers its weights itself, in every microbatch, as ZeRO-3 does"""
    splits: bool
    """a backward can run in two halves"""
    compile: bool
    """stages and the optimizer are compiled"""
    cuda_graph: bool
    """a step is recorded once and replayed"""

    @classmethod
    def eager(
        cls,
        config: StepConfig,
        shape: MeshShape,
        microbatches: tuple[int, int],
        master: torch.dtype,
        compute: torch.dtype,
    ) -> RunPlan:
        """Return the plan of a step that is not compiled, on CPU ranks, for proofs and tests.

        ``microbatches``: their number, and the sequences in each over all ranks."""
        count, rows = microbatches
        each = config.gathers_each(shape)
        splits = config.splits(shape)
        return cls(shape, "cpu", compute, master, (count,), rows, each, splits, False, False)

    @property
    def count(self) -> int:
        """Microbatches of the first step of a run."""
        return self.counts[0]

    @property
    def main(self) -> bool:
        return int(os.environ.get("RANK", 0)) == 0
