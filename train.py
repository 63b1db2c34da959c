"""Train a transformer: the whole program, read from top to bottom.

    python train.py                                                        # one device
    torchrun --nproc-per-node 4 train.py --mesh dp=2,tp=2 --zero 3         # four processes
    python train.py --simulate --mesh dp=8,tp=4 --steps 2                  # 32 ranks in this one process

With no ``--data.path`` it reads text that every machine has: the source of Python's standard
library.
"""

import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron import checkpoint
from dtron.checkpoint.async_saver import AsyncSaver
from dtron.checkpoint.files import clear_parts
from dtron.data import Data, Prefetch, Rows, open_data
from dtron.distributed.redistribute import full
from dtron.errors import UserError
from dtron.hf import Source, keep_origin
from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch
from dtron.model.flops import active_count, flops_per_token, parameter_count
from dtron.params import gather, init
from dtron.runtime.cli import parse, save
from dtron.runtime.config import RunConfig, identity_of
from dtron.runtime.exit import run_cli
from dtron.runtime.fault_tolerance import NonFiniteGuard, StopSignal, diagnose
from dtron.runtime.generation import Sampling, generate
from dtron.runtime.launch import host_group, plan, ranks, same_on_all_ranks
from dtron.runtime.metrics import Metrics, mark
from dtron.runtime.profiler import Recorder
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.lr_schedule import learning_rate
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import Pipeline, one_stage, program
from dtron.training.reports import StepReports, describe_experts

VALIDATION_ROWS = 32
PROFILED_STEP = 5  # of this process: what is compiled or allocated once is behind it


def main(argv: list[str]) -> int:
    config = parse(argv)
    here = plan(config)  # refuses what cannot be, before anything is started
    run_dir, found = open_run(config)
    data = open_data(config.data, config.model.vocab, config.seed, config.steps * config.batch)
    begin = Source(config.init_from, config.model) if config.init_from and not found else None
    with ranks(config, here) as pipe, StopSignal(host_group(config.timeout_seconds)) as stop:
        train(config, here, pipe, data, run_dir, found, stop, begin)
    return 0


