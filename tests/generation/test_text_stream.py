"""Pieces of text are the text of all tokens, up to the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dtron.generation import text_stream
from dtron.generation.text_stream import REPLACEMENT, TextStream
from dtron.testing import assert_caught


def tokenizer(*merges: str) -> Tokenizer:
    """A byte-level tokenizer, with tokens for these texts too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(list(merges))
    return made


TOKENIZER = tokenizer("ab", "b€", "aab")
LETTERS = "ab €😀é"
TEXTS = st.text(LETTERS, max_size=12)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)


def stream_of(ids: list[int], stops: list[str], prompt: list[int]) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER.decode, prompt, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    pieces.append(stream.end())
    return pieces, stream.stopped


def before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the text grows by characters until it ends with a stop string."""
    for n in range(len(text) + 1):
        found = [stop for stop in stops if text[:n].endswith(stop)]
        if found:
            return text[: n - max(map(len, found))], True
    return text, False


def assert_pieces(text: str, stops: list[str], prompt: str) -> None:
    pieces, stopped = stream_of(
        TOKENIZER.encode(text).ids, stops, TOKENIZER.encode(prompt).ids if prompt else []
    )
    assert ("".join(pieces), stopped) == before_stop(text, stops)
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(TEXTS, STOPS, TEXTS)
@example("xa😀b", ["😀b"], "")
@example("aab", ["ab", "aab"], "b")
@example("aaab", ["aab"], "")
@example("a€", ["€b"], "")
def test_pieces_are_the_text_before_a_stop(text, stops, prompt):
    assert_pieces(text, stops, prompt)


def test_a_character_comes_whole():
    pieces, _ = stream_of(TOKENIZER.encode("é😀").ids, [], [])
    assert [piece for piece in pieces if piece] == ["é", "😀"]


def test_bytes_that_are_no_text_come_at_the_end():
    """A text may end within a character, and a model may write any bytes."""
    half = TOKENIZER.encode("a😀").ids[:3]
    assert stream_of(half, [], [])[0] == ["a", "", "", REPLACEMENT]
    letter = TOKENIZER.encode("b").ids
    assert "".join(stream_of(half + letter, [], [])[0]) == f"a{REPLACEMENT}b"


def late(text, stops):
    """A stop string that is spread over pieces is not held back."""
    before, rest, stopped = FIND(text, stops)
    return (before, rest, True) if stopped else (text, "", False)


def first_given(text, stops):
    """The stop string that is given first counts."""
    found = next((stop for stop in stops if stop in text), None)
    return FIND(text, stops) if found is None else (text[: text.find(found)], "", True)


FIND = text_stream.find_stop


@pytest.mark.parametrize(
    ("mutant", "text", "stops"), [(late, "b b", ["b b"]), (first_given, "aab", ["ab", "aab"])]
)
def test_a_stop_that_is_missed_is_caught(mutant, text, stops, monkeypatch):
    monkeypatch.setattr(text_stream, "find_stop", mutant)
    assert_caught(lambda: assert_pieces(text, stops, ""))


def test_a_character_in_halves_is_caught(monkeypatch):
    monkeypatch.setattr(text_stream, "REPLACEMENT", "\0")
    assert_caught(lambda: assert_pieces("😀", [], ""))
