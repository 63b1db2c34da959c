"""``dtron eval --from DIR --tasks NAMES``: evaluates a model on tasks of lm-evaluation-harness, on
any mesh; ``--text FILE`` measures the perplexity of a text.

runtime/eval_harness.py has the model that the harness asks, and runtime/scoring.py the
log-probabilities.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from tokenizers import Tokenizer

from dtron.data.chat_template import template_beside
from dtron.data.files import one_line
from dtron.data.tokenization import encoder_of, ids_of
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.runtime.evaluation import find_tasks
from dtron.runtime.exit import Parser
from dtron.runtime.generation import Sampling, generate
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.open_model import open_model
from dtron.runtime.output import replace_file, writing
from dtron.runtime.scoring import Scorer, Text
from dtron.tools.console import wide_console
from dtron.tools.generate import add_folder_flag, add_model_flags


def run(o: Namespace) -> int:
    """Run the command."""
    if not o.tasks and not o.text:
        raise UserError("eval: has nothing to do; give --tasks arc_easy, or --text FILE")
    if o.limit is not None and o.limit < 1:
        raise UserError(f"--limit {o.limit}: at least 1 example is evaluated; raise it")
    tasks = find_tasks(o.tasks, "--tasks") if o.tasks else None
    opened = open_model(o.folder, o.ema, o.adapter)
    tokenizer, m, ends = opened.tokenizer, opened.model, opened.ends
    text = _read(Path(o.text)) if o.text else None
    config = opened.config(o.mesh, o.simulate, o.device, o.dtype)
    plan = plan_run(config)
    found: dict[str, Any] = {}
    with start_ranks(config, plan) as pipe:
        weights = opened.load(pipe.spec, pipe.layout, plan.compute, plan.device)
        scorer = Scorer(weights, m, pipe, plan.device)
        if text is not None:
            found["text"] = perplexity(scorer, text, tokenizer, m, min(ends, default=0))
        if tasks is not None:
            from dtron.runtime.eval_harness import HarnessModel, run_tasks

            def continued(prompts: list[list[int]], most: int, temperature: float) -> Any:
                sampling = Sampling(temperature, seed=o.seed)
                return generate(weights, prompts, most, m, pipe, sampling, plan.device, ends)

            harness = HarnessModel(
                scorer,
                continued,
                tokenizer,
                m.context,
                min(ends, default=0),
                chat_of(opened.folder),
            )
            found["tasks"] = run_tasks(harness, tasks, o.fewshot, o.limit, o.chat)
    if plan.main:
        console = wide_console()
        for table in tables(found):
            console.print(table)
        if o.json:
            with writing(Path(o.json)):
                replace_file(Path(o.json), (json.dumps(found, indent=1) + "\n").encode())
    return 0


def perplexity(
    scorer: Scorer, text: str, tokenizer: Tokenizer, m: ModelConfig, first: int
) -> dict[str, float]:
    """Return the perplexity of a text, per token and per byte, and its bits per byte. The text is
    cut into windows of the model's context. A window has no token of the one before it but the
    last.

    ``first``: the token before the text."""
    ids = [first, *ids_of(encoder_of(tokenizer), [text])[0]]
    windows = [ids[i : i + m.context + 1] for i in range(0, len(ids) - 1, m.context)]
    scores = scorer([Text(w, len(w) - 1) for w in windows])
    nats, size = -sum(s.log_probability for s in scores), len(text.encode())
    return {
        "tokens": len(ids) - 1,
        "bytes": size,
        "perplexity": math.exp(nats / (len(ids) - 1)),
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }


def chat_of(folder: Path) -> Callable[[list[Any]], str] | None:
    """Return a function that renders a conversation as a prompt; None without a template."""
    template = template_beside(folder / "tokenizer.json")
    return (
        None if template is None else lambda messages: template.render(messages, prompt=True).text
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Return the results as tables."""
    made = []
    if "text" in found:
        made.append(Table(title="the text"))
        for name in ("measure", "value"):
            made[-1].add_column(name, justify="left" if name == "measure" else "right")
        for name, value in found["text"].items():
            made[-1].add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    if "tasks" in found:
        made.append(Table(title="tasks"))
        for name in ("task", "metric", "value", "standard error"):
            made[-1].add_column(name, justify="left" if name in ("task", "metric") else "right")
        for task, metrics in found["tasks"].items():
            for name, (value, error) in metrics.items():
                beside = "" if error is None else f"{error:.4f}"
                made[-1].add_row(task, name, f"{value:.4f}", beside)
    return made


def parser() -> Parser:
    made = Parser(prog="dtron eval", description="Evaluate a model, on any mesh.")
    add = made.add_argument
    add_folder_flag(add)
    add(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, or files of YAML, with commas between",
    )
    add("--text", metavar="FILE", help="a text file whose perplexity is measured")
    add("--fewshot", type=int, metavar="N", help="examples before each question (the task's)")
    add("--limit", type=int, metavar="N", help="examples of each task (all)")
    add("--chat", action="store_true", help="ask in the model's chat template")
    add("--json", metavar="FILE", help="also write the results to this file")
    add("--seed", type=int, default=0, metavar="N", help="random seed of sampled answers (0)")
    add_model_flags(add)
    return made


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(list(argv)))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read ({one_line(error)}); convert it") from error
    if not text:
        raise UserError(f"--text {path}: is empty; give another file")
    return text
