"""Train a transformer: the whole program, read from top to bottom.

    python train.py                                                        # one device
    torchrun --nproc-per-node 4 train.py --mesh dp=2,tp=2 --zero 3         # four processes
    python train.py --simulate --mesh dp=8,tp=4 --steps 2                  # 32 ranks in one process

With no ``--data.path`` it reads text that every machine has: the source of Python's standard
library.
"""

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from dtron import checkpoint
from dtron.checkpoint import AsyncSaver, TrainState
from dtron.data import Data, open_data
from dtron.hf import Source
from dtron.runtime.batches import Batches
from dtron.runtime.cli import parse
from dtron.runtime.compile_cache import open_compile_cache
from dtron.runtime.config import RunConfig
from dtron.runtime.determinism import deterministic
from dtron.runtime.evaluation import Evaluator, find_tasks
from dtron.runtime.exit import run_cli
from dtron.runtime.fault_tolerance import diagnose, diverged
from dtron.runtime.generation import sample
from dtron.runtime.initial_state import identity, initial_state, source_of
from dtron.runtime.launch import host_group, plan_run, start_ranks
from dtron.runtime.monitor import monitor
from dtron.runtime.output import Output
from dtron.runtime.recovery import memory_copies
from dtron.runtime.run_directory import RunDirectory
from dtron.runtime.second_model import second_model
from dtron.runtime.signals import StopSignal
from dtron.runtime.step_log import describe
from dtron.runtime.trackers.tracker import check_installed
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.lr_schedule import scheduled_rates
from dtron.training.pipeline import Pipeline


def main(argv: list[str]) -> int:
    config = parse(argv)
    plan = plan_run(config)  # refuses an invalid config before any rank is started
    check_installed(config.trackers)
    if plan.compile:
        open_compile_cache(config.compile_cache)
    with deterministic(config.deterministic), RunDirectory.open(config) as run:
        if run.finished:
            Output(plan.main).say(f"{run.resumed}: the run is finished; nothing to do")
            return 0
        samples = config.ramp.samples_after(config.steps)
        data = open_data(config.data, config.model.vocab, config.seed, samples)
        source = source_of(config, run.resumed)
        group = host_group(config.timeout_seconds)
        with start_ranks(config, plan) as pipe, StopSignal(group) as stop:
            train(config, plan, pipe, data, run, stop, source)
    return stop.exit_code


def train(
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    data: Data,
    run: RunDirectory,
    stop: StopSignal,
    source: Source | None,
) -> None:
    """Train until the last step, or until a signal asks to stop.

    ``source``: the Hugging Face folder of the initial weights; None: random weights, or those of
    the checkpoint ``run.resumed``."""
    same = identity(config, data, source)
    tasks = find_tasks(config.eval_tasks, "--eval-tasks") if config.eval_tasks else None
    copies = memory_copies(config, plan, pipe, same)
    state = initial_state(config, plan, pipe, same, run.resumed, source, copies)
    notes = data.notes + (source.notes if source else ())
    if plan.main:  # not earlier: a refused resume leaves the directory as it was
        notes += run.begin(config, plan, data, state.step, state.samples)
    group = host_group(config.timeout_seconds)
    with (
        copies,
        monitor(config, plan, pipe, run, state, stop.group) as observer,
        AsyncSaver(run.checkpoints, group, config.keep, config.keep_every) as saver,
    ):
        log = observer.log

        def save(state: TrainState) -> float:
            log.say(*observer.replicas.check(state), *run.restore())
            return checkpoint.start_save(saver, state, pipe.spec, same)

        if config.save_every:
            saver.prepare(checkpoint.tensors(state, pipe.spec))
        log.say(describe(config, plan, data, state.step), *notes, *observer.notes)
        batches = Batches(config, plan, pipe.layout, data, state.step, state.samples)
        second = second_model(config, plan, pipe, source)
        step = build_step(config, plan, pipe, reference=second)
        evaluate = Evaluator(config, plan, pipe, data, second, tasks)
        stopped = False
        while state.step < config.steps and not (stopped := stop.asked()):
            observer.begin()
            batch = batches.next()
            rates = scheduled_rates(config.optim, config.progress(state.step, state.samples))
            loss, norm, reports, params, opt = step(
                state.params, state.opt, *batch.inputs, rates.lr, decay=rates.decay
            )
            state = TrainState(state.step + 1, state.samples + batch.size, params, opt)
            observer.launched(state, batch, rates, loss, norm, reports)
            log.say(*saver.drain_messages(), *copies.drain_messages())
            if log.guard.over:
                why = diagnose(step, params, batch.microbatches, stop.group)
                raise diverged(state.step - 1, f"{log.guard.reason}; {why}")
            evaluates, saves = config.evaluates_after(state.step), config.saves_after(state.step)
            observer.end(evaluates or saves or copies.due(state.step))
            if evaluates:
                evaluate(state, log)
            if saves:
                log.saved_in(save(state))
            log.write()
            copies.save(state)
        stop.training_is_over()
        observer.finish()
        if stopped:
            save(state)
            log.say(f"stopped by {stop.name} after step {state.step}; go on with --resume")
        elif config.sample_tokens:
            log.say("sample: " + sample(state.params, data, config, plan, pipe))
        saver.wait()
        log.say(*saver.drain_messages(), *log.summary())


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
