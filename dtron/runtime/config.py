"""What a run is: frozen dataclasses, one field per choice, checked once where they are made.

A field is a flag (``--optim.lr 3e-4``); see runtime/cli.py. The model's own are in model/config.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dtron.data.config import DataConfig
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.renamed import dotted
from dtron.training.config import PipelineConfig, Schedule, StepConfig
from dtron.training.optim_config import OptimConfig

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "PipelineConfig",
    "RunConfig",
    "Schedule",
    "identity_of",
]


@dataclass(frozen=True)
class RunConfig(StepConfig):
    """Train a transformer on any device mesh, with the same result on every mesh."""

    steps: int = 100
    """optimizer steps of the whole run"""
    seed: int = 0
    """of weights and data order"""
    run_dir: str = "runs/latest"
    """where metrics, the resolved config and checkpoints go"""
    init_from: str | None = None
    """begin with the weights, and the model, of a Hugging Face folder (config.json and
    safetensors)"""
    resume: bool = False
    """go on from the newest checkpoint in run_dir; mesh, zero and micro_batch may differ"""
    save_every: int = 0
    """steps between checkpoints, which are written while training goes on; 0: none but where a
    signal stops the run"""
    keep: int = 0
    """how many of the newest checkpoints stay; 0: all"""
    keep_every: int = 0
    """checkpoints of steps that this divides stay too"""
    max_nonfinite_steps: int = 10
    """steps in a row whose loss or gradient is not finite, and which are skipped, before the run
    stops"""
    simulate: bool = False
    """run all ranks of the mesh in this one process, on the CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of computation; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32 (or
    float64)"""
    log_every: int = 10
    """steps between progress lines; metrics.jsonl has every step"""
    eval_every: int = 50
    """steps between measurements of the validation loss; 0: only at the end"""
    sample_tokens: int = 60
    """tokens of text to generate at the end; 0: none"""
    tensorboard: bool = False
    """also write TensorBoard events to run_dir"""
    profile: bool = False
    """record one step, the fifth or the last: a trace of each process in run_dir, and where its
    time went"""
    timeout_seconds: int = 600
    """seconds after which a rank that does not answer counts as dead"""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for name, low in (
            ("seed", 0),
            ("steps", 1),
            ("batch", 1),
            ("save_every", 0),
            ("keep", 0),
            ("keep_every", 0),
            ("max_nonfinite_steps", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("sample_tokens", 0),
            ("timeout_seconds", 1),
        ):
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} {getattr(self, name)}: must be at least {low}; use --{flag} {low}"
                )
        _ = self.how  # refuses what cannot be

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation loss is measured after this step."""
        return _due(self.eval_every, step) or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step."""
        last = self.save_every > 0 and step == self.steps
        return _due(self.save_every, step) or last


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def identity_of(config: RunConfig, text: str) -> dict[str, Any]:
    """What must be the same when a run goes on, by flag; ``text`` is a digest of the tokens."""
    same = {
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "text": text,
        "optim.name": config.optim.name,
    }
    return dotted(asdict(config.model), "model.") | same
