"""Conversations in a tokenizer's own template: the ids are those of transformers, and the learned
tokens those that a model has to write."""

import json
from collections.abc import Callable
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.utils import htmlsafe_json_dumps
from tokenizers import Tokenizer, processors

from dtron.data import chat_encoding, chat_environment, chat_template
from dtron.errors import UserError
from tests.helpers import chats as styles
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.chat_templates import tagged as tagged_template

Sample = tuple[list[int], np.ndarray]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[..., Path]:
    root, made = tmp_path_factory.mktemp("folders"), {}

    def folder(kind: str, template: str) -> Path:
        if (kind, template) not in made:
            made[kind, template] = styles.folder_of(root / f"{len(made)}", kind, template)
        return made[kind, template]

    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def check_ids(folder: Path, talk: list[dict], tools: Any, scratch: Path) -> list[Sample] | None:
    """Compare with transformers, which may refuse a conversation; then dtron must refuse it too.

    One sample if the text of each prefix is a prefix of the text, or else one for each answer."""
    theirs, row = styles.transformers_of(folder), {"messages": talk, "tools": tools}

    def of_theirs(messages: list[dict], tokenize: bool) -> Any:
        return theirs.apply_chat_template(
            messages, tools=tools, tokenize=tokenize, return_dict=False
        )

    try:
        whole = of_theirs(talk, False)
    except Exception:
        with pytest.raises(UserError, match="line 1"):
            styles.encoded(folder, [row], scratch)
        return None
    stops = [i + 1 for i, m in enumerate(talk) if m["role"] == "assistant"]
    prefixes = [talk[:stop] for stop in stops]
    adds = all(whole.startswith(of_theirs(prefix, False)) for prefix in prefixes)
    want = [of_theirs(messages, True) for messages in ([talk] if adds else prefixes)]
    ours = styles.encoded(folder, [row], scratch)
    assert [ids for ids, _ in ours] == want
    return ours


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20)
@given(st.sampled_from(styles.KINDS), styles.CONVERSATIONS, styles.TOOLS)
def test_ids_are_those_of_transformers(folder_of, scratch, name, kind, talk, tools):
    check_ids(folder_of(kind, TEMPLATES[name]), talk, tools, scratch)


