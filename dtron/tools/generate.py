"""``python -m dtron.generate``: generates text from a run or a Hugging Face folder.

dtron/generation/ has the engine and the ways to sample.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dtron.data.tokenization import text_of
from dtron.errors import UserError
from dtron.generation.engine import Engine, check_prompts
from dtron.generation.recorded_forward import can_record
from dtron.generation.sampling import Sampling
from dtron.generation.text_engine import TextEngine, check_stops, encode
from dtron.runtime.exit import Parser
from dtron.runtime.generation import cache_for, seeded
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.open_model import open_model
from dtron.runtime.output import write_line
from dtron.tools.prompts import check_text, read_prompts


def run(o: Namespace) -> int:
    """Run the command."""
    sampling = Sampling(o.temperature, o.top_p, o.seed, o.top_k, o.min_p, o.repetition_penalty)
    _check(o)
    texts = read_prompts(o.prompt, o.prompts)
    opened = open_model(o.folder, o.ema, o.adapter)
    config = opened.config(o.mesh, o.simulate, o.device, o.dtype)
    m, tokenizer = opened.model, opened.tokenizer
    prompts = [encode(tokenizer, text) for text in texts]
    longest = check_prompts(prompts, o.tokens, m)
    plan = plan_run(config)
    with start_ranks(config, plan) as pipe:
        weights = opened.load(pipe.spec, pipe.layout, plan.compute, plan.device)
        compile = o.compile == "on"
        size = cache_for(min(o.batch, len(prompts)), longest + o.tokens, pipe, compile)
        alone = plan.device.startswith("cuda") and plan.shape.size == 1
        graph = alone and can_record(m, pipe, compile)
        tokens = Engine(weights, m, pipe, size, plan.device, graph, compile)
        engine = TextEngine(tokens, tokenizer, opened.ends)
        answers = []
        for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            engine.add(prompt, o.tokens, seeded(sampling, i), o.stop)
            answers.append(Answer(text, text_of(tokenizer, prompt)))
        printer = Printer(answers, o.stream, o.jsonl, plan.main)
        while engine.busy:
            for event in engine.step():
                answer = answers[event.number]
                answer.text, answer.tokens = answer.text + event.text, answer.tokens + 1
                answer.finished = event.finished
            printer.print()
    return 0


@dataclass
class Answer:
    """The continuation of a prompt, as far as it is known.

    ``prompt``: as it was given.
    ``decoded``: the text of its tokens.
    ``tokens``: the number of new tokens.
    ``finished``: see ``TextEvent``."""

    prompt: str
    decoded: str
    text: str = ""
    tokens: int = 0
    finished: str | None = None

    def row(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finished,
        }


class Printer:
    """Prints answers in the order of their prompts, each when the ones before it have ended.

    ``stream``: whether to print the pieces of the answer whose turn it is.
    ``jsonl``: whether to print an object a line.
    ``main``: whether this rank prints."""

    def __init__(self, answers: Sequence[Answer], stream: bool, jsonl: bool, main: bool):
        self._answers, self._stream, self._jsonl, self._main = answers, stream, jsonl, main
        self._turn, self._printed = 0, 0  # the answer, and its characters that are printed

    def print(self) -> None:
        """Print what is known now and was not before."""
        while self._turn < len(self._answers):
            answer = self._answers[self._turn]
            whole = answer.decoded + answer.text
            if answer.finished is None:
                if self._stream and len(whole) > self._printed:
                    self._write(whole[self._printed :], "")
                    self._printed = len(whole)
                return
            self._write(json.dumps(answer.row()) if self._jsonl else whole[self._printed :])
            self._turn, self._printed = self._turn + 1, 0

    def _write(self, text: str, end: str = "\n") -> None:
        if self._main:
            write_line(sys.stdout, text, end)


def _check(o: Namespace) -> None:
    """Raise UserError for options that no text can be generated with."""
    check_text(o.stop, "--stop")
    check_stops(o.stop)
    if o.tokens < 1:
        raise UserError(f"--tokens {o.tokens}: at least 1 is generated; raise it")
    if o.batch < 1:
        raise UserError(f"--batch {o.batch}: at least 1 text is generated at once; raise it")
    if o.stream and o.jsonl:
        raise UserError("--stream with --jsonl: a line has a whole text; leave one of them out")


def parser() -> Parser:
    made = Parser(
        prog="python -m dtron.generate", description="Generate text, on any mesh without cp."
    )
    add = made.add_argument
    add_folder_flag(add)
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    add(
        "--prompts",
        metavar="FILE",
        help='texts to continue, one a line; a line of a .jsonl file is an object with "prompt"',
    )
    add("--tokens", type=int, default=64, metavar="N", help="maximum number of new tokens (64)")
    _sampling(made)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this text; may be repeated",
    )
    add(
        "--compile",
        choices=["on", "off"],
        default="off",
        help="compile decodes: some ten seconds at the start, and several times the speed (off)",
    )
    add("--batch", type=int, default=16, metavar="N", help="most texts at once (16)")
    add("--stream", action="store_true", help="print each text as it comes")
    add("--jsonl", action="store_true", help="print one JSON object for each text")
    add_model_flags(add)
    return made


def add_folder_flag(add: Callable[..., Any]) -> None:
    """Add the flag of a model's folder to a parser's."""
    add(
        "--from",
        dest="folder",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder, or a run directory",
    )


def add_model_flags(add: Callable[..., Any]) -> None:
    """Add the flags of a model and its ranks to a parser's."""
    add("--ema", action="store_true", help="use the average of the weights (--optim.ema)")
    add("--adapter", metavar="DIR", help="PEFT adapter files for the model of --from")
    add("--mesh", default="", metavar="MESH", help="axes of the mesh, as tp=2")
    add("--simulate", action="store_true", help="run all ranks in this one process, on the CPU")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU if there is one",
    )
    dtypes = ["auto", "float32", "bfloat16", "float64"]
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")


def _sampling(made: Parser) -> None:
    """Add the flags of ``Sampling``."""
    add = made.add_argument
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits; 0 takes the most likely token (0.8)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens that have this probability together (1)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from this number of most likely tokens; 0: all (0)",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens with this share of the most likely token's probability (0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="makes tokens of the text less likely; 1: no penalty (1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed of the first text (0)")


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(list(argv)))
