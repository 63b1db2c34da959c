"""The special tokens of a tokenizer, from the files beside its tokenizer.json.

A tokenizer.json has the vocabulary and the rules of a tokenizer. It does not say which token begins
a text and which token ends a text. The files beside it do:

    tokenizer_config.json     bos_token, eos_token, pad_token, ..., and tokens with other names
    special_tokens_map.json   the same names; read if tokenizer_config.json lists no added tokens
    generation_config.json    eos_token_id, the tokens that end a generated text
    config.json               eos_token_id, where no other file has it

`special_tokens` resolves the names as transformers does. `end_id` finds the token that ends a
document. Beside ``web.tokenizer.json`` the files are ``web.tokenizer_config.json`` and so on, so
several tokenizers may share a folder.

Left out: added_tokens.json, which newer tokenizers repeat in their tokenizer.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Required, TypedDict

import msgspec
from tokenizers import AddedToken, Tokenizer

from dtron.data.files import expand
from dtron.data.tokenizer_library import LARGEST
from dtron.errors import UserError
from dtron.json_files import is_there, read_json, read_object

END = "<|endoftext|>"

CONFIG = "tokenizer_config.json"

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The names that every tokenizer may use. Other names that end in ``_token`` belong to one
model."""

_WELL_KNOWN_ENDS = (
    END,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
)
"""End tokens of published tokenizers, for a tokenizer.json with no file beside it that names one.
The first that the vocabulary has is taken."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def file_beside(path: str | Path, name: str) -> Path:
    """Return the path of the file ``name`` that belongs to a tokenizer.

    ``path``: a folder, or a tokenizer.json."""
    path = expand(path)
    if path.is_dir():
        return path / name
    prefix = (
        path.name.removesuffix("tokenizer.json") if path.name.endswith("tokenizer.json") else ""
    )
    return path.with_name(prefix + name)


def read_beside(path: str | Path, name: str) -> dict[str, Any]:
    """Read a JSON object beside a tokenizer; empty if there is none. Raises UserError for a damaged
    file."""
    file = file_beside(path, name)
    try:
        return read_object(file) if is_there(file) else {}
    except UserError as error:
        raise UserError(f"{error}, or move tokenizer.json to a folder without it") from error


class _Token(TypedDict, total=False):
    content: Required[str]
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


class _Template(TypedDict):
    name: str
    template: str


class _Config(TypedDict, total=False):
    """The keys whose values have parts. Another value of the other keys has no effect."""

    chat_template: str | list[_Template] | dict[str, str] | None
    added_tokens_decoder: dict[int, _Token] | None


def tokenizer_config(path: str | Path | None) -> dict[str, Any]:
    """Return the tokenizer_config.json of a tokenizer, completed by its special_tokens_map.json.
    Raises UserError for values of a wrong type.

    ``path``: a folder, or a tokenizer.json; None: a tokenizer without files."""
    config = {} if path is None else _completed(path, read_beside(path, CONFIG))
    try:
        msgspec.convert(config, _Config, str_keys=True)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r}: {CONFIG} or special_tokens_map.json has a wrong value ({error}); mend "
            "it, or move tokenizer.json to a folder without it"
        ) from error
    return config


def _completed(path: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    """Complete a tokenizer_config.json by the special_tokens_map.json beside it."""
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if "added_tokens_decoder" in config:  # then transformers ignores the map too
        return config
    for name, value in read_beside(path, "special_tokens_map.json").items():
        present = config.get(name)
        if name == "extra_special_tokens" and isinstance(value, list) and isinstance(present, list):
            value = [*present, *(token for token in value if token not in present)]
        if name in NAMED or not (name.endswith("_token") and isinstance(present, str)):
            config[name] = value
    if isinstance(config.get("additional_special_tokens"), (list, dict)):
        config.setdefault("extra_special_tokens", config["additional_special_tokens"])
    return config


def special_tokens(path: str | Path | None) -> dict[str, str]:
    """Return the named special tokens, as ``{"bos_token": "<s>", ...}``. A name without a token is
    left out."""
    config = tokenizer_config(path)
    extra = config.get("extra_special_tokens")
    own = {name: token for name, token in config.items() if name.endswith("_token")}
    named = {name: config.get(name) for name in NAMED} | own
    named |= extra if isinstance(extra, dict) else {}
    if path is not None and "pad_token" not in config:
        named["pad_token"] = _padding_token(path)
    texts = {name: _content(token) for name, token in named.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _padding_token(path: str | Path) -> str | None:
    """Return the token of the padding that is saved in a tokenizer.json."""
    file = expand(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        padding = read_json(file, dict[str, Any], LARGEST).get("padding")
    except UserError:
        return None  # whoever loads the tokenizer reports it
    return padding.get("pad_token") if isinstance(padding, dict) else None


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def add_config_tokens(encoder: Tokenizer, path: str | Path | None) -> None:
    """Add the tokens that the files beside a tokenizer.json list, as transformers does when it
    loads a tokenizer. A text that spells such a token then has it.

    ``path``: the folder or the tokenizer.json that the encoder comes from."""
    config, named = tokenizer_config(path), special_tokens(path)
    listed = config.get("added_tokens_decoder") or {}
    # The list overrides what tokenizer.json says of a token. Other files only add.
    tokens = [
        _added_token(t, t["content"] in named.values())
        for _, t in sorted(listed.items(), key=_number_of)
    ]
    known = {token.content for token in encoder.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    extra = config.get("extra_special_tokens")
    for entry in [*named.values(), *(extra if isinstance(extra, list) else [])]:
        text = _content(entry)
        if text and text not in known:
            flags = entry if isinstance(entry, dict) else {}
            tokens.append(_added_token({**flags, "content": text, "special": True}))
            known.add(text)
    encoder.add_tokens(tokens)
    encoder.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _added_token(entry: dict[str, Any], named: bool = False) -> AddedToken:
    special = bool(entry.get("special", False))
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
    return AddedToken(
        entry["content"], special=special or named, **{"normalized": not special, **flags}
    )


def _number_of(item: tuple[str, Any]) -> int:
    return int(item[0])


def end_id(
    tokenizer: Tokenizer, path: str | Path | None = None, end_token: str | None = None
) -> int | None:
    """Return the id of the token that ends a document, or None if there is no such token.

    ``path``: the folder or the tokenizer.json that the tokenizer comes from. Its eos_token is the
    end token, or else the first eos_token_id of generation_config.json or config.json. If no file
    names a token, a well-known end token of the vocabulary is taken.
    ``end_token``: the user's choice, which overrides the files.

    Raises UserError for an end token that the tokenizer does not have."""
    if end_token is not None:
        return _id_of(tokenizer, end_token, f"--data.end-token {end_token!r}")
    if path is not None:
        named = _content(tokenizer_config(path).get("eos_token"))
        # transformers passes over the map if the config lists added tokens. The map is still better
        # evidence than a guess.
        named = named or _content(read_beside(path, "special_tokens_map.json").get("eos_token"))
        if named:
            return _id_of(tokenizer, named, f"the eos_token {named!r} beside {str(path)!r}")
        for name in ("generation_config.json", "config.json"):
            ids = read_beside(path, name).get("eos_token_id")
            first: Any = ids[0] if isinstance(ids, list) and ids else ids
            known = isinstance(first, int) and 0 <= first < 1 << 32  # else the library refuses it
            if known and tokenizer.id_to_token(first) is not None:
                return first
    found = (tokenizer.token_to_id(token) for token in _WELL_KNOWN_ENDS)
    return next((token for token in found if token is not None), None)


def _id_of(tokenizer: Tokenizer, token: str, what: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(
            f"{what}: the tokenizer has no such token; name one of its tokens by --data.end-token"
        )
    return found


def save_tokenizer(tokenizer: Tokenizer, file: Path, end: int | None) -> list[Path]:
    """Write a tokenizer.json, and return the files written. Beside it, name its end token, unless
    `end_id` finds it without."""
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # The library itself writes to no path that is not Unicode.
    part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(part, file)
    try:
        known = end is None or end_id(tokenizer, file) == end
    except UserError:  # the config of another tokenizer, which had this name before
        known = False
    if end is None or known:
        return [file]
    entries = read_beside(file, CONFIG) | {"eos_token": tokenizer.id_to_token(end)}
    config = file_beside(file, CONFIG)
    config.write_text(json.dumps(entries) + "\n", encoding="utf-8")
    return [file, config]
