"""Text from a model, with the same sharded forward that trains it; ``python -m dtron.generate
--help``.

The prompts are run at once, padded on the right, and then every step runs one token of each row.
What the mixers need of earlier tokens is in caches that travel beside the weights (of attention:
layers/kv_cache.py), so the layers are those of training, on whatever mesh. All ranks draw the same
tokens, since all have the same logits and the same seed. Rows are filled up until every rank has as
many tokens, which the sharding of tokens asks for.

Sampling: the temperature divides the logits, and top-p (Holtzman et al. 2019, arXiv:1904.09751,
section 3.1) draws from the fewest tokens that have this probability together. Left out: everything
that serving needs, as pages of cache, rows that come and go, and speculation.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtron import checkpoint
from dtron.data import Data
from dtron.data.tokenization import end_id, load_tokenizer
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.hf.config import CONFIG
from dtron.hf.load import Source
from dtron.hf.safetensors import read_json
from dtron.mesh import Layout, by_rows
from dtron.model.batch import make_batch
from dtron.model.block import Block
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer, embed, stage_logits
from dtron.params import gather
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import Parser
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.run_directory import read_run
from dtron.schedules.runner import Program
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.pipeline import Pipeline, one_stage


@torch.no_grad()
def generate(
    params: tuple[Transformer, ...],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    m: ModelConfig,
    pipe: Pipeline,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    ends: Set[int] = frozenset(),
) -> list[list[int]]:
    """Every prompt and ``tokens`` new ones, or fewer where one of ``ends`` comes, which is the
    row's last. Temperature 0 takes the likeliest. Raises UserError for a prompt that is empty or
    leaves no room in the model's context."""
    longest = check_prompts(prompts, tokens, m)
    step = Decoder(params, len(prompts), longest + tokens, m, pipe, device)
    texts, generator = [list(p) for p in prompts], torch.Generator().manual_seed(seed)
    new, open_rows = [list(p) for p in prompts], set(range(len(prompts)))
    for _ in range(tokens):
        logits_BV = step(new, [len(text) - len(row) for text, row in zip(texts, new, strict=True)])
        with paused():
            drawn = torch.zeros(len(prompts))
            if logits_BV is not None:
                drawn = pick(logits_BV, temperature, top_p, generator)
            drawn = pipe.sum(drawn.to(device)).tolist()  # from the last stage to all
        new = [[int(token)] for token in drawn]
        for row in list(open_rows):
            texts[row] += new[row]
            if new[row][0] in ends:
                open_rows.remove(row)
        for row in set(range(len(prompts))) - open_rows:
            new[row] = texts[row][-1:]  # its last token again, in its slot
        if not open_rows:
            break
    return texts


def sample(params: Any, data: Data, config: RunConfig, plan: RunPlan, pipe: Pipeline) -> str:
    """Return the first tokens of the held-out text, continued by the model for
    ``config.sample_tokens`` tokens."""
    prompt = data.validation.rows(0, 1).tokens[0, :8].tolist()
    if config.simulate:  # this process has every rank's weights, and one device is faster
        layout = Layout(compute=pipe.layout.compute)
        params, pipe = (pipe.whole(params),), one_stage(config.model, 1, layout)
    tokens = min(config.sample_tokens, config.model.context - len(prompt))
    (ids,) = generate(
        params, [prompt], tokens, config.model, pipe, seed=config.seed, device=plan.device
    )
    return data.decode(ids)


