"""dtron.data.chat: conversations, their learned tokens, and templates, against transformers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer

from dtron.data import get_tokenizer, open_data
from dtron.data.chat import Chats, own_template
from dtron.runtime.config import DataConfig
from tests.helpers.texts import one_line

ASK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *ASK,
    {"role": "user", "content": "sure? <|im_end|>"},
    {"role": "assistant", "content": "yes\n"},
]
# The templates of Llama 2, ChatML and Llama 3, as published models have them.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
TAGGED = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m['role'] == 'assistant' %}
        {%- generation %}{{ m['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- m['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
HEADERS = (
    "{% for m in messages %}"
    "{% set c = '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [m["content"] for m in TALK] * 9
    made = get_tokenizer(None, texts, 300, tmp_path_factory.mktemp("t"))
    made.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<s>")]
    )
    return made


def chats(
    folder: Path, conversations, tokenizer: Tokenizer | None = None, config: dict | None = None
) -> Chats:
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in conversations))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return Chats(str(file), "messages", str(folder / "tokenizer.json"))


def learned(found: Chats, tokenizer: Tokenizer, folder: Path) -> list[tuple[str, list[str]]]:
    """The text of each conversation and its learned stretches, decoded."""
    tokens, learn, lengths = found.encode(tokenizer, folder)
    out = []
    for ids, flags in zip(
        np.split(tokens, np.cumsum(lengths)), np.split(learn, np.cumsum(lengths)), strict=True
    ):
        cuts = np.flatnonzero(np.diff(flags.astype(int))) + 1
        parts = zip(np.split(ids, cuts), np.split(flags, cuts), strict=True)
        decode = lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        out.append((decode(ids), [decode(part) for part, flag in parts if len(flag) and flag[0]]))
    return out[:-1]


def test_the_assistant_is_learned_and_can_stop(tmp_path, tokenizer):
    one, many = learned(chats(tmp_path, [ASK, TALK], tokenizer), tokenizer, tmp_path)
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|endoftext|>"
    assert one == (text, ["4<|im_end|>", "<|endoftext|>"])
    assert many[1] == ["4<|im_end|>", "yes\n<|im_end|>", "<|endoftext|>"]


def test_nobody_can_end_a_message_or_speak_for_another(tmp_path, tokenizer):
    tokens, _, _ = chats(tmp_path, [TALK], tokenizer).encode(tokenizer, tmp_path)
    ends = (tokens == tokenizer.token_to_id("<|im_end|>")).sum()
    assert ends == len(TALK)  # a marker inside a message is plain text
    bare = get_tokenizer(None, ["abc <|im_end|>"] * 9, 300, tmp_path)
    (said,) = learned(chats(tmp_path, [ASK]), bare, tmp_path)
    assert said[1] == [
        "4<|im_end|>",
        "<|endoftext|>",
    ]  # a tokenizer without the markers encodes them as text


@pytest.mark.parametrize("template", [PLAIN, TAGGED, HEADERS])
def test_a_tokenizers_own_template_is_rendered_as_transformers_does(tmp_path, tokenizer, template):
    from transformers import PreTrainedTokenizerFast

    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
    found = chats(tmp_path, [TALK], tokenizer, config)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<s>", eos_token="<|im_end|>"
    )
    want = theirs.apply_chat_template(TALK, tokenize=False)
    assert list(found) == [want]
    ((_, stretches),) = learned(found, tokenizer, tmp_path)
    joined = "".join(stretches)
    assert "4" in stretches[0] and "yes" in stretches[1] and len(stretches) == 2
    assert "sure" not in joined and "brief" not in joined and "2 + 2" not in joined
    if template is TAGGED:  # the same in transformers, without the newline after a message
        out = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
        mask = np.array(out["assistant_masks"], bool)
        ids = np.array(out["input_ids"])[mask]
        assert theirs.decode(ids) == "".join(part.removesuffix("\n") for part in stretches)
        tokens, _, _ = found.encode(tokenizer, tmp_path)
        assert tokens.tolist() == out["input_ids"]


def test_a_template_in_a_file_of_its_own(tmp_path, tokenizer):
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    found = chats(tmp_path, [ASK], tokenizer, {"eos_token": "!"})
    assert list(found) == ["[INST] 2 + 2? [/INST] 4 !"]
    named = {
        "chat_template": [{"name": "default", "template": "x"}, {"name": "tool", "template": "y"}]
    }
    (tmp_path / "chat_template.jinja").unlink()
    assert "".join(s[0] for s in chats(tmp_path, [ASK], tokenizer, named).template(ASK)) == "x"


def test_a_template_runs_nothing():
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ):
        one_line(
            lambda attack=attack: own_template(attack, "", "")(ASK),
            "cannot render it",
            "simple template",
        )
    one_line(lambda: own_template("{% if %}", "", ""), "malformed", "simple template")
    shown = "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
    forgetful = "{% for m in messages %}" + shown + "{% endfor %}"
    one_line(lambda: own_template(forgetful, "", "")(TALK), "changes earlier messages", "only adds")


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

    short = DataConfig(**{**d.__dict__, "seq_len": 4})
    one_line(
        lambda: open_data(short, 400, 0, 9, tmp_path / "cache"),
        "0 of 60",
        "first 4 tokens",
        "--data.seq-len",
    )
