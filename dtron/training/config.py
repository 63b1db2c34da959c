"""What decides a training step: the model, the mesh and how they are computed. runtime/config.py
adds what a run needs around it: data, steps, checkpoints and logs.

A ``RunPlan`` is what a config means on one machine: devices, dtypes and what is compiled, checked
once.
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
from dtron.model.compute_config import ComputeConfig, Fp8
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.moe.dispatch import Dispatch
from dtron.rules import RULES, place, whole
from dtron.training.optim_config import OptimConfig
from dtron.tree import flat

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is cut into pipeline stages."""

    schedule: Schedule = "1f1b"
    """order of forwards and backwards, for pp over 1; python -m dtron.schedules compare shows
    them"""
    stages_per_rank: int = 2
    """interleaved: stages on each rank"""
    layers: str = ""
    """blocks of each stage, as 7,9; empty: as even as FLOPs allow"""

    def __post_init__(self) -> None:
        if self.stages_per_rank < 1:
            raise UserError(
                f"pipeline.stages_per_rank={self.stages_per_rank}: a rank has at least 1 stage; raise it"
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
    """how the ranks are arranged, as dp=2,tp=2 (axes pp, dp_replicate, dp, cp, tp, and ep, etp for
    experts); a dp left out takes the rest"""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage, what is sharded over dp and cp: 0 nothing, 1 optimizer state, 2 also gradients, 3
    also weights in use"""
    batch: int = 16
    """sequences per step, over all ranks"""
    micro_batch: int | None = None
    """sequences per rank at once; None: all of a rank's share, or with pp a part that fills the
    pipeline"""
    zero3_gather: Literal["step", "microbatch"] = "step"
    """zero 3 with pp: when weights are gathered, once a step (and kept) or in every block and
    microbatch"""
    recompute: str = "none"
    """activation policy, to save memory: none, selective or full, or budget (compiled only), which
    keeps the share of recompute_budget"""
    recompute_budget: float | None = None
    """with recompute budget: the share of activations to keep, as 0.5; recompute none keeps 1"""
    attention_kernel: AttentionPath = "auto"
    """kernels of attention; auto: sdpa where the mask is plain causal, flex on a GPU elsewhere"""
    cp_method: Method = "ring"
    """attention over cp: keys and values gathered, or exchanged in a ring, or heads for parts of
    sequences"""
    zigzag: Literal["auto", "on", "off"] = "auto"
    """over cp: a rank has an early and a late part of each sequence, so that all have the same
    work; auto: not for ulysses, where they have it anyway"""
    fp8: Fp8 = "none"
    """matrix products of blocks in FP8, with one scale per tensor or per row; the last with the
    weight's gradient in high precision"""
    fp8_first_last: bool = False
    """FP8 in the first and the last block too, which are kept in high precision otherwise"""
    moe_dispatch: Dispatch = "auto"
    """how tokens reach experts on other ranks: all-to-alls of as many rows as there are, or of a
    fixed number (static), or every rank gets all tokens of its group (allgather). auto: allgather
    where compiled, else alltoall"""
    fp8_min_weights: int = MIN_WEIGHTS
    """weights that a product has, on one rank, for FP8 to be worth its casts; smaller ones are left
    as they are"""
    fp8_gather: bool = False
    """with --zero 3: weights for products in FP8 are gathered in 8 bits, which is half the traffic
    of bfloat16"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile stages and the optimizer, once, in a minute or so; auto: on GPUs"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """record a compiled step as one CUDA graph, which the host launches at once; auto: on GPUs,
    without pp"""
    copy_engines: Literal["auto", "off"] = "auto"
    """auto: with --zero 3, GPUs of one host copy weights and gradients from each other's memory,
    which takes no processors from matrix products; off: NCCL sends them"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """in which gradients are accumulated and reduced; float64 where weights are float64"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

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
        """Whether a backward can run in two halves: not where blocks gather weights, because those
        blocks are recomputed."""
        axes = tuple(shape.atoms)
        sharded = any(
            place(RULES, axes, *w.axes) != place(whole(RULES), axes, *w.axes)
            for w in flat(declare_model(self.model))
        )
        return not (self.gathers_each(shape) and sharded)


@dataclass(frozen=True)
class RunPlan:
    """What a config means on this machine, checked."""

    shape: MeshShape
    device: str
    compute: torch.dtype
    master: torch.dtype
    count: int
    """microbatches per step"""
    rows: int
    """sequences in each microbatch, over all ranks"""
    gather_each: bool
    """as ZeRO-3 does: a stage gathers its weights itself, in every microbatch"""
    splits: bool
    """a backward can be made in two halves"""
    compile: bool
    cuda_graph: bool
    """a step is recorded once and replayed"""

    @classmethod
    def eager(
        cls,
        config: StepConfig,
        shape: MeshShape,
        microbatches: int,
        master: torch.dtype,
        compute: torch.dtype,
    ) -> RunPlan:
        """The plan of a step that is not compiled, on CPU ranks: what proofs and tests build."""
        rows = config.batch // microbatches
        each = config.gathers_each(shape)
        splits = config.splits(shape)
        return cls(shape, "cpu", compute, master, microbatches, rows, each, splits, False, False)

    @property
    def main(self) -> bool:
        return int(os.environ.get("RANK", 0)) == 0
