"""From tokens to text, piece by piece.

A token may be a part of a character: a character of UTF-8 has up to four bytes. So the text of the
newest tokens is held back until it ends with a whole character. A stop string may be spread over
several tokens. So a text that may be the beginning of a stop string is held back too. The pieces
together are the text of all tokens, up to the stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens of the prompt that the first piece is decoded with


class TextStream:
    """The text of one request, as it grows.

    ``decode``: returns the text of tokens.
    ``prompt``: the tokens before the text. A tokenizer may decode a token in another way at the
        beginning of a text.
    ``stops``: the strings that end the text. They are not part of it.
    ``stopped``: whether a stop string was found."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
    ):
        self._decode, self._stops = decode, tuple(stops)
        self._tokens = list(prompt[-CONTEXT:])  # those of the last piece, and the ones after them
        self._done = len(self._tokens)  # the number of tokens in pieces
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token, and return the text that is certain now and was not before."""
        self._tokens.append(token)
        text = self._new_text()
        if self.stopped or not text or text.endswith(REPLACEMENT):
            return ""
        return self._certain(text)

    def end(self) -> str:
        """Return the rest of the text: no token follows."""
        if self.stopped:
            return ""
        text = self._certain(self._new_text())
        text, self._held = text + self._held, ""
        return text

    def _new_text(self) -> str:
        """Return the text of the tokens that are in no piece."""
        before = self._decode(self._tokens[: self._done])
        return self._decode(self._tokens)[len(before) :]

    def _certain(self, text: str) -> str:
        """Begin a new piece with this text, and return the part of it that is certain."""
        self._tokens, self._done = self._tokens[self._done :], len(self._tokens) - self._done
        text, self._held, self.stopped = find_stop(self._held + text, self._stops)
        return text


def find_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Return the text before a stop string, the rest of it, and whether there is one. The stop
    string that ends first counts, and the longest of several that end there. Without a stop string,
    the rest is the longest end of the text with which a stop string begins."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        _, at = min(ends)
        return text[:at], "", True
    longest = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - longest], text[len(text) - longest :], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which a stop string begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if stop.startswith(text[len(text) - n :])), 0)
