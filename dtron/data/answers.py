"""Rows of a prompt and its answers as training data. Only the answers are learned.

    {"prompt": "2 + 2?", "completion": " 4"}
    {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5"}

``--data.kind completion`` has one answer in a row, and ``--data.kind preference`` a chosen and a
rejected one. Prompt and answers are texts, or lists of messages as in chat.py. A text is encoded as
it is, prompt and answer in one call, with the token that ends a document after it. Messages are
written by the tokenizer's chat template, or by the simple template.

A preference may have no prompt. Then the prompt is what its answers have in common at their
beginning: messages, or characters up to a white space. Each answer is a sample of its own, and the
two samples of a pair follow each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dtron.data.chat import Chats, Conversation
from dtron.data.chat_encoding import offsets_encoder, signed_ids
from dtron.data.chat_samples import ChatSample
from dtron.data.chat_template import plain
from dtron.data.files import COLUMNS, grouped, suffix_of
from dtron.data.formats import missing, records, understood
from dtron.errors import UserError

_BATCH = 256  # answers that are encoded at once
_CHARACTERS = 1 << 22


class Answer(NamedTuple):
    """One answer of a row: two texts, or two lists of messages."""

    where: str
    prompt: Any
    answer: Any


class Answers(Chats):
    """The rows at ``path``, in an order that is the same in every process.

    ``fields``: the field or column of each part of a row, by ``prompt``, ``completion``, ``chosen``
        and ``rejected`` (``DataConfig.fields``).
    ``texts``: whether the first row has texts, and not messages."""

    def __init__(
        self,
        path: str | None,
        fields: dict[str, str],
        tokenizer_path: str | None,
        end_token: str | None = None,
    ) -> None:
        if path is None:
            raise UserError(
                "--data.kind without --data.path: there are no rows; give a .jsonl of them"
            )
        super().__init__(path, repr(sorted(fields.items())), tokenizer_path, end_token)
        self.fields = fields
        first = next(self.answers(), None)
        if first is None:
            raise UserError(f"--data.path {path!r} holds no rows; give a .jsonl of them")
        self.texts = isinstance(first.answer, str)
        if self.texts:
            self.template = None  # texts are encoded as they are

    @property
    def in_pairs(self) -> bool:
        """Whether two answers in a row are a pair."""
        return "chosen" in self.fields

    def __iter__(self) -> Iterator[str]:
        if self.texts:
            yield from (sample.text for sample in map(_text_sample, self._same_kind()))
        else:
            yield from super().__iter__()

    def answers(self) -> Iterator[Answer]:
        """Yield the answers of all rows. Raises UserError for a row that is none."""
        first = next(name for name in self.fields if name != "prompt")
        flag = f"--data.columns {first}=..."
        others = tuple(column for name, column in self.fields.items() if name != first)
        for file in self.files:
            with understood(file):
                for where, row in records(file, self.fields[first], others, flag):
                    if suffix_of(file) in COLUMNS:  # a column has every key that some row has
                        row = plain(row, drop_none=True)
                    yield from self._answers(where, row)

    def _answers(self, where: str, row: dict[str, Any]) -> list[Answer]:
        parts = {name: row.get(column) for name, column in self.fields.items()}
        for name, value in parts.items():
            optional = name == "prompt" and self.in_pairs
            if value is None and not optional:
                raise missing(where, self.fields[name], list(row), f"--data.columns {name}=...")
        answers = [value for name, value in parts.items() if name != "prompt"]
        prompt = parts["prompt"]
        given = [value for value in parts.values() if value is not None]
        if not all(isinstance(value, str) for value in given):
            # A value of a third kind comes first: it is wrong beside texts and beside messages.
            for name, value in sorted(parts.items(), key=lambda part: isinstance(part[1], str)):
                listed = isinstance(value, list) and all(isinstance(m, dict) for m in value)
                if value is not None and not listed:
                    raise UserError(
                        f"{where} has in {self.fields[name]!r} {str(value)[:40]!r}; a row has "
                        "texts alone, or lists of messages alone, as "
                        '[{"role": "user", "content": "..."}]'
                    )
        if prompt is None:
            prompt, answers = _without_shared(answers)
        return [Answer(where, prompt, answer) for answer in answers]

    def _same_kind(self) -> Iterator[Answer]:
        """Yield the answers. Raises UserError for a row of messages among rows of texts, and the
        other way round."""
        for answer in self.answers():
            if isinstance(answer.answer, str) != self.texts:
                kinds = ("texts", "messages") if self.texts else ("messages", "texts")
                raise UserError(
                    f"{answer.where} has {kinds[1]}, and the first row {kinds[0]}; give a file of "
                    "one kind"
                )
            yield answer

    def conversations(self) -> Iterator[Conversation]:
        """Yield a conversation for each answer of messages."""
        for where, prompt, answer in self._same_kind():
            messages = self._checked([*prompt, *answer], where)
            if not any(m["role"] == "assistant" for m in answer):
                raise UserError(
                    f"{where} has an answer without a message of the assistant, so there is "
                    "nothing to learn; add one"
                )
            yield Conversation(where, messages, None, len(prompt))

    def samples(self, conversation: Conversation, counts: Counter[str]) -> list[ChatSample]:
        """Return the sample of an answer of messages, or its samples where it is in no pair."""
        samples = super().samples(conversation, counts)
        if self.in_pairs and len(samples) > 1:
            raise UserError(
                f"{conversation.where}: an answer has several messages of the assistant, and the "
                "tokenizer's chat template changes earlier turns; write one message as the answer"
            )
        return samples

    def _encoded(
        self, tokenizer: Tokenizer, end: int | None, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        if not self.texts:
            yield from super()._encoded(tokenizer, end, counts)
            return
        encoder = offsets_encoder(tokenizer.to_str())
        for batch in grouped(self._same_kind(), _size, _CHARACTERS, _BATCH):
            counts["conversations"] += len(batch)
            for ids in signed_ids(encoder, list(map(_text_sample, batch))):
                if end is not None and (not len(ids) or ids[-1] != end):
                    ids = np.append(ids, end)
                yield ids


def _size(answer: Answer) -> int:
    return len(answer.prompt) + len(answer.answer)


def _text_sample(answer: Answer) -> ChatSample:
    text = answer.prompt + answer.answer
    try:
        text.encode()
    except UnicodeError as error:
        raise UserError(
            f"{answer.where} has half of a surrogate pair, which is valid JSON and no text; write "
            "the whole pair, or drop it"
        ) from error
    return ChatSample(text, ((len(answer.prompt), len(text)),))


def _without_shared(answers: list[Any]) -> tuple[Any, list[Any]]:
    """Return what the answers have in common at their beginning, and the rest of each."""
    if isinstance(answers[0], str):
        shared = commonprefix(answers)
        if any(len(answer) > len(shared) for answer in answers):  # no word is cut
            shared = shared[: 1 + max(map(shared.rfind, " \n\t"))]
        return shared, [answer[len(shared) :] for answer in answers]
    most = min(map(len, answers)) - 1  # the last message is always the answer
    pairs = list(zip(*answers, strict=False))[:most]
    n = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return answers[0][:n], [answer[n:] for answer in answers]
