"""Conversations as training data. Only the assistant's messages are learned.

A row has ``messages``:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

A template turns a conversation into text. The simple template, ChatML, is dtron's own:

    <|im_start|>user
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

If the tokenizer has tokens for the markers, the markers become these tokens; otherwise they are
plain text. With marker tokens no message can end itself or speak for another role, because the
content of a message is always plain text. The loss counts an assistant's words and the
``<|im_end|>`` after them, so a model also learns to stop. If the tokenizer has a separate token
that ends a document, this token follows the last message and is learned too.

The other template is the tokenizer's own: the ``chat_template`` of the tokenizer_config.json (or
chat_template.jinja) beside tokenizer.json. It is rendered by jinja2's sandbox, in which a template
cannot run anything. The learned text of an assistant's message is the text that the template adds
for this message after the generation prompt. Here a message that spells a special token becomes
this token, as elsewhere with these templates. Left out: tools, images, and templates that change
the text of earlier messages, which are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dtron.data.cache import cached, digest
from dtron.data.files import find_files, one_line
from dtron.data.formats import cells, understood
from dtron.data.tokenization import encoder_of, end_id, ids_of
from dtron.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
START, END = "<|im_start|>", "<|im_end|>"

Segment = tuple[str, bool, bool]  # text; is it learned; do its special tokens become tokens
Messages = list[dict[str, str]]
Template = Callable[[Messages], list[Segment]]


def chatml(messages: Messages) -> list[Segment]:
    """Render messages with the simple template."""
    found = []
    for message in messages:
        learn = message["role"] == "assistant"
        found += [
            (f"{START}{message['role']}\n", False, True),
            (message["content"], learn, False),
            (END, learn, True),
            ("\n", False, False),
        ]
    return found


class Chats:
    """The conversations at ``path``, in an order that is the same in every process. Iteration gives
    the text of each conversation, for training a tokenizer.

    The template is the tokenizer's own if there is one beside ``tokenizer_path``, and chatml
    otherwise."""

    def __init__(self, path: str | None, column: str, tokenizer_path: str | None) -> None:
        if path is None:
            raise UserError(
                "--data.chat without --data.path: there are no conversations; give a .jsonl of them"
            )
        found = find_files(path)
        self.path, self.column, self.files = path, column, found.files
        self.skipped = found.skipped_line(path)
        self.source = template_beside(tokenizer_path)
        self.template = chatml if self.source is None else own_template(*self.source)

    @property
    def key(self) -> str:
        stats = [(file.absolute(), file.stat()) for file in self.files]
        files = [f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in stats]
        return digest(["chat", self.column, repr(self.source), *files])

    def __iter__(self) -> Iterator[str]:
        return ("".join(text for text, *_ in segments) for segments in self.segments())

    def segments(self) -> Iterator[list[Segment]]:
        """Yield the segments of each conversation. Raises UserError for a row that is no
        conversation with an assistant in it."""
        found = False
        for file in self.files:
            with understood(file):
                for where, value in cells(file, self.column):
                    messages = _checked(value, where, self.column)
                    found = True
                    try:
                        yield self.template(messages)
                    except ValueError as error:
                        raise UserError(f"{where}: {error}") from error
        if not found:
            raise UserError(
                f"--data.path {self.path!r} holds no conversation; give a .jsonl of them"
            )

    def encode(
        self, tokenizer: Tokenizer, cache: Path
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``(tokens, learn, lengths)``, cached.

        ``tokens``: the ids of all conversations, concatenated.
        ``learn``: whether each id is learned.
        ``lengths``: the number of ids in each conversation."""
        target = cache / f"chat-{digest([self.key, tokenizer.to_str()])}.npy"

        def write(file: Path) -> None:
            _write(file, self._encoded(tokenizer))

        whole = cached(target, _read, write)
        n = int(whole[0])
        lengths, signed = whole[1 : n + 1], whole[n + 1 :]
        return np.where(signed < 0, ~signed, signed), signed >= 0, lengths

    def _encoded(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """Yield the ids of each conversation, as ``~id`` if they are not learned."""
        encoders = [encoder_of(tokenizer, special) for special in (False, True)]
        end = end_id(tokenizer) if self.source is None else None
        closing = [] if end in (None, tokenizer.token_to_id(END)) else [end]
        conversations = self.segments()
        while batch := list(islice(conversations, 256)):
            flat = [segment for segments in batch for segment in segments]
            ids: list[list[int]] = [[] for _ in flat]
            for special, encoder in enumerate(encoders):
                mine = [i for i, segment in enumerate(flat) if segment[2] == special]
                for i, found in zip(mine, ids_of(encoder, [flat[i][0] for i in mine]), strict=True):
                    ids[i] = found
            parts = iter(zip(flat, ids, strict=True))
            for segments in batch:
                signed = [
                    t if seg[1] else ~t for seg, got in islice(parts, len(segments)) for t in got
                ]
                yield np.array(signed + closing, np.int64)


def _checked(value: Any, where: str, column: str) -> Messages:
    wrong = None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        wrong = f"{str(value)[:40]!r}, which is no list of messages"
    else:
        for message in value:
            if message.get("role") not in ROLES:
                wrong = (
                    f"a message of the role {message.get('role')!r}; roles are {', '.join(ROLES)}"
                )
            elif not isinstance(message.get("content"), str):
                kind = type(message.get("content")).__name__
                wrong = f"a message of {message['role']!r} whose content is {kind}, not a string"
    if not wrong and not any(message["role"] == "assistant" for message in value):
        wrong = "no message of the assistant, so there is nothing to learn"
    if wrong:
        raise UserError(
            f'{where} has in {column!r} {wrong}; write [{{"role": "user", "content": "..."}}, '
            '{"role": "assistant", "content": "..."}]'
        )
    return value


def _write(file: Path, conversations: Iterable[np.ndarray]) -> None:
    """Write the number of conversations, their lengths, and their ids."""
    found = list(conversations)
    parts = [[len(found)], [len(ids) for ids in found], *found]
    with file.open("wb") as out:
        np.save(out, np.concatenate([np.asarray(part, np.int64) for part in parts]))


def _read(file: Path) -> np.ndarray | None:
    try:
        whole = np.load(file, mmap_mode="r", allow_pickle=False)
        return (
            whole if whole[1 : int(whole[0]) + 1].sum() == len(whole) - 1 - int(whole[0]) else None
        )
    except (OSError, ValueError, EOFError):
        return None


# ---------------------------------------------------------------------------- jinja templates


def template_beside(tokenizer_path: str | None) -> tuple[str, str, str] | None:
    """Return ``(template, bos token, eos token)`` of the tokenizer_config.json beside a
    tokenizer.json, or None."""
    if tokenizer_path is None:
        return None
    path = Path(tokenizer_path).expanduser()
    folder = path if path.is_dir() else path.parent
    config_file, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        template = jinja.read_text() if jinja.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(config_file)!r} cannot be read ({one_line(error)}); mend it, or move "
            "tokenizer.json to a folder without it for the simple template"
        ) from error
    if isinstance(template, list):  # several templates by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None:
        return None
    bos, eos = (_content(config.get(name)) for name in ("bos_token", "eos_token"))
    return template, bos, eos


