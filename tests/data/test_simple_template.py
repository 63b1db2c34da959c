"""The simple template: what is learned, and that no message spells a special token."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron.data import get_tokenizer
from tests.helpers import chats as styles
from tests.helpers.chats import ASK, TALK, chatml_tokenizer, chats, learned
from tests.helpers.texts import one_line


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chatml_tokenizer(tmp_path_factory.mktemp("t"))


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


def ids_of(folder: Path, talk: list[dict]) -> list[int]:
    ((ids, _),) = styles.encoded(folder, [{"messages": talk}], folder)
    return ids


@settings(max_examples=60)
@given(st.sampled_from(styles.KINDS), styles.CONVERSATIONS)
def test_the_simple_template_is_one_text_and_never_a_spelled_token(plain_folders, kind, talk):
    """The ids are those of one call, if no message spells a special token. Otherwise they decode to
    the same text, and no id of a special token is in a message."""
    folder, tokenizer = plain_folders[kind], styles.tokenizer_of(kind)
    talk = [{"role": m["role"], "content": m["content"] or ""} for m in talk]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk)
    ids = ids_of(folder, talk)
    assert ids[-1] == tokenizer.token_to_id("</s>")
    spelled = any(token in m["content"] for m in talk for token in styles.SPECIAL)
    want = tokenizer.encode(text, add_special_tokens=False).ids
    assert (ids[:-1] == want) or spelled
    special = [tokenizer.token_to_id(token) for token in styles.SPECIAL]
    markers = ["<|im_start|>", "<|im_end|>"] * len(talk)
    found = [tokenizer.id_to_token(i) for i in ids[:-1] if i in special]
    assert [token for token in found if token != "<unk>" or kind != "bytes"] == markers


@pytest.fixture(scope="module")
def plain_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    return {kind: styles.folder_of(root / kind, kind) for kind in styles.KINDS}


def test_a_piece_of_the_vocabulary_is_no_way_to_a_special_token(tmp_path):
    """A model whose own vocabulary has the special tokens, as Unigram and WordLevel have."""
    pieces = [("<unk>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0), ("</s>", 0.0)]
    pieces += [(c, -9.0) for c in "▁<>|/\nabcdefghijklmnopqrstuvwxyz_+?0123456789"]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["?", "<|im_start|>", "<|im_end|>", "</s>", "user", "assistant", "4", "a"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for number, made in enumerate((unigram, words)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        made.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
        made.save(str(folder / "tokenizer.json"))
        plain = ids_of(folder, [*ASK[:1], {"role": "assistant", "content": "4 a"}])
        ids = ids_of(folder, [*ASK[:1], {"role": "assistant", "content": "4 <|im_end|> </s> a"}])
        for token in ("<|im_start|>", "<|im_end|>", "</s>"):
            one = made.token_to_id(token)
            assert ids.count(one) == plain.count(one) > 0


def test_a_message_may_have_any_private_character(tmp_path, tokenizer):
    talk = [*ASK[:1], {"role": "assistant", "content": "\U000f00003\U000f0000 \U000f0001"}]
    ((text, _),) = learned(chats(tmp_path, [talk], tokenizer), tokenizer, tmp_path)
    assert talk[1]["content"] in text


def test_what_the_simple_template_leaves_out(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    calls = [ASK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    found = chats(tmp_path, [ASK, calls], tokenizer)
    one_line(lambda: list(found), "line 2", "tool_calls", "--data.tokenizer", "chat template")
    named = [{**ASK[0], "name": "bo", "tool_calls": None}, {**ASK[1], "reasoning_content": "hm"}]
    found = chats(tmp_path, [ASK, named], tokenizer)
    for _ in range(2):  # the second time from the cache
        found.notes = ()
        found.encode(tokenizer, tmp_path)
        (note,) = found.notes
        assert "leaves out name, reasoning_content" in note and "chat.jsonl" in note
