"""dtron.data.chat: reading conversations, the simple template, and what is left out."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from dtron.data import open_data
from dtron.data.chat import Chats
from dtron.runtime.config import DataConfig
from tests.helpers import chats as styles
from tests.helpers.chats import ASK, TALK, chatml_tokenizer, chats
from tests.helpers.texts import one_line


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chatml_tokenizer(tmp_path_factory.mktemp("t"))


def test_a_template_in_a_file_of_its_own(tmp_path, tokenizer):
    plain = "{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(plain)
    assert list(chats(tmp_path, [ASK], tokenizer, {"eos_token": "!"})) == ["2 + 2? !4 !"]


def test_notes_about_a_template(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    calls = [ASK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    forgetful = (
        "{% for m in messages if loop.last or m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    picky = "{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def notes(template: str, conversations: list, **more) -> str:
        rows = [{"messages": talk, **more} for talk in conversations]
        styles.write_rows(tmp_path / "chat.jsonl", rows)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        found = Chats(str(tmp_path / "chat.jsonl"), "messages", str(tmp_path))
        found.encode(tokenizer, tmp_path / "cache")
        return " ".join(found.notes)

    assert notes(plain, [ASK, TALK]) == ""
    forgotten = notes(forgetful.replace("loop.last", "m == messages[-1]"), [ASK, TALK, TALK])
    assert "changes earlier turns in 2 of 3 conversations" in forgotten
    assert "1 answers are not learned" in notes(picky + plain, [ASK * 2])
    assert "1 answers with tool calls" in notes(plain, [calls, TALK])
    assert "the tools that 2 conversations have" in notes(plain, [ASK, TALK], tools=[call])
    assert notes("{{ tools }}" + plain, [ASK, TALK], tools=[call]) == ""


def test_tools_are_read(tmp_path, tokenizer):
    template = "{{ tools | tojson if tools is not none }}{% for m in messages %}.{% endfor %}"
    config = {"chat_template": template}
    found = chats(tmp_path, [ASK], tokenizer, config)
    tool = {"name": "add", "parameters": {"a": None}}
    for given_tools, want in (
        ([tool], json.dumps([tool])),
        (json.dumps([tool]), json.dumps([tool])),
        ([json.dumps(tool)], json.dumps([tool])),
        ([], "[]"),
        (None, ""),
    ):
        styles.write_rows(tmp_path / "chat.jsonl", [{"messages": ASK, "tools": given_tools}])
        assert list(found) == [want + ".."]
    for wrong in ("add", [1], {"a": 1}):
        styles.write_rows(tmp_path / "chat.jsonl", [{"messages": ASK, "tools": wrong}])
        one_line(lambda: list(found), "line 1", "'tools'", "no list of objects", "leave the column")


def test_a_column_has_no_keys_of_other_rows(tmp_path, tokenizer):
    """A struct of Parquet has every key that some row has. Null keys are not the row's own."""
    template = (
        "{{ tools | tojson if tools is not none }}{% for m in messages %}{{ m.keys() | list }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    def tool(name: str) -> dict:
        return {"name": name, "parameters": {name: {"type": "int"}}}

    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    other = [{"function": {"name": "mul", "arguments": {"b": 2}}}]
    rows = [
        {"messages": ASK, "tools": None},
        {"messages": [{"role": "assistant", "tool_calls": calls}], "tools": [tool("add")]},
        {"messages": [{"role": "assistant", "tool_calls": other}], "tools": [tool("mul")]},
    ]
    styles.write_rows(tmp_path / "c.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    texts = [
        list(Chats(str(tmp_path / n), "messages", str(tmp_path))) for n in ("c.jsonl", "c.parquet")
    ]
    assert texts[0] == texts[1] and "null" not in texts[1]


def test_roles_and_contents_of_a_template(tmp_path, tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'critic' %}!{% endif %}{{ m.content }}{% endfor %}"
    )
    config = {"chat_template": template}

    def said(*messages: dict) -> list[str]:
        return list(chats(tmp_path, [[*messages, ASK[1]]], tokenizer, config))

    assert said({"role": "critic", "content": "a"}, {"role": "developer", "content": "b"}) == [
        "!ab4"
    ]
    assert said({"role": "user", "content": None}) == ["4"]
    parts = [{"type": "text", "text": "a"}]
    assert said({"role": "user", "content": parts}) == [f"{parts}4"]
    for bad, part in (
        ({"role": "bot", "content": ""}, "role 'bot'"),
        ({"role": ["user"], "content": ""}, "role ['user']"),
        ({"role": "", "content": ""}, "role ''"),
        ({"role": "user", "content": 3}, "content is int"),
        ({"role": "user", "content": [{"type": "image"}]}, "not of texts alone"),
    ):
        one_line(lambda bad=bad: said(bad), "line 1", part)
    one_line(lambda: said({"role": "user", "content": "\ud83d"}), "line 1", "surrogate pair")
    config["chat_template"] = "{{ raise_exception('odd') }}"
    one_line(lambda: said(ASK[0]), "chat.jsonl", "line 1", "cannot render it (odd)")


