"""Hooks of the documentation site: links from a page to a source file lead to the module's place in
the API reference, and links out of docs/ to the file's name alone."""

from __future__ import annotations

import re
from typing import Any

_SOURCE = re.compile(r"\]\((?:\.\./)+dtron/([\w/]+)\.py(?:#L\d+)?\)")


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Rewrite a page before mkdocs resolves its links."""
    depth = 0 if page is None else page.file.src_uri.count("/")

    def to_api(found: re.Match) -> str:
        name = found.group(1).replace("/", ".").removesuffix(".__init__")
        return f"]({'../' * depth}api.md#dtron.{name})"

    outside = re.compile(rf"\[([^\]]+)\]\((?:\.\./){{{depth + 1}}}[^)]+\)")
    return outside.sub(r"\1", _SOURCE.sub(to_api, markdown))
