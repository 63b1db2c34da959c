"""A tokenizer's own chat template, rendered as transformers renders it.

A chat template is a jinja program that turns messages into text. Published templates rely on the
way in which ``transformers`` runs them (``apply_chat_template``): on the environment
(chat_environment.py), and on the values that they read:

- ``messages`` without the keys whose value is null, and a message's reasoning under each of the
  names that templates read;
- ``tools``, ``documents`` (always none), ``add_generation_prompt``, and the named special tokens of
  the tokenizer.

The clock stands still while conversations are rendered: a template that writes the date writes the
same date into each of them. A template that does too much work is refused (chat_limits.py).

Left out: media. A part of a message that is no text is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template

from dtron.data.chat_environment import ChatEnvironment, Span
from dtron.data.files import one_line
from dtron.data.special_tokens import file_beside, special_tokens, tokenizer_config
from dtron.errors import UserError
from dtron.json_files import is_there, read_bytes

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]] | None

_LONGEST = 1 << 18  # characters of a template; published ones have less than a quarter of it
_WITHOUT = "move tokenizer.json to a folder without a chat template for the simple template"
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation.

    ``generated``: where the template's ``generation`` tags are in the text."""

    text: str
    generated: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a tokenizer, by name: ``default``, and others such as ``tool_use``.

    ``tokens``: the named special tokens, as ``{"bos_token": "<s>"}``."""

    sources: dict[str, str]
    tokens: dict[str, str] = field(default_factory=dict)

    def render(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> Rendered:
        """Render a conversation. Raises UserError if the template fails.

        ``prompt``: whether to end with the beginning of an answer (``add_generation_prompt``)."""
        template, environment = self._compiled[self._name(tools)]
        values = {
            **self.tokens,
            "messages": [_normalized(message) for message in messages],
            "tools": plain(tools),
            "documents": None,
            "add_generation_prompt": prompt,
        }
        tag = environment.tag
        tag.begin()
        environment.work.begin()
        try:
            for piece in template.generate(**values):
                tag.write(piece)
        except Exception as error:  # a template may fail in any way
            raise UserError(
                f"the tokenizer's chat template cannot render it ({one_line(error)}); change the "
                f"messages, or {_WITHOUT}"
            ) from error
        return Rendered("".join(tag.pieces), tuple(tag.spans))

    def tagged(self, tools: Tools = None) -> bool:
        """Whether the template marks what the model generates."""
        return self._compiled[self._name(tools)][1].tag.tagged

    def reads(self, name: str, tools: Tools = None) -> bool:
        """Whether the template mentions a name, such as ``tool_calls``."""
        return name in self.sources[self._name(tools)]

    def names(self, role: Any) -> bool:
        """Whether a template names a role of its own."""
        if not isinstance(role, str) or not role:
            return False
        return any(q + role + q in source for source in self.sources.values() for q in "'\"")

    def _name(self, tools: Tools) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise UserError(
                f"the tokenizer's chat templates are {', '.join(sorted(self.sources))}, and none "
                "is named default; name one of them so"
            )
        return name

    @cached_property
    def _compiled(self) -> dict[str, tuple[Template, ChatEnvironment]]:
        now = datetime.now()
        return {name: _compile(source, now) for name, source in self.sources.items()}


def template_beside(tokenizer_path: str | Path | None) -> ChatTemplate | None:
    """Return the chat template that belongs to a tokenizer, or None.

    It is in chat_template.jinja and additional_chat_templates/, or else in tokenizer_config.json.

    ``tokenizer_path``: a folder, or a tokenizer.json."""
    if tokenizer_path is None:
        return None
    file = file_beside(tokenizer_path, "chat_template.jinja")
    named = file_beside(tokenizer_path, "additional_chat_templates")
    sources = {"default": _read(file)} if is_there(file) else {}
    sources |= {other.stem: _read(other) for other in sorted(named.glob("*.jinja"))}
    if not sources:
        found = tokenizer_config(tokenizer_path).get("chat_template")
        if isinstance(found, list):  # several templates by name
            found = {entry["name"]: entry["template"] for entry in found}
        sources = {"default": found} if isinstance(found, str) else found or {}
    return ChatTemplate(sources, special_tokens(tokenizer_path)) if sources else None


def _read(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except (UserError, UnicodeError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({one_line(error)}); repair it, or {_WITHOUT}"
        ) from error


def plain(value: Any, drop_none: bool = False) -> Any:
    """Return a copy of JSON's types alone. Another value becomes the name of its type, as
    ``<datetime>``: its methods are not for templates.

    ``drop_none``: whether to drop the keys of objects whose value is None, at any depth."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not (drop_none and v is None)}
        return {plain(k): plain(v, drop_none) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, drop_none) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return f"<{type(value).__name__}>"


def _normalized(message: Message) -> Message:
    """Return a message as templates expect it: without null keys, and its reasoning under each
    name."""
    message = {key: plain(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _compile(source: str, now: datetime) -> tuple[Template, ChatEnvironment]:
    """Compile a template. Raises UserError if it is malformed."""
    try:
        if len(source) > _LONGEST:
            raise UserError(f"it has {len(source):,} characters, and at most {_LONGEST:,} are read")
        environment = ChatEnvironment(now)
        return environment.template(source), environment
    except Exception as error:  # the compilers of jinja2 and Python raise many kinds
        raise UserError(
            f"the tokenizer's chat template is malformed ({one_line(error)}); repair it, or "
            f"{_WITHOUT}"
        ) from error
