"""Hooks of the documentation site. A link from a page to a source file, or to an object in it
(``mesh.py#Layout``), leads to its place in the API reference. A link out of docs/ becomes the name
of the file alone."""

from __future__ import annotations

import re
from typing import Any

_SOURCE = re.compile(r"\]\((?:\.\./)+dtron/([\w/]+)\.py(?:#L\d+|#([\w.]+))?\)")


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Rewrite a page before mkdocs resolves its links."""
    depth = 0 if page is None else page.file.src_uri.count("/")

    def to_api(found: re.Match) -> str:
        name = found.group(1).replace("/", ".").removesuffix(".__init__")
        inner = f".{found.group(2)}" if found.group(2) else ""
        return f"]({'../' * depth}api.md#dtron.{name}{inner})"

    outside = re.compile(rf"\[([^\]]+)\]\((?:\.\./){{{depth + 1}}}[^)]+\)")
    return outside.sub(r"\1", _SOURCE.sub(to_api, markdown))