def test_a_token_that_only_the_config_names(tmp_path, tokenizer):
    """transformers makes it a token of texts too. Without a row in the model it is refused."""
    config = {"chat_template": "{{ messages[0].content }}", "pad_token": "[P]", "eos_token": "4"}
    talk = [{"role": "assistant", "content": "2 + 4"}]
    found = chats(tmp_path, [talk], tokenizer, config)
    tokens, _, _ = found.encode(tokenizer, tmp_path / "cache")
    theirs = styles.transformers_of(tmp_path).apply_chat_template(talk, return_dict=False)
    assert tokens.tolist() == theirs
    found = chats(tmp_path, [[{"role": "assistant", "content": "2 [P]"}]], tokenizer, config)
    one_line(
        lambda: found.encode(tokenizer, tmp_path / "cache"), "line 1", "'[P]'", "tokenizer.json"
    )


def test_bad_conversations(tmp_path):
    def refused(conversation, *parts: str) -> None:
        found = chats(tmp_path, [ASK, conversation])
        one_line(lambda: list(found), "line 2", "'messages'", *parts, '"role": "assistant"')

    refused("hello", "'hello'", "no list of messages")
    refused(None, "'None'", "no list")
    refused([{"role": "bot", "content": ""}], "role 'bot'", "system, user, assistant, tool")
    refused([{"role": "user", "content": ["x"]}], "content is list, not a string")
    refused([{"role": "assistant"}], "content is NoneType")
    refused(ASK[:1], "no message of the assistant")
    refused([], "no message of the assistant")
    half = [ASK[0], {"role": "assistant", "content": "\ud83d"}]
    one_line(lambda: list(chats(tmp_path, [ASK, half])), "line 2", "surrogate pair")
    empty = chats(tmp_path, [])
    one_line(lambda: list(empty), "no conversation")
    (tmp_path / "chat.jsonl").write_bytes(b'{"messages": "\xff"}')
    one_line(lambda: list(empty), "chat.jsonl", "not UTF-8")
    one_line(lambda: Chats(None, "messages", None), "--data.chat", "--data.path")


def test_from_parquet_into_rows_that_learn_answers_alone(tmp_path, tokenizer):
    table = pa.table({"turns": [[dict(m) for m in (ASK if i % 3 else TALK)] for i in range(60)]})
    parquet.write_table(table, tmp_path / "c.parquet")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    d = DataConfig(
        path=str(tmp_path / "c.parquet"),
        tokenizer=str(tmp_path),
        column="turns",
        chat=True,
        seq_len=96,
        validation_ratio=0.1,
    )
    data = open_data(d, 400, 0, 100, tmp_path / "cache")
    rows = data.train.rows(0, len(data.train))
    text = tokenizer.decode(rows.tokens[:, 1:][rows.counted].tolist(), skip_special_tokens=False)
    assert set(text.replace("<|endoftext|>", "").split("<|im_end|>")) <= {"4", "yes\n", ""}
    assert text.count("<|endoftext|>") == 54 and rows.documents is not None
    # In one row no document sees another, so a conversation's targets are in its own tokens.
    first = rows.documents[0] == 0
    assert (
        tokenizer.decode(rows.tokens[0, :-1][first].tolist(), skip_special_tokens=False).count(
            "<|endoftext|>"
        )
        <= 1
    )
    held = data.validation.rows(0, len(data.validation))
    assert held.valid > 0 and len(data.validation) < len(data.train)

    assert not data.notes
    longer = open_data(replace(d, seq_len=24), 400, 0, 100, tmp_path / "cache")
    (note,) = longer.notes
    tokens, learn, lengths = Chats(d.path, "turns", str(tmp_path)).encode(
        tokenizer, tmp_path / "cache"
    )
    starts = np.cumsum(lengths) - lengths
    seen = [learn[s + 1 : s + min(n, 25)].any() for s, n in zip(starts, lengths, strict=True)]
    cut = sum(one and n > 25 for one, n in zip(seen, lengths, strict=True))
    assert cut > 0 and seen.count(False) > 0
    assert f"{seen.count(False)} of 60 conversations have nothing to learn" in note
    assert f"first 24 tokens and are dropped; {cut} are cut; raise --data.seq-len" in note

    short = DataConfig(**{**d.__dict__, "seq_len": 4})
    one_line(
        lambda: open_data(short, 400, 0, 9, tmp_path / "cache"),
        "0 of 60",
        "first 4 tokens",
        "--data.seq-len",
    )
