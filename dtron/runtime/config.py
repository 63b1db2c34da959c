"""The config of a run: frozen dataclasses, one field per choice, checked at construction.

Every field is a flag (``--optim.lr 3e-4``); see runtime/cli.py. Nested configs stand beside their
code; model/config.py has the config of the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from dtron.data.config import DataConfig
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA
from dtron.renamed import dotted
from dtron.runtime.trackers.tracker import parse_trackers
from dtron.training.batch_ramp import BatchRamp, parse_batch
from dtron.training.config import PipelineConfig, Schedule, StepConfig
from dtron.training.lr_schedule import Progress
from dtron.training.optim_config import OptimConfig
from dtron.training.qk_clip import check_qk_clip

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
    """random seed of weights and data order"""
    run_dir: str = "runs/latest"
    """folder for metrics, the resolved config and checkpoints"""
    checkpoint_store: str | None = None
    """where checkpoints are, if not in run_dir: another folder, or a place in an object store, as
    s3://bucket/runs/a"""
    init_from: str | None = None
    """Hugging Face folder (config.json and safetensors) with the model and its initial weights"""
    resume: Literal["off", "on", "auto"] = "off"
    """on, or no value: go on from the newest checkpoint in run_dir, with the config of the run;
    flags override it. auto: begin if there is no checkpoint, else go on, and end at once if the run
    is finished; always save the last step"""
    save_every: int = 0
    """steps between checkpoints, which are written while training goes on; 0: a checkpoint only if
    a signal stops the run"""
    keep: int = 0
    """number of newest checkpoints to keep; 0: all"""
    keep_every: int = 0
    """also keep the checkpoints of steps that are multiples of this number"""
    memory_copies_every: int = 0
    """steps between two copies of the state in the memory of hosts, from which ranks that are
    started again go on; 0: none"""
    memory_copies_dir: str | None = None
    """folder of these copies on each host; not given: one in /dev/shm, by the name of run_dir"""
    max_nonfinite_steps: int = 10
    """the run stops after this many consecutive steps with a non-finite loss or gradient; such
    steps are skipped"""
    simulate: bool = False
    """run all ranks of the mesh in this one process, on the CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """compute dtype; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32 (or
    float64)"""
    log_every: int = 10
    """steps between progress lines; metrics.jsonl has every step"""
    eval_every: int = 50
    """steps between measurements of the validation loss; 0: only at the end"""
    eval_tasks: str = ""
    """tasks of lm-evaluation-harness, or files of YAML, with commas between, which are run with
    each measurement of the validation loss"""
    sample_tokens: int = 60
    """tokens of text to generate at the end; 0: none"""
    track: str = "none"
    """where metrics also go, with commas between: wandb, mlflow, tensorboard; none"""
    track_project: str = "dtron"
    """project of wandb, experiment of mlflow"""
    track_name: str = ""
    """name of the run in wandb and mlflow; empty: the name of run_dir"""
    watch_every: int = 0
    """steps between two looks at all ranks: which is slow and why, and the health of the GPUs; 0:
    never"""
    check_replicas_every: int = 0
    """steps between two checks that all ranks with the same shard of weights and optimizer state
    have the same bits; if not, the run ends. 0: only before each checkpoint, and with a warning"""
    deterministic: bool = False
    """the same run twice, on the same devices and versions, has the same bits; slower on a GPU"""
    profile: bool = False
    """record one step (the fifth or the last): write a trace of each process to run_dir, and print
    a time breakdown"""
    compile_cache: str | None = None
    """folder of compiled code, which later runs load; not given: the folder in
    TORCHINDUCTOR_CACHE_DIR, or ~/.cache/dtron/compile"""
    timeout_seconds: int = 600
    """seconds without an answer after which a rank counts as dead"""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for name, low in _SMALLEST.items():
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} {getattr(self, name)}: must be at least {low}; use --{flag} {low}"
                )
        for name, high in _LARGEST.items():
            if getattr(self, name) > high:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} {getattr(self, name)}: must be at most {high}; use --{flag} {high}"
                )
        if not self.run_dir:
            raise UserError("--run-dir '': has no name; use --run-dir runs/a")
        if not self.track_project.strip():
            raise UserError(
                f"--track-project {self.track_project!r}: has no name; use --track-project dtron"
            )
        # These raise UserError for an invalid combination.
        _ = self.how, self.ramp, self.trackers
        check_qk_clip(self.optim.qk_clip, self.model)
        self._check_lora()

    def _check_lora(self) -> None:
        if not self.lora.rank:
            given = [name for name, x in asdict(self.lora).items() if x != getattr(NO_LORA, name)]
            if given:
                flag = f"--lora.{given[0].replace('_', '-')}"
                raise UserError(f"{flag}: has no effect without updates; use --lora.rank 16 too")
        elif self.optim.qk_clip:
            raise UserError(
                f"optim.qk_clip={self.optim.qk_clip:g} with --lora.rank {self.lora.rank}: it "
                "scales query and key weights, which are frozen; use --optim.qk-clip 0"
            )
        elif self.model.mup_base_width:
            raise UserError(
                f"model.mup_base_width={self.model.mup_base_width} with --lora.rank "
                f"{self.lora.rank}: muP has no rates for updates; use --model.mup-base-width 0"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``track``."""
        return parse_trackers(self.track)

    @cached_property
    def ramp(self) -> BatchRamp:
        """The sizes of the global batch."""
        return parse_batch(self.batch, self.data.seq_len)

    def progress(self, step: int, samples: int) -> Progress:
        """Return the place of the next update in the run, after so many steps and samples. The
        warm-up of a ramped run ends with the samples of the ramp's first ``optim.warmup`` steps."""
        ramp, warmup = self.ramp, self.optim.warmup
        if not ramp.ramps:
            return Progress(step, 1, warmup, self.steps - 1)
        last = ramp.samples_after(self.steps - 1, step, samples)
        return Progress(samples, ramp.size(step, samples), ramp.samples_after(warmup), last)

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation loss is measured after this step."""
        return _due(self.eval_every, step) or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step."""
        last = (self.save_every > 0 or self.resume == "auto") and step == self.steps
        return _due(self.save_every, step) or last


_SMALLEST = {
    "seed": 0,
    "steps": 1,
    "save_every": 0,
    "keep": 0,
    "keep_every": 0,
    "memory_copies_every": 0,
    "max_nonfinite_steps": 1,
    "log_every": 1,
    "eval_every": 0,
    "watch_every": 0,
    "check_replicas_every": 0,
    "sample_tokens": 0,
    "timeout_seconds": 1,
}

_LARGEST = {"seed": 2**63 - 1, "timeout_seconds": 10**7}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def identity_of(config: RunConfig, text: str) -> dict[str, Any]:
    """Return the values, by flag, that a resumed run must share with the run that saved.

    ``text``: a digest of the tokens."""
    same = {
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "text": text,
        "optim.name": config.optim.name,
        "loss.name": config.loss.name,
    }
    lora = asdict(config.lora)
    del lora["adapter"]  # a checkpoint has the updates
    return dotted(asdict(config.model), "model.") | dotted(lora, "lora.") | same