def train(
    config: RunConfig,
    here: RunPlan,
    pipe: Pipeline,
    data: Data,
    run_dir: Path,
    found: Path | None,
    stop: StopSignal,
    begin: Source | None = None,
) -> None:
    """Run training.

    ``found``: the checkpoint to resume from.
    ``begin``: the initial weights. Random if both are None.
    """
    m, spec, layout = config.model, pipe.spec, pipe.layout
    identity = identity_of(config, data.digest())
    if data.samples is not None:
        identity["data.samples"] = data.samples
    same_on_all_ranks(
        {**identity, "batch": config.batch, "optim": config.optim, "steps": config.steps}
    )
    if begin is not None:
        params = begin.load(spec, layout, here.master, here.device)
    else:
        params = init(spec, m.dims(), config.seed, layout, here.master, here.device)
    optimizer = build_optimizer(config.optim)
    state = checkpoint.TrainState(0, 0, params, init_state(optimizer, spec, params))
    if found:
        state = checkpoint.load(found, state, spec, identity)
        if state.step >= config.steps:
            raise UserError(
                f"--steps {config.steps}: {found} is at step {state.step} already; use more"
            )
    state = replace(state, opt=with_compute_copies(state.opt, state.params, spec, layout.compute))
    watch = NonFiniteGuard(config.max_nonfinite_steps)
    saver = AsyncSaver(run_dir, host_group(config.timeout_seconds), config.keep, config.keep_every)
    if config.save_every:
        saver.prepare(checkpoint.tensors(state, spec))
    if here.main:  # not earlier: a refused resume leaves the run as it was
        clear_parts(run_dir)
        save(config, run_dir / "config.json")
        if begin is not None:
            keep_origin(begin.folder, run_dir)
        if data.tokenizer is not None:
            data.tokenizer.save(str(run_dir / "tokenizer.json"))
    flops, n = flops_per_token(m, config.data.seq_len), here.shape.size
    metrics = Metrics(
        run_dir, here.device, n, flops, config.steps, state.step, here.main, config.tensorboard
    )
    metrics.say(describe(config, here, data, state.step))
    recorded = min(PROFILED_STEP, config.steps - state.step) if config.profile else 0
    recorder = Recorder(run_dir / "trace.json", recorded, here.device)
    train_step = build_step(config, here, pipe)

    def finish(
        step: int,
        loss: Tensor,
        norm: Tensor,
        told: StepReports,
        lr: float,
        tokens: int,
        end: Any,
        waited: float,
    ) -> dict:
        """Log a step. Here the host waits for it; by then the next one is on its way."""
        value, norm = loss.item(), norm.item()
        if warning := watch.note(step, value, norm):
            metrics.say(warning)
        record = metrics.step(step, value, norm, lr, tokens, end, waited)
        record |= {"skipped_steps": watch.skipped_steps} | describe_experts(told.experts, m.moe)
        for k, total in enumerate([] if told.mtp is None else told.mtp.tolist(), start=1):
            record[f"mtp.{k}.loss"] = total / tokens
        if step % config.log_every == 0 or step in (1, config.steps):
            metrics.line(record)
        return record

    ahead = range(state.samples, config.steps * config.batch, config.batch)
    batches = Prefetch(
        lambda start: load(data.train.rows(start, config.batch), config, here), ahead
    )
    launched = None  # the step that the device is working on
    stopped = False
    while state.step < config.steps and not (stopped := stop.asked()):
        recorder.begin()
        columns, tokens = (
            batches.next()
        )  # which samples these are depends on nothing but state.samples
        microbatches = split(columns, here, layout, config.zigzags, m.mtp.depth)
        lr = learning_rate(config.optim, state.step, config.steps)
        loss, norm, told, params, opt = train_step(
            state.params, state.opt, microbatches, tokens, lr
        )
        state = checkpoint.TrainState(state.step + 1, state.samples + config.batch, params, opt)
        if launched:
            metrics.write(finish(*launched))
        if watch.over:
            why = diagnose(train_step, params, microbatches, stop.group)
            saver.wait()
            raise diverged(
                state.step - 1, f"{watch.in_a_row} steps in a row came to nothing; {why}"
            )
        for line in saver.drain_messages():
            metrics.say(line)
        launched = (state.step, loss, norm, told, lr, tokens, mark(here.device), batches.waited)

        last = state.step == config.steps
        saves = config.save_every and (last or state.step % config.save_every == 0)
        evaluates = last or (config.eval_every and state.step % config.eval_every == 0)
        if not (recorder.end() or saves or evaluates):
            continue
        record, launched = finish(*launched), None
        if evaluates:
            held = validate(state.params, data, config, here, pipe)
            if not math.isfinite(held):
                saver.wait()
                raise diverged(state.step, "the validation loss is not finite")
            record["validation_loss"] = held
            metrics.say(f"step {state.step}: validation loss {held:.4f}")
        if saves:
            record["checkpoint_stall_seconds"] = checkpoint.start_save(saver, state, spec, identity)
        metrics.write(record)
        metrics.restart_clock()
    if launched:
        metrics.write(finish(*launched))
    if stopped:
        checkpoint.start_save(saver, state, spec, identity)
        metrics.say(f"stopped by {stop.name} after step {state.step}; go on with --resume")
    elif config.sample_tokens:
        metrics.say("sample: " + sample(state.params, data, config, here, pipe))
    saver.wait()
    for line in saver.drain_messages():
        metrics.say(line)
    metrics.close()
    saver.close()


def diverged(step: int, why: str) -> UserError:
    """Every rank has the same, so all stop at once."""
    return UserError(
        f"step {step}: {why}. The run has diverged: lower --optim.lr, raise --optim.warmup, or resume from "
        "an earlier checkpoint"
    )


