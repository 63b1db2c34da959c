"""dtron.data.special_tokens: names as transformers resolves them, and the end of a document."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtron.data import Indexed, open_data
from dtron.data.__main__ import main
from dtron.data.special_tokens import end_id, save_tokenizer, special_tokens
from dtron.data.tokenization import encode, load_tokenizer
from dtron.errors import UserError
from dtron.runtime.config import DataConfig
from dtron.runtime.exit import run_cli
from tests.helpers import chats as styles
from tests.helpers.texts import TEXTS, corpus, one_line, words

export = importlib.import_module("dtron.hf.export")  # dtron.hf has a function of this name

TOKENS = st.sampled_from(["<s>", "</s>", "<unk>", "[INST]", "[NEW]"])
NAMES = st.sampled_from(["bos_token", "eos_token", "pad_token", "image_token"])


def added(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False}


NAMED = st.dictionaries(NAMES, st.one_of(TOKENS, st.none()), max_size=3)
EXTRA = st.one_of(
    st.lists(TOKENS, max_size=2, unique=True),
    st.dictionaries(st.sampled_from(["image_token", "tool_token"]), TOKENS, max_size=2),
)


@st.composite
def configs(draw) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A tokenizer_config.json and a special_tokens_map.json."""
    config: dict[str, Any] = {
        name: {"__type": "AddedToken", **added(token)} if token and draw(st.booleans()) else token
        for name, token in draw(NAMED).items()
    }
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if draw(st.integers(0, 3)) == 0:
            config[name] = draw(EXTRA)
    if draw(st.integers(0, 2)) == 0:
        config["added_tokens_decoder"] = {"1": {**added("<s>"), "special": True}}
    table = {
        name: added(token) if token and draw(st.booleans()) else token
        for name, token in draw(NAMED).items()
    }
    return config, draw(st.sampled_from([table, None]))


@settings(max_examples=30)
@given(configs(), st.booleans())
def test_names_are_resolved_as_transformers_does(tmp_path_factory, files, padded):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("names")
    tokenizer = Tokenizer.from_str(styles.tokenizer_of("bytes").to_str())
    if padded:
        tokenizer.enable_padding(pad_token="[INST]")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(files[0]))
    if files[1] is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(files[1]))
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    except (TypeError, AttributeError, ValueError):
        return  # a folder that transformers refuses
    assert special_tokens(folder) == theirs.special_tokens_map


ADDED = st.builds(
    lambda token, flags, special: {**dict.fromkeys(flags, True), **token, "special": special},
    st.sampled_from(["<s>", "4", "hello", "[INST]", "<think>"]).map(lambda t: {"content": t}),
    st.sets(st.sampled_from(["lstrip", "rstrip", "single_word", "normalized"])),
    st.booleans(),
)


