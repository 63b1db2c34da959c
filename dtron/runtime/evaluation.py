"""The validation loss of a run: the mean loss over the same held-out rows on every mesh, so that
runs can be compared. Tasks of lm-evaluation-harness, if the run has any (runtime/eval_harness.py).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from dtron.checkpoint import TrainState
from dtron.data import Data
from dtron.distributed.redistribute import full
from dtron.errors import UserError
from dtron.frozen import with_frozen
from dtron.params import unshard
from dtron.runtime.batches import split, to_host
from dtron.runtime.config import RunConfig
from dtron.runtime.generation import Sampling, generate
from dtron.runtime.scoring import Scorer
from dtron.runtime.step_log import StepLog
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.offloaded_state import on_device
from dtron.training.pipeline import Pipeline, program
from dtron.training.reference import Reference
from dtron.training.weight_average import NAME as EMA

VALIDATION_ROWS = 32


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a run. All ranks make the same calls.

    ``second``: the second model of the loss (None: it has none).
    ``tasks``: the result of ``find_tasks``; None: no tasks."""

    config: RunConfig
    plan: RunPlan
    pipe: Pipeline
    data: Data
    second: Reference | None
    tasks: Any

    def __call__(self, state: TrainState, log: StepLog) -> None:
        """Log the validation losses of a finished step, then the metrics of its tasks. Raises
        UserError if a loss is not finite."""
        own = self.config, self.plan, self.pipe
        log.validation(validation_losses(state, self.data, *own, self.second))
        log.tasks(task_metrics(self.tasks, state, self.data, *own))


def validation_losses(
    state: TrainState,
    data: Data,
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Return the validation loss by its name in metrics.jsonl, and that of the average of the
    weights if the run keeps one."""
    average = None
    if config.optim.ema:
        # On the host with --optim.offload-state. A stage whose weights are all frozen has none.
        trained = on_device(state.opt.trees.get(EMA, ()), plan.device)
        average = with_frozen(pipe.spec, state.params, trained)
    params = {"validation_loss": state.params, "ema_validation_loss": average}
    return {
        name: validate(tree, data, config, plan, pipe, reference)
        for name, tree in params.items()
        if tree is not None
    }


def find_tasks(text: str, flag: str) -> Any:
    """Find tasks of lm-evaluation-harness. Raises UserError for an unknown task, and without the
    harness.

    ``text``: names of tasks or files of YAML, with commas between.
    ``flag``: the flag that names them."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{flag}: needs lm-evaluation-harness; pip install 'dtron[eval]'")
    from dtron.runtime.eval_harness import find  # a slow import that few runs need

    return find(text, flag)


def task_metrics(
    tasks: Any, state: TrainState, data: Data, config: RunConfig, plan: RunPlan, pipe: Pipeline
) -> dict[str, float]:
    """Return the metrics of tasks by name, as ``tasks.arc_easy.acc``. Every rank calls this.

    ``tasks``: the result of ``find_tasks``; None: no tasks."""
    if tasks is None:
        return {}
    from dtron.runtime.eval_harness import HarnessModel, run_tasks

    m, end = config.model, data.end or 0
    if data.tokenizer is None:
        raise UserError("--eval-tasks: the data has no tokenizer; give --data.tokenizer")

    def continued(prompts: list[list[int]], most: int, temperature: float) -> list[list[int]]:
        sampling = Sampling(temperature, seed=config.seed)
        return generate(state.params, prompts, most, m, pipe, sampling, plan.device, {end})

    scorer = Scorer(state.params, m, pipe, plan.device)
    model = HarnessModel(scorer, continued, data.tokenizer, m.context, end)
    found = run_tasks(model, tasks, None, None, False)
    return {
        f"tasks.{task}.{name}": value
        for task, metrics in found.items()
        for name, (value, _) in metrics.items()
    }


@torch.no_grad()
def validate(
    params: Any,
    data: Data,
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    reference: Reference | None = None,
) -> float:
    """Return the mean loss of the held-out rows, per valid target or pair. Every rank calls this;
    all get the same number. Padding rows of a microbatch do not count."""
    held_out = data.validation.rows(0, min(VALIDATION_ROWS, len(data.validation)))
    batch = to_host(held_out.filled(plan.rows), config, plan)
    microbatches = split(batch, config, plan, pipe.layout)
    weights = params if plan.gather_each else unshard(params, pipe.layout)
    if reference is not None:
        microbatches = reference.attach(params, microbatches)
    functions = program(config.model, pipe.layout, objective=config.loss.objective)
    total = evaluate(functions, weights, microbatches, pipe)
    return pipe.sum(None if total is None else full(total)).item() / batch.terms
