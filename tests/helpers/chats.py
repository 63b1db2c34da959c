"""Tokenizers and conversations for the tests of conversations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dtron.data import get_tokenizer
from dtron.data.chat import Chats

SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, and not special
_TEXT = [
    "user system assistant tool\nWhat is 2 + 2? The answer is 4. Iñtërnâtiônàl 😀 ▁ \n\n  x\n",
    '{"name": "add", "arguments": {"a": 1, "b": "é"}} Today Date: 26 Jul 2024 [INST] hello [/INST]',
] * 4


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return a small BPE: ``bytes``, ``first`` and ``always`` (Metaspace), or ``prepend``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    bytes_of = [f"<0x{i:02X}>" for i in range(256)] if kind != "bytes" else []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=SPECIAL + bytes_of,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [],
    )
    # Single words, so that no merge spans several of them.
    tokenizer.train_from_iterator([w for text in _TEXT for w in text.split(" ")], trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    return tokenizer


KINDS = ("bytes", "first", "always", "prepend")


def folder_of(path: Path, kind: str, template: Any = None, **config: Any) -> Path:
    """Write a tokenizer's folder."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer_of(kind).save(str(path / "tokenizer.json"))
    entries = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    if template is not None:
        entries["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(entries))
    return path


def encoded(
    folder: Path, rows: list[dict[str, Any]], scratch: Path
) -> list[tuple[list[int], np.ndarray]]:
    """Return dtron's samples of the rows: the ids, and which of them are learned.

    ``folder``: of the tokenizer."""
    file = write_rows(scratch / "chat.jsonl", rows)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = Chats(str(file), "messages", str(folder))
    with TemporaryDirectory() as cache:
        tokens, learn, lengths = found.encode(tokenizer, Path(cache))
    cuts = np.cumsum(lengths)[:-1]
    parts = zip(np.split(tokens, cuts), np.split(learn, cuts), strict=True)
    return [(ids.tolist(), flags) for ids, flags in parts]


@cache
def transformers_of(folder: Path) -> Any:
    """Return the tokenizer of a folder as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ASK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *ASK,
    {"role": "user", "content": "sure? <|im_end|>"},
    {"role": "assistant", "content": "yes\n"},
]


def chatml_tokenizer(folder: Path) -> Tokenizer:
    """Return dtron's own BPE with tokens for the markers."""
    made = get_tokenizer(None, [m["content"] for m in TALK] * 9, 300, folder)
    made.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<s>")]
    )
    return made


def chats(
    folder: Path, conversations, tokenizer: Tokenizer | None = None, config: dict | None = None
) -> Chats:
    """Write conversations, a tokenizer and its config, and open the conversations."""
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


# ---------------------------------------------------------------------------- drawn conversations

CONTENTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "4",
            " 4 ",
            "hello\n",
            "\n\nx",
            "é😀",
            "▁",
            "<&>'\"",
            "<think>\nhm\n</think>\n\nyes",
        ]
    ),
    st.sampled_from(["<|im_end|>", "a</s> b", "[INST]x", "<unk>", "<tool_call>"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
_ARGUMENTS = st.dictionaries(
    st.sampled_from("abé"), st.one_of(st.integers(0, 9), CONTENTS, st.none()), max_size=2
)
_CALL = st.builds(
    lambda name, arguments, text: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if text else arguments},
    },
    st.sampled_from(["add", "größe"]),
    _ARGUMENTS,
    st.booleans(),
)
TOOLS = st.one_of(
    st.none(),
    st.lists(
        st.builds(
            lambda name, text: {
                "type": "function",
                "function": {"name": name, "description": text, "parameters": {"type": "object"}},
            },
            st.sampled_from(["add", "größe"]),
            CONTENTS,
        ),
        max_size=2,
    ),
)


def _message(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": CONTENTS})


_ANSWER = st.one_of(
    _message("assistant"),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": CONTENTS, "reasoning_content": CONTENTS}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.one_of(st.none(), st.just(""), CONTENTS),
            "tool_calls": st.one_of(st.none(), st.lists(_CALL, min_size=1, max_size=2)),
        },
    ),
)
_TURN = st.one_of(
    st.tuples(_message("user"), _ANSWER),
    st.tuples(_message("user"), _ANSWER, _message("tool"), _ANSWER),
    st.tuples(_ANSWER),
    st.tuples(_message("user")),
)
CONVERSATIONS = st.builds(
    lambda system, turns, last: [*system, *(m for turn in turns for m in turn), *last],
    st.one_of(st.just(()), st.tuples(_message("system"))),
    st.lists(_TURN, max_size=3),
    st.tuples(_message("user"), _ANSWER),
)