def describe(config: RunConfig, here: RunPlan, data: Data, step: int) -> str:
    n, compute = here.shape.size, str(here.compute).removeprefix("torch.")
    size = f"{data.train.size:,} tokens" if data.train.size else "a stream"
    parameters = f"{parameter_count(config.model):,} parameters"
    if config.model.moe.experts:
        parameters += f" ({active_count(config.model):,} for each token)"
    return (
        f"{parameters} on {here.shape} ({_count(n, 'rank')}, {here.device}, "
        f"{compute}, zero {config.zero}); {size} of text; "
        f"{config.batch} x {config.data.seq_len} tokens a step in {_count(here.count, 'microbatch', 'es')}"
        + (f"; resumed at step {step}" if step else "")
    )


def _count(n: int, noun: str, ending: str = "s") -> str:
    return f"{n} {noun}{ending if n > 1 else ''}"


def load(rows: Rows, config: RunConfig, here: RunPlan) -> tuple[list[Tensor | None], int]:
    """A global batch as tensors, in memory that a GPU can copy from by itself, and how many targets
    count. This runs ahead, in a thread of its own."""
    d, gpu = config.data, here.device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(here.device)  # for this thread; pinned memory belongs to a device
    columns = (
        rows.tokens,
        rows.documents if d.masked else None,
        rows.positions if d.restarts else None,
    )
    tensors = [None if x is None else torch.from_numpy(x) for x in (*columns, rows.counted)]
    return [x.pin_memory() if gpu and x is not None else x for x in tensors], rows.valid


def split(
    columns: list[Tensor | None], here: RunPlan, layout: Layout, zigzag: bool, depth: int = 0
) -> list[Batch]:
    """The microbatches of a global batch. Every rank has it whole for a moment, and keeps its own
    part."""
    count = len(columns[0]) // here.rows
    on_device = lambda x: x.to(here.device, non_blocking=True).split(here.rows)
    parts = [[None] * count if x is None else on_device(x) for x in columns]
    return [
        make_batch(rows, layout, *others, depth, zigzag)
        for rows, *others in zip(*parts, strict=True)
    ]


@torch.no_grad()
def validate(params, data: Data, config: RunConfig, here: RunPlan, pipe: Pipeline) -> float:
    """Return the mean loss over the same held-out rows on every mesh. Padding rows of a microbatch
    do not count."""
    held = data.validation.rows(0, min(VALIDATION_ROWS, len(data.validation)))
    columns, tokens = load(held.filled(here.rows), config, here)
    batches = split(columns, here, pipe.layout, config.zigzags)
    weights = params if here.gather_each else gather(params, pipe.layout)
    m = replace(config.model, z_loss=0.0)  # cross entropy alone, comparable between runs
    total = evaluate(program(m, pipe.layout), weights, batches, pipe)
    return pipe.sum(None if total is None else full(total)).item() / tokens


def sample(params, data: Data, config: RunConfig, here: RunPlan, pipe: Pipeline) -> str:
    """The start of the held-out text, and how the model goes on."""
    prompt = data.validation.rows(0, 1).tokens[0, :8].tolist()
    if (
        config.simulate
    ):  # here every rank's weights are at hand, and one device is as many times faster
        layout = Layout(compute=pipe.layout.compute)
        params, pipe = (pipe.whole(params),), one_stage(config.model, 1, layout)
    tokens = min(config.sample_tokens, config.model.context - len(prompt))
    (ids,) = generate(
        params, [prompt], tokens, config.model, pipe, Sampling(seed=config.seed), here.device
    )
    return data.decode(ids)


def open_run(config: RunConfig) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint to go on from: with --resume, or where torchrun has
    started this process again. Raises UserError where the directory cannot be written, has nothing
    to resume, or another run to spoil."""
    run_dir = Path(config.run_dir)
    found = checkpoint.newest(run_dir)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if config.resume and not found:
        raise UserError(
            f"--resume: {run_dir} has no checkpoint; drop --resume, or train with --save-every"
        )
    if found and not (config.resume or again):
        raise UserError(
            f"--run-dir {run_dir}: holds checkpoints of another run, up to {found.name}; go on from there "
            "with --resume, choose another --run-dir, or delete it"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--run-dir {run_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
    return run_dir, found


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
