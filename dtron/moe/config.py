"""The sizes of a mixture-of-experts layer and the balancing of its load: ``--model.moe.*``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dtron.bounds import nearest_divisor
from dtron.errors import UserError

Score = Literal["softmax", "topk_softmax", "sigmoid"]
ExpertActivation = Literal["swiglu", "clamped_swiglu"]
LARGEST_EXPERTS = 1 << 16
BalanceLevel = Literal["micro_batch", "sequence", "global_batch"]


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer."""

    experts: int = 0
    """experts in each layer; 0: a dense model"""
    top_k: int = 2
    """experts that each token uses"""
    mlp: int = 256
    """width of one expert"""
    dense_layers: int = 0
    """first layers that keep a dense feed-forward layer, of width model.mlp"""
    score: Score = "softmax"
    """score of an expert for a token: softmax over all experts, softmax over the top k only, or
    each expert's sigmoid"""
    normalize: bool = True
    """the scores of a token's experts are divided by their sum"""
    scale: float = 1.0
    """factor on the scores of a token's experts, applied last"""
    scores_on: Literal["outputs", "inputs"] = "outputs"
    """the scores of a token's experts multiply their outputs, or their inputs (Llama 4)"""
    groups: int = 1
    """groups of experts, all of one size"""
    group_top_k: int = 1
    """groups that each token may use"""
    router_bias: bool = False
    """the router's logits have a learned bias"""
    activation: ExpertActivation = "swiglu"
    """activation of experts; gpt-oss has clamped_swiglu"""
    bias: bool = False
    """experts have biases"""
    shared: int = 0
    """width of the expert that every token uses; 0: none"""
    shared_gate: bool = False
    """the shared expert's output is multiplied by a learned sigmoid"""
    aux_loss: float = 0.0
    """weight of the load-balancing loss, 1 per token and layer where the load is even"""
    aux_level: BalanceLevel = "micro_batch"
    """set of tokens whose load must be even: a micro-batch (of all ranks), each sequence, or the
    step so far"""
    z_loss: float = 0.0
    """weight of the router's z-loss, logsumexp squared per token and layer"""
    bias_rate: float = 0.0
    """balance without a loss: step size of a bias that affects only the choice of experts; 0: no
    bias"""
    capacity_factor: float = 0.0
    """rows of each expert as a multiple of the mean load, per rank; tokens beyond are dropped. 0:
    no token is dropped"""
    balanced: bool = False
    """for benchmarks: send the same number of tokens to every expert, whatever the scores"""

    def __post_init__(self) -> None:
        low = {
            "experts": 0,
            "top_k": 1,
            "mlp": 1,
            "dense_layers": 0,
            "groups": 1,
            "group_top_k": 1,
            "shared": 0,
        }
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UserError(
                    f"model.moe.{name}={getattr(self, name)}: must be at least {least}; raise it"
                )
        if self.experts > LARGEST_EXPERTS:
            raise UserError(
                f"model.moe.experts={self.experts}: at most {LARGEST_EXPERTS}; lower it"
            )
        for name in ("scale", "aux_loss", "z_loss", "bias_rate", "capacity_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"model.moe.{name}={getattr(self, name)}: must be from 0; change it"
                )
        if not self.experts:
            return
        if self.top_k > self.experts:
            raise UserError(
                f"model.moe.top_k={self.top_k} of model.moe.experts={self.experts}: a token cannot "
                f"use more experts than there are; use --model.moe.top-k {self.experts}"
            )
        if self.experts % self.groups:
            near = nearest_divisor(self.experts, self.groups)
            raise UserError(
                f"model.moe.experts={self.experts} in model.moe.groups={self.groups}: groups must "
                f"divide experts; use --model.moe.groups {near}"
            )
        each = self.experts // self.groups
        least = math.ceil(self.top_k / each)
        if self.groups > 1 and not least <= self.group_top_k <= self.groups:
            raise UserError(
                f"model.moe.group_top_k={self.group_top_k}: of {self.groups} groups of {each} "
                f"experts, each token needs at least {least} for its top_k={self.top_k}, and has "
                f"at most {self.groups}; use --model.moe.group-top-k {least}"
            )
        if self.shared_gate and not self.shared:
            raise UserError(
                "model.moe.shared_gate without a shared expert: use --model.moe.shared WIDTH, or "
                "drop it"
            )
