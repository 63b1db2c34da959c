"""A model of dtron in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness has the tasks: their texts, few-shot examples and metrics. It asks a model for three
things: the log-probability of a continuation, that of a whole text, and text that is generated
until a stop string. ``HarnessModel`` answers on any mesh. Every rank runs the harness on the same
tasks and answers with the same numbers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from dtron.data.files import one_line
from dtron.data.tokenization import encoder_of, ids_of, text_of
from dtron.errors import UserError
from dtron.runtime.scoring import Scorer, Text

Generate = Callable[[list[list[int]], int, float], list[list[int]]]
"""``(prompts, most new tokens, temperature) -> prompts with their continuations``"""


class HarnessModel(TemplateLM):
    """The model that the harness asks."""

    def __init__(
        self,
        scorer: Scorer,
        generate: Generate,
        tokenizer: Tokenizer,
        context: int,
        end: int,
        chat: Callable[[list[dict[str, str]]], str] | None = None,
    ):
        """
        ``generate``: continues prompts.
        ``context``: the model's context.
        ``end``: the token that stands before a text without context.
        ``chat``: renders a conversation as a prompt (None: the model has no template)."""
        super().__init__()
        self._scorer, self._generate, self._chat = scorer, generate, chat
        self._tokenizer = tokenizer
        self._plain, self._special = (encoder_of(tokenizer, special=x) for x in (False, True))
        self._context, self._end = context, end

    @property
    def tokenizer_name(self) -> str:
        """The name in the harness's cache of requests."""
        return "dtron"

    @property
    def eot_token_id(self) -> int:
        return self._end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        encoder = self._special if add_special_tokens is None else self._plain
        return ids_of(encoder, [string])[0]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [Text([*context, *counted], len(counted)) for _, context, counted in requests]
        return [(s.log_probability, s.greedy) for s in self._scorer(texts)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the model's context. The windows do not overlap, but for
        the last one."""
        windows: list[Text] = []
        counts = []
        for request in requests:
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._end,
                max_seq_len=self._context,
                context_len=1,
            )
            texts = [Text([*a, *b], len(b)) for a, b in map(make_disjoint_window, parts)]
            windows += texts
            counts.append(len(texts))
        scores = iter(self._scorer(windows))
        return [sum(next(scores).log_probability for _ in range(n)) for n in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate text up to a stop string. Requests with equal options run together."""
        options = [_options(request.args[1], self._context) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: repr(options[i]))
        texts: dict[int, str] = {}
        for (until, most, temperature), group in groupby(order, key=options.__getitem__):
            members = list(group)
            prompts = [
                self.tok_encode(requests[i].args[0])[most - self._context :] for i in members
            ]
            for i, prompt, ids in zip(
                members, prompts, self._generate(prompts, most, temperature), strict=True
            ):
                texts[i] = _until(text_of(self._tokenizer, ids[len(prompt) :]), until)
        return [texts[i] for i in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self._chat is None:
            raise UserError("--chat: the model has no chat template; leave --chat out")
        return self._chat(chat_history)


def _options(options: dict[str, Any], context: int) -> tuple[tuple[str, ...], int, float]:
    """Return the stop strings, the most new tokens and the temperature of a request."""
    until = options.get("until") or []
    until = (until,) if isinstance(until, str) else tuple(until)
    most = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
    draws = options.get("do_sample", False)
    return until, min(most, context - 1), float(options.get("temperature", 1.0)) if draws else 0.0


def _until(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


Metrics = dict[str, tuple[float, float | None]]
"""value and standard error of each metric"""


class Tasks(NamedTuple):
    """Tasks of the harness, and the manager that knows them."""

    names: list[str]
    manager: TaskManager


def find(text: str, flag: str) -> Tasks:
    """Find tasks. Raises UserError for a task that the harness does not know.

    ``text``: names of tasks or files of YAML, with commas between.
    ``flag``: the flag that names them."""
    names, folders = [], list[str]()
    for task in filter(None, (part.strip() for part in text.split(","))):
        if task.endswith((".yaml", ".yml")):
            names.append(_name_in(Path(task), flag))
            folders.append(str(Path(task).parent))
        else:
            names.append(task)
    manager = TaskManager(include_path=folders or None)
    known = {*manager.all_tasks}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise UserError(f"{flag} {name}: is unknown; did you mean {near[0]}?")
    return Tasks(names, manager)


def run_tasks(
    model: HarnessModel, tasks: Tasks, fewshot: int | None, limit: int | None, chat: bool
) -> dict[str, Metrics]:
    """Return the metrics of each task."""
    try:
        done = simple_evaluate(
            model,
            tasks=[*tasks.names],
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=tasks.manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:  # no such file of the task's data, or no network
        raise UserError(
            f"{','.join(tasks.names)}: the data of a task cannot be read "
            f"({one_line(error)[:120]}); give tasks whose data this machine has"
        ) from error
    assert done is not None
    return {name: _metrics(values) for name, values in done["results"].items()}


def _name_in(file: Path, flag: str) -> str:
    """Return the name of the task in a file of YAML."""
    if not file.is_file():
        raise UserError(f"{flag} {file}: is no file; give a file of YAML, or the name of a task")
    found = re.search(r"^task:\s*['\"]?([\w.-]+)", file.read_text(), re.M)
    if found is None:
        raise UserError(f"{flag} {file}: has no line 'task: NAME'; give the task a name")
    return found[1]


def _metrics(values: dict[str, Any]) -> Metrics:
    """Return the metrics of a task. The harness calls them NAME,FILTER and NAME_stderr,FILTER."""
    metrics: Metrics = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        shown = name if kind == "none" else f"{name} ({kind})"
        metrics[shown] = float(value), error if isinstance(error, float) else None
    return metrics
