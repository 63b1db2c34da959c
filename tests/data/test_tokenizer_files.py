"""A tokenizer's file that is no regular file, or that is too large, is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.data.chat_template import template_beside
from dtron.data.special_tokens import add_config_tokens, end_id, special_tokens, tokenizer_config
from dtron.data.tokenization import load_tokenizer
from dtron.errors import UserError
from dtron.hf import keep_origin
from tests.helpers import chats as styles
from tests.helpers.texts import one_line


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no room


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "huge": huge,
}
READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "tokenizer.json": (lambda path: load_tokenizer(str(path)),),
    "tokenizer_config.json": (tokenizer_config, special_tokens, template_beside),
    "special_tokens_map.json": (tokenizer_config, special_tokens, template_beside),
    "chat_template.jinja": (template_beside,),
    "additional_chat_templates/tool_use.jinja": (template_beside,),
    "generation_config.json": (lambda path: end_id(styles.tokenizer_of("bytes"), path),),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_none_is_one_line(name, kind, tmp_path):
    folder = styles.folder_of(tmp_path / "model", "bytes")
    if name == "generation_config.json":
        (folder / "tokenizer_config.json").unlink()
    file = folder / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    KINDS[kind](file)
    for read in READERS[name]:
        one_line(lambda read=read: read(folder), str(folder))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=5),
    lambda value: (
        st.lists(value, max_size=2)
        | st.dictionaries(st.sampled_from(["5", "name", "template", "content", "special"]), value)
    ),
    max_leaves=5,
)
KEYS = ("chat_template", "added_tokens_decoder", "extra_special_tokens", "eos_token")


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(KEYS), value=VALUES, name=st.sampled_from(list(READERS)[1:3]))
def test_any_value_in_a_config(key, value, name):
    """Each reader reads it, or says in one line what is wrong."""
    with TemporaryDirectory() as folder:
        path = styles.folder_of(Path(folder), "bytes")
        (path / name).write_text(json.dumps({key: value}))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        tokenizer = load_tokenizer(folder)
        for read in (
            lambda: template_beside(folder) and template_beside(folder).render([]),
            lambda: add_config_tokens(tokenizer, folder),
            lambda: end_id(tokenizer, folder),
        ):
            with suppress(UserError):
                read()


@pytest.mark.parametrize("value", [5, [1], [{"name": "a"}], {"default": 5}])
def test_a_template_of_another_type(value, tmp_path):
    folder = styles.folder_of(tmp_path, "bytes", value)
    one_line(lambda: template_beside(folder), "$.chat_template", "mend it")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_no_such_file(kind, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    KINDS[kind](tmp_path / "model" / "vocab.json")
    one_line(lambda: keep_origin(tmp_path / "model", tmp_path / "run"), "vocab.json")


def test_a_tokenizer_that_is_a_pipe_itself(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    one_line(lambda: load_tokenizer(str(tmp_path / "pipe.json")), "no regular file")
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "other.json"))
