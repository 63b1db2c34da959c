"""Rows of prompts and answers: what is learned, pairs in one row, and refused rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dtron.data import open_data
from dtron.data.answers import Answers
from dtron.data.config import DataConfig
from dtron.losses.sequence_sums import count_pairs
from dtron.testing import assert_caught
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.chats import chatml_tokenizer, folder_of, write_rows
from tests.helpers.texts import one_line

PAIR = ("prompt", "chosen", "rejected")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, FOUR, FIVE = said("user", "2 + 2?"), said("assistant", "4"), said("assistant", "5")
TALK = [USER, FOUR, said("user", "sure?")]


def answers_of(tmp_path, rows, names=PAIR, template=None, **columns):
    """The learned text of each answer, and its whole text."""
    if template is None:
        tokenizer = chatml_tokenizer(tmp_path)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    else:
        folder_of(tmp_path, "bytes", template)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fields = {name: name for name in names} | columns
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    found = Answers(file, fields, str(tmp_path / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    tokens, learn, lengths = found.encode(tokenizer, tmp_path / "cache", end)
    cuts = np.cumsum(lengths)[:-1]
    parts = zip(np.split(tokens, cuts), np.split(learn, cuts), strict=True)
    decode = lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return [(decode(ids[flags]), decode(ids)) for ids, flags in parts]


def test_texts_are_encoded_as_they_are_and_the_answer_is_learned(tmp_path):
    row = {"q": "2 + 2?", "chosen": " 4", "rejected": " 5 or so"}
    assert answers_of(tmp_path, [row], prompt="q") == [
        (" 4<|endoftext|>", "2 + 2? 4<|endoftext|>"),
        (" 5 or so<|endoftext|>", "2 + 2? 5 or so<|endoftext|>"),
    ]
    row = {"prompt": "2 + 2?", "completion": " 4"}
    (found,) = answers_of(tmp_path, [row], ("prompt", "completion"))
    assert found == (" 4<|endoftext|>", "2 + 2? 4<|endoftext|>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 2 + 2? A: 4", "Q: 2 + 2? A: 5", "Q: 2 + 2? A: "),
        ("A: yes, 44", "A: yes, 45", "A: yes, "),  # no word is cut
        ("yes", "yellow", ""),
        ("A: 4", "A: 4 it is", "A: "),
    ],
)
def test_the_prompt_is_what_texts_have_in_common(tmp_path, chosen, rejected, prompt):
    found = answers_of(tmp_path, [{"chosen": chosen, "rejected": rejected}])
    for (learned, whole), text in zip(found, (chosen, rejected), strict=True):
        assert whole == f"{text}<|endoftext|>"
        assert learned.strip() == f"{text.removeprefix(prompt)}<|endoftext|>"


@pytest.mark.parametrize("shared", [True, False])
def test_only_the_messages_after_the_prompt_are_learned(tmp_path, shared):
    """With a prompt of its own, or with the shared beginning of both answers as the prompt. Both
    have an answer of the assistant, which is not learned."""
    row = {"chosen": [*TALK, FOUR], "rejected": [*TALK, FIVE]}
    if not shared:
        row = {"prompt": TALK, "chosen": [FOUR], "rejected": [FIVE]}
    for (learned, whole), answer in zip(answers_of(tmp_path, [row]), "45", strict=True):
        assert learned == f"{answer}<|im_end|><|endoftext|>"
        assert whole.count("assistant") == 2 and "sure?" in whole


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_of_tokenizers_too(tmp_path, name):
    """Only the last answer is learned, in each style of template."""
    row = {"prompt": TALK, "chosen": [said("assistant", "blue")], "rejected": [FIVE]}
    found = answers_of(tmp_path, [row], template=TEMPLATES[name])
    # This tokenizer has no decoder: there is a space between tokens.
    (learned, whole), other = [[x.replace(" ", "") for x in texts] for texts in found]
    assert "blue" in learned and "4" not in learned.replace("blue", "")
    assert "5" in other[0] and "4" in whole and "blue" not in other[1]


def test_a_prompt_that_is_learned_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("dtron.data.answers._without_shared", lambda answers: ([], answers))
    assert_caught(lambda: test_only_the_messages_after_the_prompt_are_learned(tmp_path, True))


def packed(tmp_path, seq_len: int = 48):
    tokenizer = chatml_tokenizer(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [
        {"prompt": "2 + 2?", "chosen": " 4" * (1 + i % 5), "rejected": " 5" * (1 + i * i % 7)}
        for i in range(60)
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    d = DataConfig(
        path=path,
        tokenizer=str(tmp_path / "tokenizer.json"),
        end_token="<|endoftext|>",
        kind="preference",
        seq_len=seq_len,
        validation_ratio=0.2,
    )
    return open_data(d, 400, 0, 100, tmp_path / "cache"), tokenizer


def assert_pairs_are_in_one_row(tmp_path):
    data, tokenizer = packed(tmp_path)
    assert len(data.train) < 48  # several pairs to a row
    rows = data.train.rows(0, len(data.train))
    for tokens, documents, counted in zip(rows.tokens, rows.documents, rows.counted, strict=True):
        last = documents.max() if counted[-1] else documents[counted].max() + 1
        assert last % 2 == 0 or counted[-1]
        for k in range(0, documents[counted].max(), 2):
            answers = [tokens[1:][counted & (documents == d)].tolist() for d in (k, k + 1)]
            chosen, rejected = map(tokenizer.decode, answers)
            assert set(chosen) == {" ", "4"} and set(rejected) == {" ", "5"}
    number = count_pairs(torch.from_numpy(rows.documents), torch.from_numpy(rows.counted))
    held = data.validation.rows(0, len(data.validation))
    number += count_pairs(torch.from_numpy(held.documents), torch.from_numpy(held.counted))
    assert number == 60 and not data.notes


def test_pairs_are_in_one_row(tmp_path):
    assert_pairs_are_in_one_row(tmp_path)


def test_answers_packed_one_by_one_are_caught(tmp_path, monkeypatch):
    from dtron.data import chat_rows

    alone = chat_rows.TokenizedDocuments
    monkeypatch.setattr(chat_rows, "TokenizedDocuments", lambda *xs: alone(*xs[:4]))
    assert_caught(lambda: assert_pairs_are_in_one_row(tmp_path))


def test_pairs_that_do_not_fit_are_dropped_with_a_note(tmp_path):
    data, _ = packed(tmp_path, seq_len=26)
    (note,) = data.notes
    assert "of 60 pairs do not fit into 26 tokens" in note and "--data.seq-len" in note


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], ["line 1", "'rejected'", "--data.columns rejected=..."]),
        ([{"prompt": "a", "rejected": "b"}], ["line 1", "'chosen'", "--data.columns chosen=..."]),
        ([{"chosen": "b", "rejected": 3}], ["line 1", "'3'", "texts"]),
        ([{"prompt": "a", "chosen": [FOUR], "rejected": [FIVE]}], ["line 1", "'a'", "messages"]),
        (
            [{"chosen": "b", "rejected": "c"}, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}],
            ["line 2", "has messages, and the first row texts"],
        ),
        ([{"prompt": [USER], "chosen": [USER], "rejected": [FIVE]}], ["line 1", "assistant"]),
        ([{"chosen": [said("boss", "x")], "rejected": [FIVE]}], ["line 1", "boss"]),
        ([{"chosen": "\ud800", "rejected": "c"}], ["line 1", "surrogate"]),
        ([], ["holds no rows"]),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_number(tmp_path, rows, words):
    one_line(lambda: answers_of(tmp_path, rows), *words)


def test_columns_are_named_by_their_parts():
    d = DataConfig(kind="completion", columns="prompt=question, completion=answer")
    assert d.fields == {"prompt": "question", "completion": "answer"}
    for columns in ("chosen=a", "prompt", "prompt="):
        one_line(lambda c=columns: DataConfig(kind="completion", columns=c), "prompt=NAME")
    one_line(lambda: DataConfig(columns="prompt=a"), "--data.kind completion")
    one_line(lambda: DataConfig(kind="preference", chat=True), "--data.chat")


def test_parquet_has_the_same_answers(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}]
    want = answers_of(tmp_path, rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    json_rows = json.loads(json.dumps(rows))
    found = Answers(str(tmp_path / "rows.parquet"), dict(zip(PAIR, PAIR, strict=True)), None)
    got = [(a.prompt, a.answer) for a in found.answers()]
    assert got == [(json_rows[0]["prompt"], json_rows[0][name]) for name in PAIR[1:]]
    assert len(want) == 2
