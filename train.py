"""Train a transformer: the whole program, read from top to bottom.

    python train.py                                                        # one device
    torchrun --nproc-per-node 4 train.py --mesh dp=2,tp=2 --zero 3         # four processes
    python train.py --simulate --mesh dp=8,tp=4 --steps 2                  # 32 ranks in this one process

With no ``--data.path`` it reads text that every machine has: the source of Python's standard library.
"""

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron import checkpoint
from dtron.checks import sequence_unit
from dtron.cli import parse, save
from dtron.compiled import compiled, compiled_rule
from dtron.config import RunConfig
from dtron.data import Corpus, document_ids, load_corpus, rows
from dtron.dtensor import full
from dtron.entry import run_cli
from dtron.generate import generate
from dtron.launch import Plan, plan, ranks, same_on_all_ranks
from dtron.layers.loss import IGNORE
from dtron.mesh import Layout
from dtron.metrics import Metrics, mark
from dtron.model import Batch, flops_per_token, make_batch, parameter_count, valid_tokens
from dtron.optim import adam_init, adam_update, clip_scale, global_norm, learning_rate
from dtron.params import gather, init
from dtron.pipeline import Pipeline, one_stage, program
from dtron.profile import Recorder
from dtron.shape import MeshShape
from dtron.step import evaluate, gradients

VALIDATION_ROWS = 32
PROFILED_STEP = 5  # of this process: what is compiled or allocated once is behind it


def main(argv: list[str]) -> int:
    config = parse(argv)
    here = plan(config)  # refuses what cannot be, before anything is started
    d, run_dir = config.data, open_run(config)
    corpus = load_corpus(d.path, d.column, d.tokenizer, config.model.vocab, d.sequence, d.validation)
    if d.document_mask and corpus.end_id is None:
        raise ValueError(
            f"--data.document-mask: {d.tokenizer} has no token that ends a document; add <|endoftext|> to it "
            "or drop the mask"
        )
    with ranks(config, here) as pipe:
        train(config, here, pipe, corpus, run_dir)
    return 0


def train(config: RunConfig, here: Plan, pipe: Pipeline, corpus: Corpus, run_dir: Path) -> None:
    m, spec, layout = config.model, pipe.spec, pipe.layout
    identity = checkpoint.identity_of(config, corpus.digest())
    same_on_all_ranks({**identity, "batch": config.batch, "optim": config.optim, "steps": config.steps})
    params = init(spec, m.dims(), config.seed, layout, here.master, here.device)
    state = checkpoint.TrainState(0, 0, params, adam_init(params))
    if config.resume and (found := checkpoint.newest(run_dir)):
        state = checkpoint.load(found, state, spec, identity)
        if state.step >= config.steps:
            raise ValueError(f"--steps {config.steps}: {found} is at step {state.step} already; use more")
    if here.main:  # not earlier: a refused resume leaves the run as it was
        save(config, run_dir / "config.json")
        corpus.tokenizer.save(str(run_dir / "tokenizer.json"))
    flops, n = flops_per_token(m, config.data.sequence), here.shape.size
    metrics = Metrics(run_dir, here.device, n, flops, config.steps, state.step, here.main, config.tensorboard)
    metrics.say(describe(config, here, corpus, state.step))
    recorded = min(PROFILED_STEP, config.steps - state.step) if config.profile else 0
    recorder = Recorder(run_dir / "trace.json", recorded, here.device)
    functions, rule = program(m, layout, config.how, here.splits), None
    if here.compile:
        functions, rule = compiled(functions, layout, config.how), compiled_rule()

    def finish(step: int, loss: Tensor, norm: Tensor, lr: float, tokens: int, end: Any) -> dict:
        """Log a step. Here the host waits for it; by then the next one is on its way."""
        value, norm = finite(loss.item(), "loss", step), finite(norm.item(), "gradient", step)
        record = metrics.step(step, value, norm, lr, tokens, end)
        if step % config.log_every == 0 or step in (1, config.steps):
            metrics.line(record)
        return record

    launched = None  # the step that the device is working on
    while state.step < config.steps:
        recorder.begin()
        microbatches, tokens = load(corpus.train, state.samples, config, here, layout, corpus.end_id)
        loss, grads = gradients(
            functions, state.params, microbatches, tokens, pipe, config.zero, here.gather_each
        )
        norm = global_norm(grads, spec, pipe.sum) / tokens
        lr = learning_rate(config.optim, state.step, config.steps)
        scale = clip_scale(norm, config.optim.clip) / tokens
        params, opt = adam_update(grads, state.opt, state.params, spec, lr, scale, config.optim, rule)
        del grads  # or they would wait for the next step's
        state = checkpoint.TrainState(state.step + 1, state.samples + config.batch, params, opt)
        if launched:
            metrics.write(finish(*launched))
        loss = pipe.sum(None if loss is None else full(loss))
        launched = (state.step, loss, norm, lr, tokens, mark(here.device))

        last = state.step == config.steps
        saves = config.save_every and (last or state.step % config.save_every == 0)
        evaluates = last or (config.eval_every and state.step % config.eval_every == 0)
        if not (recorder.end() or saves or evaluates):
            continue
        record, launched = finish(*launched), None
        if evaluates:
            held = validate(state.params, corpus, config, here, pipe)
            record["validation_loss"] = finite(held, "validation loss", state.step)
            metrics.say(f"step {state.step}: validation loss {held:.4f}")
        metrics.write(record)
        if saves:
            metrics.say(f"saved {checkpoint.save(run_dir, state, spec, identity)}")
        metrics.restart_clock()
    if config.sample:
        metrics.say("sample: " + sample(state.params, corpus, config, here, pipe))
    metrics.close()


