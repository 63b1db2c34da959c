"""The identity of a run: the values that a run which resumes must share with the run that saved.

They are the model, the seed, the text, the optimizer, and what is frozen. Everything else may
change between saving and resuming: the mesh, the ZeRO stage, the batch, the learning rate.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dtron.checkpoint.storage import AnyPath
from dtron.errors import UserError
from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.lightning_indexer import IndexerConfig
from dtron.layers.mamba2 import Mamba2Config
from dtron.model.lora import LoraConfig
from dtron.renamed import dotted

Identity = dict[str, Any]


def check_identity(path: AnyPath, saved: Identity, now: Identity, other_optimizer: bool) -> None:
    """Raise UserError for the first entry that differs.

    ``other_optimizer``: the name of the optimizer may differ."""
    saved = _with_unrecorded(saved)
    for name, value in now.items():
        was = saved.get(name)
        if was == value or (name == "optim.name" and other_optimizer):
            continue
        if name == "frozen weights":
            raise UserError(
                f"{path}: was trained on another model's frozen weights; give the --init-from that "
                "it was started with, or another --run-dir"
            )
        if name == "text":
            raise UserError(
                f"{path}: was trained on other text, or with another tokenizer; give the "
                "--data.path and --data.tokenizer it was started with, or another --run-dir"
            )
        stem, _, last = name.replace("_", "-").rpartition(".")
        dot = f"--{stem}." if stem else "--"
        flag = (
            f"{dot}{'' if was else 'no-'}{last}"
            if isinstance(value, bool)
            else f"{dot}{last} {was}"
        )
        raise UserError(
            f"{path}: was made with {name}={was}, this run has {value}; "
            f"use {flag}, or another --run-dir"
        )


def _with_unrecorded(saved: Identity) -> Identity:
    """Return the identity with the entries that older checkpoints lack, each with the value that
    their runs had."""
    latent = bool(saved.get("model.mla.kv_rank"))
    mixers: dict[str, Any] = {  # none had these
        "delta": DeltaNetConfig(),
        "mamba": Mamba2Config(),
        "indexer": IndexerConfig(),
    }
    values = {
        "optim.name": "adamw",
        "model.pattern": "A",
        "model.rope.attention_factor": 0.0,
        "model.mup_base_width": 0,
        "model.mup_base_head_dim": 0,
        "model.feed_forwards": "F",
        "model.attention_gate": False,
        "model.norm_position": "pre",
        "model.post_norm_mixers": "",
        "model.window_kind": "sliding",
        "model.attention_temperature": 0.0,
        "model.attention_temperature_floor": 8192,
        "model.moe.scores_on": "outputs",
        "model.qk_norm_over": "head",
        "model.rope.partial": 1.0,
        "model.embedding_scale": 1.0,
        "model.residual_scale": 1.0,
        "model.logit_scale": 1.0,
        # The norms of latents had the epsilon of the other norms.
        "model.mla.norm_eps": saved.get("model.norm_eps") if latent else 1e-6,
        **dotted(asdict(LoraConfig()), "lora."),
        "loss.name": "cross_entropy",
        **{
            f"model.{part}.{name}": value
            for part, config in mixers.items()
            for name, value in asdict(config).items()
        },
    }
    return values | saved
