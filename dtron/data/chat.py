"""Conversations as training data. Only the assistant's messages are learned.

A row has ``messages``, and may have ``tools``, the functions that the assistant may call:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

A template turns a conversation into text. It is the tokenizer's own if the files beside its
tokenizer.json have one (chat_template.py). The ids are then exactly those that
``apply_chat_template`` of transformers gives. A message that spells a special token becomes this
token, as elsewhere with these templates.

Otherwise it is the simple template, ChatML:

    <|im_start|>user
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

If the tokenizer has tokens for the markers, the markers become these tokens; otherwise they are
plain text. With marker tokens no message can end itself or speak for another role, because the
content of a message is always plain text. The loss counts an assistant's words and the
``<|im_end|>`` after them, so a model also learns to stop. The token that ends a document follows
the last message and is learned too, if it is another token. The simple template has no tool calls
and refuses them.

chat_samples.py finds what is learned, and chat_encoding.py makes the ids. Left out: images, and
options of a template such as ``enable_thinking``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dtron.data.cache import SealedFile, cached, digest, read_sealed
from dtron.data.chat_encoding import offsets_encoder, sealed, signed_ids, unused_character
from dtron.data.chat_samples import END, ChatSample, chatml, notes_of, samples_of
from dtron.data.chat_template import Messages, Tools, plain, template_beside
from dtron.data.files import COLUMNS, find_files, grouped, suffix_of
from dtron.data.formats import records, understood
from dtron.data.special_tokens import add_config_tokens, end_id, tokenizer_config
from dtron.data.tokenization import vocab_of
from dtron.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
_TEMPLATE_ROLES = (*ROLES, "developer", "function", "ipython")
_BATCH = 256  # conversations that are encoded at once
_CHARACTERS = 1 << 22  # and the number of their characters: an encoded one takes some 100 bytes


class Conversation(NamedTuple):
    """A row: its place, for error messages, its messages and its tools.

    ``learned_from``: the number of messages at the beginning that are not learned."""

    where: str
    messages: Messages
    tools: Tools
    learned_from: int = 0


class Chats:
    """The conversations at ``path``, in an order that is the same in every process. Iteration gives
    the text of each conversation, for training a tokenizer.

    ``template``: the tokenizer's own; None: the simple template.
    ``count``, ``notes``: the number of conversations, and lines about what is left out of them.
    ``encode`` sets both."""

    def __init__(
        self,
        path: str | None,
        column: str,
        tokenizer_path: str | None,
        end_token: str | None = None,
    ) -> None:
        if path is None:
            raise UserError(
                "--data.chat without --data.path: there are no conversations; give a .jsonl of them"
            )
        found = find_files(path)
        self.path, self.column, self.files = path, column, found.files
        self.skipped = found.skipped_line(path)
        self.tokenizer_path, self.end_token = tokenizer_path, end_token
        self.template = template_beside(tokenizer_path)
        self.count = 0
        self.notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        stats = [(file.absolute(), file.stat()) for file in self.files]
        files = [f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in stats]
        return digest(["conversations", self.column, repr(self.template), *files])

    def __iter__(self) -> Iterator[str]:
        counts: Counter[str] = Counter()
        for conversation in self.conversations():
            yield from (sample.text for sample in self.samples(conversation, counts))

    def conversations(self) -> Iterator[Conversation]:
        """Yield the rows. Raises UserError for a row that is no conversation with an assistant."""
        found = False
        for file in self.files:
            with understood(file):
                for where, row in records(file, self.column, ("tools",)):
                    if suffix_of(file) in COLUMNS:  # a column has every key that some row has
                        row = plain(row, drop_none=True)
                    messages = self._checked(row.get(self.column), where)
                    found = True
                    yield Conversation(where, messages, _tools(row.get("tools"), where))
        if not found:
            raise UserError(
                f"--data.path {self.path!r} holds no conversation; give a .jsonl of them"
            )

    def samples(self, conversation: Conversation, counts: Counter[str]) -> list[ChatSample]:
        """Return the samples of a conversation.

        ``counts``: counts the conversations, and what is left out of them."""
        where, messages, tools, first = conversation
        counts["conversations"] += 1
        try:
            if self.template is None:
                samples = [chatml(messages, learned_from=first)]
                keys = {key for m in messages for key, value in m.items() if value is not None}
                counts.update(f"key {key}" for key in keys - {"role", "content"})
                counts["key tools"] += tools is not None
            else:
                samples = samples_of(self.template, messages, tools, counts, first)
                counts["tools"] += bool(tools) and not self.template.reads("tools", tools)
            for sample in samples:
                sample.text.encode()
        except UnicodeError as error:
            raise UserError(
                f"{where} has half of a surrogate pair, which is valid JSON and no text; write the "
                "whole pair, or drop it"
            ) from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return samples

    def encode(
        self, tokenizer: Tokenizer, cache: Path, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``(tokens, learn, lengths)``, cached.

        ``tokens``: the ids of all samples, concatenated.
        ``learn``: whether each id is learned.
        ``lengths``: the number of ids in each sample.

        ``end``: the token that ends a document; None: the token that `end_id` finds."""
        if self.template is not None:
            end = None  # the template ends its conversations
        elif end is None:
            end = end_id(tokenizer, self.tokenizer_path, self.end_token)
        config = {} if self.template is None else tokenizer_config(self.tokenizer_path)
        parts = [self.key, tokenizer.to_str(), str(end), json.dumps(config, sort_keys=True)]
        target = cache / f"chat-{digest(parts)}.int64"

        def write(file: Path) -> None:
            counts: Counter[str] = Counter()
            ids = list(self._encoded(tokenizer, end, counts))
            _write(file, ids, counts["conversations"], "\n".join(notes_of(self.path, counts)))

        whole = cached(target, _read, write)
        n, m, self.count = map(int, whole[:3])
        lengths, note, signed = np.split(whole[3:], [n, n + m])
        self.notes = tuple(filter(None, "".join(map(chr, note)).split("\n")))
        return np.where(signed < 0, ~signed, signed), signed >= 0, lengths

    def _encoded(
        self, tokenizer: Tokenizer, end: int | None, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        """Yield the ids of each sample, as ``~id`` if they are not learned."""
        conversations, text = self.conversations(), tokenizer.to_str()
        if self.template is not None:
            encoder = offsets_encoder(text)
            add_config_tokens(encoder, self.tokenizer_path)
            rows = vocab_of(tokenizer)
            for batch in _batches(conversations):
                found = [(c.where, sample) for c in batch for sample in self.samples(c, counts)]
                every = signed_ids(encoder, [sample for _, sample in found])
                for (where, _), ids in zip(found, every, strict=True):
                    _check_ids(ids, rows, encoder, where)
                    yield ids
            return
        closing = [] if end in (None, tokenizer.token_to_id(END)) else [end]
        for batch in _batches(conversations):
            for conversation in batch:
                self.samples(conversation, counts)
            contents = (m["content"] for c in batch for m in c.messages)
            encoder, start, stop = sealed(text, unused_character(contents))
            written = [chatml(c.messages, start, stop, c.learned_from) for c in batch]
            for ids in signed_ids(encoder, written):
                yield np.array([*ids, *closing], np.int64)

    def _checked(self, value: Any, where: str) -> Messages:
        wrong = None
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            wrong = f"{str(value)[:40]!r}, which is no list of messages"
        else:
            wrong = next(filter(None, map(self._fault, value)), None)
            if wrong is None and not any(message["role"] == "assistant" for message in value):
                wrong = "no message of the assistant, so there is nothing to learn"
        if wrong:
            raise UserError(
                f'{where} has in {self.column!r} {wrong}; write [{{"role": "user", "content": '
                '"..."}, {"role": "assistant", "content": "..."}]'
            )
        return value

    def _fault(self, message: dict[str, Any]) -> str | None:
        """Say what is wrong with a message; None if nothing is."""
        role, content = message.get("role"), message.get("content")
        roles = ROLES if self.template is None else _TEMPLATE_ROLES
        if role not in roles and not (self.template and self.template.names(role)):
            return f"a message of the role {role!r}; roles are {', '.join(roles)}"
        if self.template is None:
            if message.get("tool_calls"):
                return (
                    "tool_calls, which the simple template does not write: give a --data.tokenizer "
                    "folder whose chat template does"
                )
            if not isinstance(content, str):
                kind = type(content).__name__
                return f"a message of {role!r} whose content is {kind}, not a string"
        elif isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                return f"a message of {role!r} whose content is list, and not of texts alone"
        elif not isinstance(content, str | None):
            kind = type(content).__name__
            return f"a message of {role!r} whose content is {kind}, not a string"
        return None


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    def characters(conversation: Conversation) -> int:
        return sum(len(str(message.get("content"))) for message in conversation.messages)

    return grouped(conversations, characters, _CHARACTERS, _BATCH)


def _tools(value: Any, where: str) -> Tools:
    """Return the tools of a row: a list of objects, or the JSON of one."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, list):
            value = [json.loads(tool) if isinstance(tool, str) else tool for tool in value]
    except ValueError:
        pass
    if value is None or (isinstance(value, list) and all(isinstance(t, dict) for t in value)):
        return value
    raise UserError(
        f"{where} has in 'tools' {str(value)[:40]!r}, which is no list of objects; write "
        '[{"type": "function", "function": {...}}], or leave the column out'
    )


def _check_ids(ids: np.ndarray, rows: int, encoder: Tokenizer, where: str) -> None:
    """Raise UserError for a token that the tokenizer.json lacks."""
    largest = int(np.maximum(ids, ~ids).max(initial=-1))
    if largest >= rows:
        raise UserError(
            f"{where} has the token {encoder.id_to_token(largest)!r}, which tokenizer_config.json "
            "names and tokenizer.json lacks; save the tokenizer again, with this token"
        )


def _write(file: Path, samples: list[np.ndarray], count: int, notes: str) -> None:
    """Write the number of samples, the length of the notes, the number of conversations, the
    samples' lengths, the notes, and the ids, sealed."""
    sizes = [len(ids) for ids in samples]
    with SealedFile(file) as out:
        for part in ([len(samples), len(notes), count], sizes, [ord(c) for c in notes], *samples):
            out.write(np.asarray(part, np.int64).tobytes())


def _read(file: Path) -> np.ndarray | None:
    stored = read_sealed(file)
    return None if stored is None or len(stored) % 8 else stored.view(np.int64)