class Decoder:
    """The model and what it has seen of ``rows`` texts, of up to ``slots`` tokens."""

    def __init__(
        self,
        params: tuple[Transformer, ...],
        rows: int,
        slots: int,
        m: ModelConfig,
        pipe: Pipeline,
        device: str,
    ):
        layout = by_rows(pipe.layout)
        unit = layout.parts("tokens_sp")
        self._rows, self._filled = rows, -(-rows // unit) * unit
        self._m, self._pipe, self._layout, self._device = m, pipe, layout, device
        weights = gather(params, layout)
        dtype = weights[0].blocks[0].norm_1.scale.dtype

        def empty(p: Block) -> Any:
            return m.mixer(p.letter).empty_cache(self._filled, slots, layout, dtype, device)

        self._weights = [(p, tuple(map(empty, p.blocks))) for p in weights]

    def __call__(self, new: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor | None:
        """``new`` tokens of each row, of which the first has position ``starts[row]`` -> the logits
        after them, ``[rows, vocab]``; None on ranks without the last stage."""
        longest, fill = max(map(len, new)), self._filled - self._rows
        width = lambda row: [
            *row,
            *[0] * (longest - len(row) + 1),
        ]  # the last is a target, which nobody asks
        tokens = torch.tensor([width(row) for row in [*new, *[[0]] * fill]])
        first = torch.tensor([*starts, *[0] * fill])
        places = first[:, None] + torch.arange(longest)
        last = torch.tensor([len(row) - 1 for row in new] + [0] * fill)
        layout = self._layout
        tokens, places, last = (x.to(self._device) for x in (tokens, places, last))
        batch = make_batch(tokens, layout, positions_BS=places)
        functions = _functions(self._m, layout, layout.shard(last, "tokens"))
        found = evaluate(functions, self._weights, [batch], self._pipe)
        return None if found is None else full(found)[: self._rows].float().cpu()


def _functions(m: ModelConfig, layout: Layout, last_B: Tensor) -> Program:
    """The model's, for stages whose params are pairs of weights and decoding caches."""

    def enter(p: tuple[Transformer, tuple[Any, ...]], batch: Any) -> Tensor:
        return embed(p[0], batch, m, layout)

    def run(
        p: tuple[Transformer, tuple[Any, ...]], x_TD: Tensor, batch: Any
    ) -> tuple[Tensor, None]:
        return stage_logits(p[0], x_TD, batch, m, layout, p[1], last_B)

    return Program(enter, run)


def pick(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    odds, order = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = odds.cumsum(-1) - odds  # the likeliest has nothing before it, so it is never left out
    odds = odds.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(odds, 1, generator=generator))[:, 0]


def check_prompts(prompts: Sequence[Sequence[int]], tokens: int, m: ModelConfig) -> int:
    """The longest's length; ValueError for what cannot be gone on from."""
    if not prompts or not all(prompts):
        raise UserError("--prompt: a prompt has no tokens; give at least one word")
    largest = max(map(max, prompts))
    if largest >= m.vocab:
        raise UserError(
            f"--prompt: has token {largest}, the model {m.vocab} of them; give the model's own tokenizer"
        )
    longest = max(map(len, prompts))
    if longest + tokens > m.context:
        raise UserError(
            f"--tokens {tokens} after a prompt of {longest}: the model's context is {m.context}; use "
            + (f"--tokens {m.context - longest}" if longest < m.context else "a shorter prompt")
        )
    return longest


def run(o: Namespace) -> int:
    """The command."""
    check_sampling(o.tokens, o.temperature, o.top_p)
    folder = Path(o.folder)
    opened, m = _open(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--from {folder}: has no tokenizer.json; put that of the model there")
    tokenizer = load_tokenizer(str(folder), flag="--from")
    prompts = [tokenizer.encode(text).ids for text in o.prompt]
    check_prompts(prompts, o.tokens, m)
    config = RunConfig(
        mesh=o.mesh, simulate=o.simulate, device=o.device, dtype=o.dtype, zero=0, compile="off",
        cuda_graph="off", model=m,
    )  # fmt: skip
    shape = MeshShape.parse(o.mesh, None if o.simulate else int(os.environ.get("WORLD_SIZE", 1)))
    if shape.cp > 1:
        raise UserError(
            f"--mesh {o.mesh}: cp cuts sequences, and there are but tokens; use dp or tp"
        )
    # A plan is one of training: the smallest batch that this mesh takes.
    data = DataConfig(seq_len=min(shape.tp, m.context))
    config = replace(config, mesh=str(shape), batch=shape.data, micro_batch=1, data=data)
    plan = plan_run(config)
    ends = _ends(folder, tokenizer)
    with start_ranks(config, plan) as pipe:
        weights = opened(pipe.spec, pipe.layout, plan.compute, plan.device)
        texts = generate(
            weights, prompts, o.tokens, m, pipe, o.temperature, o.top_p, o.seed, plan.device, ends
        )  # fmt: skip
    if plan.main:
        for ids in texts:
            print(tokenizer.decode(ids), flush=True)
    return 0


def _open(folder: Path) -> tuple[Callable[..., Any], ModelConfig]:
    """What loads the weights of a run directory or a Hugging Face folder, and their model."""
    if checkpoint.folder(folder).is_dir():
        config, found = read_run(folder)
        checkpoint.read_meta(found)  # it is whole
        return partial(checkpoint.load_params, found), config.model
    source = Source(folder)
    return source.load, source.model


def _ends(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """The tokens after which a text has ended."""
    for name in ("generation_config.json", CONFIG):
        if (folder / name).is_file():
            said = read_json(folder / name).get("eos_token_id")
            if said is not None:
                return set(said) if isinstance(said, list) else {said}
    end = end_id(tokenizer)
    return set() if end is None else {end}


def check_sampling(tokens: int, temperature: float, top_p: float) -> None:
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: at least 1 is generated; raise it")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"--temperature {temperature}: must be from 0, the likeliest token; change it"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: a probability over 0 and up to 1, all tokens; change it")


def parser() -> Parser:
    made = Parser(
        prog="python -m dtron.generate", description="Text from a model, on any mesh without cp."
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
        help="what to go on from; may be repeated",
    )
    add("--tokens", type=int, default=64, metavar="N", help="new tokens at most (64)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token (0.8)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest of this probability (1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    add("--mesh", default="", metavar="MESH", help="how the ranks are arranged, as tp=2")
    add("--simulate", action="store_true", help="run all ranks in this one process, on the CPU")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU where there is one",
    )
    dtypes = ["auto", "float32", "bfloat16", "float64"]
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    return made


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(list(argv)))