ADD = {"type": "function", "function": {"name": "größe", "arguments": {"a<b": 1, "c": "it's"}}}
AGENT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [ADD]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4 é"},
]
TALK = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def piecewise(encoder, samples):
    """Encode every stretch on its own: a mutant."""
    out = []
    for sample in samples:
        cuts = sorted({0, len(sample.text), *(c for span in sample.learned for c in span)})
        parts = [sample.text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        found = [encoder.encode(part, add_special_tokens=False).ids for part in parts]
        out.append(np.array([i for ids in found for i in ids], np.int64))
    return out


def test_mutants_of_the_ids_are_caught(folder_of, scratch, monkeypatch):
    def caught(name: str, kind: str, talk: list[dict]) -> None:
        with pytest.raises(AssertionError):
            check_ids(folder_of(kind, TEMPLATES[name]), talk, [ADD], scratch)

    with monkeypatch.context() as patch:
        patch.setattr("dtron.data.chat.signed_ids", piecewise)
        for kind in ("always", "prepend"):
            caught("chatml", kind, TALK)
    for mutant, name in (
        (partial(json.dumps, ensure_ascii=True), "mistral"),
        (lambda x, **options: htmlsafe_json_dumps(x, json.dumps, ensure_ascii=False), "gpt-oss"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(chat_environment, "_to_json", mutant)
            caught(name, "bytes", AGENT)
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "_normalized", dict)
        caught("gpt-oss", "bytes", AGENT)


# ---------------------------------------------------------------------------- learned tokens


def learned(folder: Path, talk: list[dict], scratch: Path, tools: Any = None) -> list[list[str]]:
    """The learned stretches of each sample, decoded."""
    tokenizer, out = styles.transformers_of(folder), []
    for ids, flags in styles.encoded(folder, [{"messages": talk, "tools": tools}], scratch):
        cuts = np.flatnonzero(np.diff(flags.astype(int))) + 1
        parts = zip(np.split(np.array(ids), cuts), np.split(flags, cuts), strict=True)
        out.append([tokenizer.convert_ids_to_tokens(p.tolist()) for p, flag in parts if flag[0]])
    return [[" ".join(part) for part in parts] for parts in out]


def test_learned_tokens_one_by_one(folder_of, scratch):
    def of(name: str, kind: str, talk: list[dict]) -> list[list[str]]:
        return learned(folder_of(kind, TEMPLATES[name]), talk, scratch)

    # An answer that is learned ends with the token that stops the model.
    assert of("chatml", "bytes", TALK[2:]) == [["y e s <|im_end|>"]]
    assert of("llama3", "first", AGENT[2:]) == [["4 ▁ é <|eot_id|>"]]
    # In Llama 2's template the answer begins with a space. It is a token of the answer.
    short = [TALK[0], {"role": "assistant", "content": "4 é"}]
    assert of("llama2", "bytes", short) == [["Ġ 4 Ġ Ã© Ġ </s>"]]
    assert of("llama2", "always", short) == [["▁ 4 ▁ é ▁ </s>"]]
    # A text after a special token begins with a ▁, which the model has to write.
    assert of("deepseek", "prepend", TALK[2:]) == [["▁ y e s </s>"]]
    # Each answer of a template that drops earlier reasoning is learned in a sample that ends there.
    assert of("qwen3", "bytes", TALK) == [
        ["<think> Ċ h m Ċ </think> Ċ Ċ 4 <|im_end|> Ċ"],
        ["<think> ĊĊ </think> Ċ Ċ y e s <|im_end|> Ċ"],
    ]
    assert of("gpt-oss", "bytes", [TALK[0], short[1], *TALK[2:]]) == [
        ["<|channel|> f i n a l <|message|> 4 Ġ Ã© <|return|>"],
        ["<|channel|> f i n a l <|message|> y e s <|return|>"],
    ]
    # Reasoning and calls are learned as the template writes them.
    ((call, answer),) = of("qwen3", "first", AGENT)
    assert call.startswith('<think> \n h m \n </think> \n\n <tool_call> \n {" name')
    assert call.endswith('<0x27> s "} } \n </tool_call> <|im_end|> \n')
    assert answer == "<think> \n\n </think> \n\n 4 ▁ é <|im_end|> \n"


def test_a_post_processor_changes_nothing(folder_of, scratch, tmp_path):
    """A post-processor may add tokens, and cut the white space off the offsets."""
    template = "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' }}{% endfor %}"
    short = [TALK[0], {"role": "assistant", "content": "4  "}, TALK[2]]
    plain = folder_of("bytes", template)
    assert learned(plain, short, scratch) == [["4 Ġ Ġ"]]
    (want,) = styles.encoded(plain, [{"messages": short}], scratch)
    folder = styles.folder_of(tmp_path, "bytes", template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    cut = processors.ByteLevel(trim_offsets=True)
    for processor in (cut, processors.Sequence([cut, begin])):
        tokenizer.post_processor = processor
        tokenizer.save(str(folder / "tokenizer.json"))
        (ours,) = styles.encoded(folder, [{"messages": short}], scratch)
        assert ours[0] == want[0] and ours[1].tolist() == want[1].tolist()


ORACLES = ("chatml", "llama2", "llama3", "qwen3", "deepseek")


def check_learned(folder: Path, tagged: Path, talk: list[dict], tools: Any, scratch: Path) -> None:
    """Compare with the mask that transformers makes from ``generation`` tags.

    ``tagged``: a folder whose template has such tags around the answers."""
    theirs = styles.transformers_of(tagged)

    def mask_of(messages: list[dict]) -> list[int]:
        out = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return out["assistant_masks"]

    ours = styles.encoded(folder, [{"messages": talk, "tools": tools}], scratch)
    if len(ours) == 1:
        stop = len(talk) if len(ours[0][0]) == len(mask_of(talk)) else None
        assert stop and ours[0][1].tolist() == mask_of(talk)
        return
    stops = [i + 1 for i, m in enumerate(talk) if m["role"] == "assistant"]
    for stop, (_, flags) in zip(stops, ours, strict=True):
        mask = np.array(mask_of(talk[:stop]), bool)
        others = np.flatnonzero(~mask)  # the last answer is what follows the last of them
        last = np.flatnonzero(mask)[-1]
        mask[: others[others < last].max(initial=-1) + 1] = False
        assert flags.tolist() == mask.tolist()


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=20)
@given(st.sampled_from(styles.KINDS), styles.CONVERSATIONS, styles.TOOLS)
def test_learned_tokens_are_those_of_tags(folder_of, scratch, name, kind, talk, tools):
    template = TEMPLATES[name]
    if name == "llama2":
        # It does not write calls, so their answers are not learned. It has no header, so the space
        # before the first answer of all is found only if something is before it.
        talk = [{k: v for k, v in m.items() if k != "tool_calls"} for m in talk]
        talk = list(dropwhile(lambda m: m["role"] == "assistant", talk))
    folder, tagged = folder_of(kind, template), folder_of(kind, tagged_template(template))
    try:
        styles.transformers_of(folder).apply_chat_template(talk, tools=tools)
    except Exception:
        return
    for untagged in (folder, tagged):
        check_learned(untagged, tagged, talk, tools, scratch)


def test_mutants_of_the_learned_tokens_are_caught(folder_of, scratch, monkeypatch):
    def caught(name: str, kind: str, talk: list[dict]) -> None:
        template = TEMPLATES[name]
        folders = folder_of(kind, template), folder_of(kind, tagged_template(template))
        check_learned(*folders, talk, [ADD], scratch)
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(chat_encoding, "learned_tokens", with_the_header)
            check_learned(*folders, talk, [ADD], scratch)

    real = chat_encoding.learned_tokens

    def with_the_header(text, spans, offsets):
        return real(text, [(a - 3, b) for a, b in spans], offsets)

    for name in ORACLES:
        caught(name, "always", [TALK[0], {"role": "assistant", "content": "4"}])


CHARACTERS = st.sampled_from("ab é😀\n▁")


@settings(max_examples=40)
@given(st.lists(st.text(CHARACTERS, min_size=1, max_size=4), min_size=1, max_size=6), st.data())
def test_the_rule_of_learned_tokens(words, data):
    """Against its definition, character by character."""
    text = "".join(words)
    ends = np.cumsum([len(word) for word in words])
    offsets = [(int(end) - len(word), int(end)) for word, end in zip(words, ends, strict=True)]
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    got = chat_encoding.learned_tokens(text, [(start, stop)], offsets)
    for (a, b), flag in zip(offsets, got, strict=True):
        places = [i for i in range(a, b) if not text[i].isspace()] or range(a, b)
        assert flag == any(start <= i < stop for i in places)
