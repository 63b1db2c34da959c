"""Checks that the loss fits the model, the data and the mesh. They run once, before anything is
started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.hf.config import read_config
from dtron.model.config import ModelConfig
from dtron.model.head import loss_options
from dtron.runtime.config import RunConfig
from dtron.runtime.validate import check
from dtron.training.reference import uses_frozen_base


def check_loss(config: RunConfig, shape: MeshShape) -> None:
    """Raise UserError for a loss that cannot be trained with this model, data and mesh."""
    _check_data(config)
    _check_model(config)
    objective = config.loss.objective
    objective.check(loss_options(config.model), config.model.padded_vocab, shape.tp)
    check_second_model(config, shape)


def check_second_model(config: RunConfig, shape: MeshShape) -> None:
    """Raise UserError for a second model that is missing, or cannot be on this mesh."""
    loss, objective = config.loss, config.loss.objective
    if objective.requires_folder and not loss.folder:
        raise UserError(
            f"--loss.name {loss.name}: learns from a second model; give its folder by "
            f"--loss.{objective.second_model}"
        )
    if uses_frozen_base(config) and config.lora.trained:
        raise UserError(
            f"--lora.trained {config.lora.trained} with --loss.name {loss.name}: the model without "
            "its updates is then not the model before training; give --loss.reference FOLDER, or "
            "leave --lora.trained out"
        )
    if loss.folder:
        second = second_config(config)
        try:
            check(second, shape, config.data.seq_len, config.cp_method, config.zigzags)
        except UserError as error:
            raise UserError(f"{_flag(config)}: {error}") from error


def second_config(config: RunConfig) -> ModelConfig:
    """Return the config of the second model. Raises UserError if its vocabulary is not the
    model's."""
    if not config.loss.folder:
        return config.model
    _, second = read_config(Path(config.loss.folder))
    if second.vocab != config.model.vocab:
        raise UserError(
            f"{_flag(config)}: has {second.vocab} words, and the model has {config.model.vocab}; "
            "both must have one tokenizer: give another folder"
        )
    return replace(second, vocab_multiple=config.model.vocab_multiple)


def _flag(config: RunConfig) -> str:
    return f"--loss.{config.loss.objective.second_model} {config.loss.folder}"


def _check_data(config: RunConfig) -> None:
    pairs, name = config.data.kind == "preference", config.loss.name
    if config.loss.objective.sequences and not pairs:
        raise UserError(
            f"--loss.name {name}: is a loss of pairs of answers; give --data.kind preference and a "
            "file with chosen and rejected answers as --data.path"
        )
    if pairs and not config.loss.objective.sequences:
        raise UserError(
            f"--data.kind preference with --loss.name {name}: this loss would learn the rejected "
            "answers too; use --loss.name dpo"
        )


def _check_model(config: RunConfig) -> None:
    m, loss = config.model, config.loss
    extras = {
        "--model.z-loss": m.z_loss,
        **({"--model.mtp.depth": m.mtp.depth} if loss.objective.sequences else {}),
        **({"--model.moe.aux-loss": m.moe.aux_loss} if loss.objective.sequences else {}),
        **({"--model.moe.z-loss": m.moe.z_loss} if loss.objective.sequences else {}),
    }
    for flag, value in extras.items():
        if value and loss.name != "cross_entropy":
            raise UserError(
                f"{flag} {value}: is a part of the loss of each token, and --loss.name {loss.name} "
                f"has no such part; use {flag} 0"
            )