def finite(value: float, name: str, step: int) -> float:
    """The value, or ValueError: every rank has the same, so all stop at once."""
    if not math.isfinite(value):
        raise ValueError(
            f"step {step}: the {name} is not finite, the run has diverged; lower --optim.lr, raise "
            "--optim.warmup, or resume from an earlier checkpoint"
        )
    return value


def describe(config: RunConfig, here: Plan, corpus: Corpus, step: int) -> str:
    n, compute = here.shape.size, str(here.compute).removeprefix("torch.")
    return (
        f"{parameter_count(config.model):,} parameters on {here.shape} ({_count(n, 'rank')}, {here.device}, "
        f"{compute}, zero {config.zero}); {corpus.train.size:,} tokens of text; "
        f"{config.batch} x {config.data.sequence} tokens a step in {_count(here.count, 'microbatch', 'es')}"
        + (f"; resumed at step {step}" if step else "")
    )


def _count(n: int, noun: str, ending: str = "s") -> str:
    return f"{n} {noun}{ending if n > 1 else ''}"


def load(
    tokens, start: int, config: RunConfig, here: Plan, layout: Layout, end: int | None, shuffle: bool = True
) -> tuple[list[Batch], int]:
    """The microbatches of the global batch that starts at sample ``start``, and its valid tokens. Which
    samples those are depends on nothing but ``start``."""
    d = config.data
    batch = torch.from_numpy(rows(tokens, d.sequence, config.seed, start, config.batch, shuffle))
    return split(batch, config, here, layout, end)


def split(batch: torch.Tensor, config: RunConfig, here: Plan, layout: Layout, end: int | None):
    documents = positions = [None] * (batch.shape[0] // here.rows)
    if config.data.document_mask:
        ids, places = (torch.from_numpy(x).to(here.device) for x in document_ids(batch[:, :-1].numpy(), end))
        documents, positions = ids.split(here.rows), places.split(here.rows)
    parts = zip(batch.to(here.device).split(here.rows), documents, positions, strict=True)
    batches = [make_batch(r, layout, d, p, config.zigzags) for r, d, p in parts]
    return batches, valid_tokens(batch)


@torch.no_grad()
def validate(params, corpus: Corpus, config: RunConfig, here: Plan, pipe: Pipeline) -> float:
    """Mean loss over the same held-out rows on every mesh; rows that only fill a microbatch up do not
    count."""
    d = config.data
    n = min(VALIDATION_ROWS, (len(corpus.validation) - 1) // d.sequence)
    held = torch.from_numpy(rows(corpus.validation, d.sequence, 0, 0, n, shuffle=False))
    fill = -len(held) % here.rows
    held = torch.cat([held, torch.full((fill, held.shape[1]), IGNORE)])
    batches, tokens = split(held, config, here, pipe.layout, corpus.end_id)
    weights = params if config.zero == 3 and here.gather_each else gather(params, pipe.layout)
    m = replace(config.model, z_loss=0.0)  # cross entropy alone, comparable between runs
    total = evaluate(program(m, pipe.layout), weights, batches, pipe)
    return pipe.sum(None if total is None else full(total)).item() / tokens


def sample(params, corpus: Corpus, config: RunConfig, here: Plan, pipe: Pipeline) -> str:
    """The start of the held-out text, and how the model goes on."""
    prompt, shape = corpus.validation[:8].tolist(), here.shape
    if config.simulate:  # here every rank's weights are at hand, and one device is as many times faster
        layout = Layout(compute=pipe.layout.compute)
        params, pipe, shape = (pipe.whole(params),), one_stage(config.model, 1, layout), MeshShape()
    ids = generate(
        params, prompt, config.sample, config.model, pipe,
        seed=config.seed, data_ranks=shape.data, unit=sequence_unit(shape, zigzag=True), device=here.device,
    )  # fmt: skip
    return corpus.tokenizer.decode(ids)


def open_run(config: RunConfig) -> Path:
    """The run directory. Raises ValueError where it cannot be written, where there is nothing to resume, or
    another run to spoil."""
    run_dir = Path(config.run_dir)
    found = checkpoint.newest(run_dir)
    if config.resume and not found:
        raise ValueError(f"--resume: {run_dir} has no checkpoint; drop --resume, or train with --save-every")
    if found and not config.resume:
        raise ValueError(
            f"--run-dir {run_dir}: holds checkpoints of another run, up to {found.name}; go on from there "
            "with --resume, choose another --run-dir, or delete it"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"--run-dir {run_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
    return run_dir


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
