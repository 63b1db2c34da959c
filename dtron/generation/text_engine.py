"""The engine with a tokenizer: pieces of text instead of tokens, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tokenizers import Tokenizer

from dtron.data.tokenization import NO_TOKEN, text_of
from dtron.data.tokenizer_library import library
from dtron.errors import UserError
from dtron.generation.engine import Engine
from dtron.generation.sampling import Sampling
from dtron.generation.text_stream import TextStream


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Return the tokens of a prompt.

    ``special``: whether to add the tokens that the tokenizer begins a text with."""
    with library("--prompt: the tokenizer cannot encode it", NO_TOKEN):
        return tokenizer.encode(text, add_special_tokens=special).ids


def check_stops(stops: Sequence[str]) -> None:
    """Raise UserError for a stop string without characters."""
    if not all(stops):
        raise UserError("--stop '': an empty text is everywhere; give at least one character")


@dataclass(frozen=True)
class TextEvent:
    """A piece of a text.

    ``text``: whole characters; it may be empty.
    ``finished``: "stop" after an end token or a stop string, "length" after the last token that was
        asked for, None if the text goes on."""

    number: int
    text: str
    finished: Literal["stop", "length"] | None


class TextEngine:
    """Generates the texts of requests.

    ``tokenizer``: neither truncates nor pads.
    ``ends``: the tokens that end a text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, ends: Set[int] = frozenset()):
        self._engine, self._tokenizer, self._ends = engine, tokenizer, frozenset(ends)
        self._streams: dict[int, TextStream] = {}

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._engine.busy

    def add(
        self,
        prompt: Sequence[int],
        tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stops: Sequence[str] = (),
    ) -> int:
        """Add a request, and return its number; see ``Engine.add``.

        ``prompt``: its tokens.
        ``stops``: the strings that end the text. They are not part of it."""
        check_stops(stops)
        number = self._engine.add(prompt, tokens, sampling, self._ends)
        self._streams[number] = TextStream(partial(text_of, self._tokenizer), prompt, stops)
        return number

    def cancel(self, number: int) -> None:
        """Remove a request. Nothing happens if it has ended."""
        self._engine.cancel(number)
        self._streams.pop(number, None)

    def step(self) -> list[TextEvent]:
        """Run a step of the engine. Return an event for each new token."""
        events = []
        for event in self._engine.step():
            stream, finished = self._streams[event.number], event.finished
            text = stream.push(event.token)
            if finished and not stream.stopped:
                text += stream.end()
            if stream.stopped:  # the end of the text may have one too
                finished = "stop"
            events.append(TextEvent(event.number, text, finished))
            if finished:
                self.cancel(event.number)
        return events
