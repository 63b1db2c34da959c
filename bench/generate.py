"""Time generation with a model of random weights, in dtron and in transformers, and print one JSON
line for each system and batch.

    python bench/generate.py --model bench-1.3b --batch 1 16 128
    python bench/generate.py --model tiny --batch 1 4 --prompt 8 --tokens 8

- **dtron** is the engine of dtron/generation/. On a GPU its decodes are compiled and recorded.
- **transformers** is ``generate`` with its static cache, which compiles the decode on a GPU.
- **The work** is the same: the same weights, the same random prompts of one length, greedy, and the
  same number of new tokens. ``same_tokens`` is the share of tokens that both have. It is less than
  1 in bfloat16, where one other token changes the rest of a text.
- **first_s** is the median time until all texts have their first token.
- **decode_tokens_per_s** counts the tokens after it, of all texts together; the median.
- Each time is measured ``--repeat`` times, after two runs that compile and record.

Needs torch, and transformers for its lines."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dtron.generation.engine import Engine
from dtron.generation.recorded_forward import can_record
from dtron.generation.sampling import Sampling
from dtron.hf.config import best_family, to_hf
from dtron.hf.load import Source
from dtron.mesh import Layout
from dtron.model.flops import parameter_count
from dtron.model.presets import preset
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.generation import cache_for
from dtron.training.pipeline import one_stage

Texts = list[list[int]]
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Timed:
    """``first``: seconds until all texts have a token. ``rest``: the seconds after it."""

    first: float
    rest: float
    texts: Texts


def main(argv: list[str]) -> int:
    o = arguments(argv)
    device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    m = replace(preset(o.model), context=o.prompt + o.tokens)
    with tempfile.TemporaryDirectory() as name:
        theirs = transformers_model(m, Path(name), dtype, device)
        source = Source(Path(name))
        pipe = one_stage(source.model, 1, Layout(compute=dtype))
        params = source.load(pipe.spec, pipe.layout, dtype, device)
    for batch in o.batch:
        g = torch.Generator().manual_seed(0)
        prompts = torch.randint(m.vocab, (batch, o.prompt), generator=g).tolist()
        found: dict[str, list[Timed]] = {}
        if "dtron" in o.systems:
            compile = device == "cuda" and not o.eager
            size = cache_for(batch, o.prompt + o.tokens, pipe, compile)
            size = replace(size, chunk=o.prompt, prefill_rows=max(1, o.prefill // o.prompt))
            graph = device == "cuda" and can_record(m, pipe, compile)
            engine = Engine(params, source.model, pipe, size, device, graph, compile)
            ours = partial(run, engine, prompts, o.tokens, device)
            found["dtron"] = measure(ours, o.repeat)
        if "transformers" in o.systems:
            other = partial(run_transformers, theirs, prompts, o.tokens, device)
            found["transformers, static cache"] = measure(other, o.repeat)
        same = same_tokens([times[-1].texts for times in found.values()])
        for system, times in found.items():
            line = case(o, system, batch, times, parameter_count(m), str(dtype), device)
            print(json.dumps(line | same), flush=True)
    return 0


def same_tokens(texts: list[Texts]) -> dict[str, float]:
    """Return the share of tokens that two systems both have."""
    if len(texts) < 2:
        return {}
    pairs = zip(*(list(chain.from_iterable(of_system)) for of_system in texts), strict=True)
    return {"same_tokens": round(statistics.mean(x == y for x, y in pairs), 4)}


def transformers_model(m: Any, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return transformers' model with random weights, and save it in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = best_family(m)
    (folder / "config.json").write_text(json.dumps(to_hf(m, family)))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.save_pretrained(folder)
    return model


def run(engine: Engine, prompts: Texts, tokens: int, device: str) -> Timed:
    """Generate with dtron's engine."""
    start, first = clock(device), 0.0
    numbers = {engine.add(prompt, tokens, GREEDY): i for i, prompt in enumerate(prompts)}
    texts: Texts = [[] for _ in prompts]
    while engine.busy:
        for event in engine.step():
            texts[numbers[event.number]].append(event.token)
        if not first and all(texts):
            first = clock(device) - start
    return Timed(first, clock(device) - start - first, texts)


def run_transformers(model: Any, prompts: Texts, tokens: int, device: str) -> Timed:
    """Generate with transformers. The first token is timed by a run of its own."""
    ids = torch.tensor(prompts, device=device)

    def text(count: int) -> tuple[float, Texts]:
        start = clock(device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static",
        )
        return clock(device) - start, found[:, ids.shape[1] :].tolist()

    first, _ = text(1)
    whole, texts = text(tokens)
    return Timed(first, max(whole - first, 1e-9), texts)


def measure(once: Callable[[], Timed], repeat: int) -> list[Timed]:
    return [once() for _ in range(2 + repeat)][2:]


def clock(device: str) -> float:
    """Return the time in seconds at which the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def case(
    o: argparse.Namespace,
    system: str,
    batch: int,
    times: list[Timed],
    parameters: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Return what was measured, on which machine and when."""
    rest = statistics.median(timed.rest for timed in times)
    whole = statistics.median(timed.first + timed.rest for timed in times)
    return {
        "system": system,
        "model": o.model,
        "parameters": parameters,
        "batch": batch,
        "prompt": o.prompt,
        "tokens": o.tokens,
        "first_s": round(statistics.median(timed.first for timed in times), 5),
        "decode_tokens_per_s": round(batch * (o.tokens - 1) / rest, 1),
        "tokens_per_s": round(batch * o.tokens / whole, 1),
        "dtype": dtype.removeprefix("torch."),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time generation, beside transformers; JSON lines.")
    add = p.add_argument
    add("--model", default="bench-1.3b", help="name of a preset (bench-1.3b)")
    add("--batch", type=int, nargs="+", default=[1, 16, 128], help="texts at once (1 16 128)")
    add("--prompt", type=int, default=512, help="tokens of a prompt (512)")
    add("--tokens", type=int, default=256, help="new tokens of a text (256)")
    add("--prefill", type=int, default=8192, help="tokens of prompts in a step of dtron (8192)")
    systems = ["dtron", "transformers"]
    add("--systems", nargs="+", default=systems, choices=systems, help="what is timed (both)")
    add("--eager", action="store_true", help="do not compile dtron's decodes")
    add("--repeat", type=int, default=5, help="timed runs (5)")
    add("--device", choices=["cpu", "cuda"], help="a GPU if there is one")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
