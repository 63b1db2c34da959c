"""Hooks of the documentation site: links from a page to a source file lead to the module's place in
the API reference, and links out of docs/ to the file's name alone."""

from __future__ import annotations

import re
from typing import Any

_SOURCE = re.compile(r"\]\(\.\./dtron/([\w/]+)\.py(?:#L\d+)?\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite a page before mkdocs resolves its links."""

    def to_api(found: re.Match) -> str:
        name = found.group(1).replace("/", ".").removesuffix(".__init__")
        return f"](api.md#dtron.{name})"

    return _OUTSIDE.sub(r"\1", _SOURCE.sub(to_api, markdown))
