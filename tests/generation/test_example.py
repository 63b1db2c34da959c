"""The example of the package's docstring, which is the one of docs/generation.md, runs."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import dtron.generation


def test_the_example_generates():
    _, code = (dtron.generation.__doc__ or "").split("\n\n", 1)
    names: dict[str, Any] = {}
    exec(dedent(code.rpartition("\n\n")[0]), names)
    assert [len(text) for text in names["texts"].values()] == [8]