def _content(token: Any) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or ""


def own_template(source: str, bos: str, eos: str) -> Template:
    """Return a template from jinja source. It renders as transformers would render it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    # transformers marks the assistant's text with this tag; dtron compares rendered texts instead.
    source = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", source)
    source = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", source)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template is malformed ({one_line(error)}); mend it, or move "
            "tokenizer.json to a folder without tokenizer_config.json for the simple template"
        ) from error

    def render(messages: Messages, prompt: bool) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos
            )
        except Exception as error:  # a template may fail in any way
            raise UserError(
                f"the tokenizer's chat template cannot render it ({one_line(error)}); change the "
                "messages, or move tokenizer.json to a folder without tokenizer_config.json for "
                "the simple template"
            ) from error

    def segments(messages: Messages) -> list[Segment]:
        found, done = [], ""
        whole = render(messages, False)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(messages[:i], True), render(messages[: i + 1], False)
                if not (
                    before.startswith(done) and after.startswith(before) and whole.startswith(after)
                ):
                    raise UserError(
                        "the tokenizer's chat template changes earlier messages, so what the "
                        "assistant said cannot be found; give one that only adds, or a folder "
                        "without it"
                    )
                found += [(before[len(done) :], False, True), (after[len(before) :], True, True)]
                done = after
        return [*found, (whole[len(done) :], False, True)]

    return segments