@settings(max_examples=40)
@given(
    st.sampled_from(styles.KINDS),
    st.one_of(st.none(), st.lists(ADDED, max_size=3)),
    NAMED,
    st.lists(st.sampled_from(["4", "hello", "</s>"]), max_size=2, unique=True),
    st.lists(st.sampled_from(["<s>", "</s>", "4", " ", "hello", "\n", "x", "<think>", "[INST]"])),
    st.booleans(),
)
def test_tokens_of_the_config_are_tokens_of_texts(
    tmp_path_factory, kind, listed, named, extra, words, split
):
    """As transformers loads them, whatever padding and truncation are saved in tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    folder, text = tmp_path_factory.mktemp("added"), "".join(words)
    tokenizer = Tokenizer.from_str(styles.tokenizer_of(kind).to_str())
    tokenizer.enable_padding(length=30, pad_token="<unk>")
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {**named, "extra_special_tokens": extra}
    config |= {"split_special_tokens": split, "chat_template": "{{ messages[0].content }}"}
    if listed is not None:
        config["added_tokens_decoder"] = {f"{9 - i}": token for i, token in enumerate(listed)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    talk = [{"role": "assistant", "content": text}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    want = theirs.apply_chat_template(talk, return_dict=False)
    ids = [i for i in want if i < tokenizer.get_vocab_size()]
    if ids != want:  # a token for which a model has no row
        with pytest.raises(UserError, match="tokenizer.json lacks"):
            styles.encoded(folder, [{"messages": talk}], folder)
        return
    ((ours, _),) = styles.encoded(folder, [{"messages": talk}], folder)
    assert ours == want


def folder_of(
    path: Path, vocabulary: list[str], files: dict[str, Any], name: str = "tokenizer.json"
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    words({word: i for i, word in enumerate(vocabulary)}, path / name)
    for file, entries in files.items():
        (path / file).write_text(json.dumps(entries))
    return path


VOCABULARY = ["?", "[EOS]", "[SEP]", "<|eot|>", "<a>", "<b>"]


def ends(path: Path, files: dict[str, Any], **more: Any) -> str | None:
    folder = folder_of(path, VOCABULARY, files)
    tokenizer = load_tokenizer(str(folder))
    found = end_id(tokenizer, folder, **more)
    assert found == end_id(tokenizer, str(folder / "tokenizer.json"), **more)
    return None if found is None else tokenizer.id_to_token(found)


def test_the_end_token_is_the_tokenizers_own(tmp_path):
    def of(number: int, **more: Any) -> str | None:
        return ends(tmp_path / f"{number}", dict(list(files.items())[-number:]), **more)

    files = {
        "config.json": {"eos_token_id": 5},
        "generation_config.json": {"eos_token_id": [4, 5]},
        "special_tokens_map.json": {"eos_token": {"content": "<|eot|>"}},
        "tokenizer_config.json": {"eos_token": "[SEP]", "added_tokens_decoder": {}},
    }
    files = dict(reversed(files.items()))
    assert of(1) == "<b>" and of(2) == "<a>" and of(3) == "<|eot|>" and of(4) == "[SEP]"
    assert of(4, end_token="<a>") == "<a>"
    # Without added_tokens_decoder the map overrides the config, as in transformers.
    files["tokenizer_config.json"] = {"eos_token": "[SEP]"}
    assert of(4) == "<|eot|>"
    one_line(lambda: of(4, end_token="<c>"), "--data.end-token '<c>'", "no such token")
    files["special_tokens_map.json"] = {"eos_token": "<c>"}
    one_line(lambda: of(4), "eos_token '<c>'", "--data.end-token")
    (tmp_path / "4" / "tokenizer_config.json").write_text("[")
    one_line(lambda: special_tokens(tmp_path / "4"), "tokenizer_config.json", "cannot be read")


@pytest.mark.parametrize(
    "vocabulary, end",
    [
        (["?", "</s>", "<|endoftext|>"], "<|endoftext|>"),
        (["?", "<｜end▁of▁sentence｜>"], "<｜end▁of▁sentence｜>"),
        (["?", "[SEP]", "[EOS]"], "[EOS]"),
        (["?", "[SEP]"], None),
    ],
)
def test_a_tokenizer_json_alone(tmp_path, vocabulary, end):
    tokenizer = load_tokenizer(str(folder_of(tmp_path, vocabulary, {})))
    found = end_id(tokenizer, tmp_path)
    assert found == end_id(tokenizer) == (None if end is None else tokenizer.token_to_id(end))


def test_tokenizers_share_a_folder(tmp_path):
    """PREFIX.tokenizer.json has PREFIX.tokenizer_config.json, and no other."""
    folder_of(tmp_path, VOCABULARY, {"tokenizer_config.json": {"eos_token": "<a>"}})
    tokenizer = load_tokenizer(str(tmp_path))
    for token in ("[EOS]", "<b>", "<a>"):
        end = tokenizer.token_to_id(token)
        save_tokenizer(tokenizer, tmp_path / "x.tokenizer.json", end)
        assert end_id(tokenizer, tmp_path / "x.tokenizer.json") == end
    assert end_id(tokenizer, tmp_path) == tokenizer.token_to_id("<a>")
    # Nothing more is written where the vocabulary says it, and no entry of the user is lost.
    save_tokenizer(tokenizer, tmp_path / "y.tokenizer.json", tokenizer.token_to_id("[EOS]"))
    assert not (tmp_path / "y.tokenizer_config.json").exists()
    config = tmp_path / "x.tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "of another tokenizer", "chat_template": "x"}))
    save_tokenizer(tokenizer, tmp_path / "x.tokenizer.json", 4)
    assert json.loads(config.read_text()) == {"eos_token": "<a>", "chat_template": "x"}


def test_an_exported_run_has_the_end_token_that_it_learned(tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    tokenizer = load_tokenizer(str(folder_of(run_dir, VOCABULARY, {})))
    out.mkdir()
    for token in ("<a>", "[EOS]"):
        save_tokenizer(tokenizer, run_dir / "tokenizer.json", tokenizer.token_to_id(token))
        assert export._tokens_of(run_dir)["eos_token_id"] == tokenizer.token_to_id(token)
        export._write_tokenizer(run_dir, out)
        assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == token
        (out / "tokenizer.json").unlink()


def run(*argv: Any) -> int:
    return run_cli(main, ["prepare", *map(str, argv), "--workers", "1"])


def test_prepare_ends_documents_and_training_finds_where(tmp_path, capsys):
    folder = folder_of(tmp_path / "t", VOCABULARY, {"tokenizer_config.json": {"eos_token": "<b>"}})
    text = corpus(tmp_path)
    for more, end in (([], 5), (["--end-token", "<a>"], 4)):
        out = tmp_path / f"out{end}"
        assert run(text, "--tokenizer", folder, "--out", out, *more) == 0
        data = Indexed(out)
        last = data.tokens[np.asarray(data.starts) + np.asarray(data.lengths) - 1]
        assert len(data) == len(TEXTS) and (last == end).all()
        opened = open_data(DataConfig(path=str(out), seq_len=8), 6, 0, 4, tmp_path / "cache")
        assert opened.end == end
        # The text itself, with the tokenizer that is beside the token files.
        mixed = f"0.5 {out}, 0.5 {text}"
        config = DataConfig(path=mixed, seq_len=8, document_mask=True)
        opened = open_data(config, 6, 0, 4, tmp_path / "cache")
        assert opened.end == end
        rows = opened.train.rows(0, 40)
        after = rows.tokens[:, :-1][:, :-1] == end
        assert np.array_equal(np.diff(rows.documents, axis=1) > 0, after)
    assert run(text, "--tokenizer", folder, "--out", tmp_path / "out5", "--overwrite") == 0
    capsys.readouterr()
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        (tmp_path / f"out5{suffix}").unlink()
    assert run(text, "--tokenizer", folder, "--out", tmp_path / "out5") == 2
    assert "out5.tokenizer_config.json' exists" in capsys.readouterr().err


def test_no_end_token_is_an_error_with_the_remedy(tmp_path, capsys):
    folder, text = folder_of(tmp_path / "t", ["?", "[SEP]", "<a>"], {}), corpus(tmp_path)
    out = ["--tokenizer", folder, "--out", tmp_path / "out"]
    for more in ([], ["--end-token", "<c>"]):
        assert run(text, *out, *more) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--end-token" in said and "--data." not in said
    assert {file.name for file in tmp_path.iterdir()} == {"t", "corpus.jsonl"}
    assert run(text, *out, "--end-token", "<a>") == 0

    config = {"path": str(text), "tokenizer": str(folder), "seq_len": 8}

    def opened(**more: Any):
        return open_data(DataConfig(**config, **more), 3, 0, 4, tmp_path / "cache")

    for more in ({"document_mask": True}, {"packing": "best-fit"}):
        one_line(lambda more=more: opened(**more), "no token that ends", "--data.end-token")
        assert opened(**more, end_token="<a>").end == 2
    (note,) = opened().notes
    assert "no token that ends a document" in note and "--data.end-token" in note
    assert not opened(end_token="<a>").notes
    streamed = opened(end_token="<a>", streaming=True).train.rows(0, 20).tokens
    assert (streamed == 2).any()
    one_line(lambda: opened(end_token="<c>"), "--data.end-token '<c>'")


def test_each_end_token_has_its_own_cache(tmp_path):
    tokenizer = load_tokenizer(str(folder_of(tmp_path / "t", VOCABULARY, {})))
    for end in (4, 5):
        assert encode(["x"], tokenizer, tmp_path, end).tolist() == [0, end]
    folder = styles.folder_of(tmp_path / "chat", "bytes")
    file = styles.write_rows(tmp_path / "c.jsonl", [{"messages": styles.ASK}])
    for token in ("<s>", "</s>", "<|im_end|>"):
        chats = styles.Chats(str(file), "messages", str(folder), token)
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens, learn, _ = chats.encode(made, tmp_path / "cache")
        last = [token] if token != "<|im_end|>" else ["Ċ"]
        assert [made.id_to_token(int(tokens[-1]))] == last
        assert learn[-1] == (token != "<|im_end|>")
