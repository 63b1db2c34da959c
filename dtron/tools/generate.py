"""``python -m dtron.generate``: generates text from a run or a Hugging Face folder.

runtime/generation.py has the steps of generation and the ways to sample.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from dtron.data.tokenization import NO_TOKEN, encoder_of, load_tokenizer, text_of
from dtron.data.tokenizer_library import library
from dtron.errors import UserError
from dtron.json_files import is_there
from dtron.runtime.exit import Parser
from dtron.runtime.generation import Sampling, check_prompts, generate
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.output import write_line
from dtron.tools.model_source import add_model_flags, ends_of, model_folder, open_model, run_config


def run(o: Namespace) -> int:
    """Run the command."""
    check_sampling(o.tokens, o.temperature, o.top_p, o.seed)
    check_text(o.prompt)
    folder = model_folder(o.folder)
    opened = open_model(folder, o.ema, o.adapter)
    m = opened.model
    if not is_there(folder / "tokenizer.json"):
        raise UserError(f"--from {folder}: has no tokenizer.json; put the model's tokenizer there")
    tokenizer = load_tokenizer(str(folder), flag="--from")
    encoder = encoder_of(tokenizer, special=True)  # without the padding that may be saved in it
    with library("--prompt: the tokenizer cannot encode it", NO_TOKEN):
        prompts = [encoder.encode(text).ids for text in o.prompt]
    check_prompts(prompts, o.tokens, m)
    config = replace(run_config(o, m), lora=opened.lora)
    plan = plan_run(config)
    ends, sampling = ends_of(folder, tokenizer), Sampling(o.temperature, o.top_p, o.seed)
    with start_ranks(config, plan) as pipe:
        weights = opened.load(pipe.spec, pipe.layout, plan.compute, plan.device)
        texts = generate(weights, prompts, o.tokens, m, pipe, sampling, plan.device, ends)
    if plan.main:
        for ids in texts:
            write_line(sys.stdout, text_of(tokenizer, ids))
    return 0


def check_sampling(tokens: int, temperature: float, top_p: float, seed: int = 0) -> None:
    """Raise UserError for options that no text can be drawn with."""
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: at least 1 is generated; raise it")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"--temperature {temperature}: must be 0 (the most likely token) or more; change it"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be over 0 and at most 1 (all tokens); change it")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed {seed}: must fit in 64 bits; choose a smaller one")


def check_text(prompts: Sequence[str]) -> None:
    """Raise UserError for a prompt that is not text. Python keeps bytes of a command line that are
    no UTF-8 as half surrogate pairs."""
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"--prompt {text[:40]!a}: is not UTF-8 at character {error.start}; convert it"
            ) from error


def parser() -> Parser:
    made = Parser(
        prog="python -m dtron.generate", description="Generate text, on any mesh without cp."
    )
    add = made.add_argument
    add(
        "--from",
        dest="folder",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder, or a run directory",
    )
    add(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; may be repeated",
    )
    add("--tokens", type=int, default=64, metavar="N", help="maximum number of new tokens (64)")
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
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_model_flags(add)
    return made


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(list(argv)))
