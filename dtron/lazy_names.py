"""Names of a package that are imported when they are first used.

``python -m dtron.hf`` imports the package ``dtron.hf`` before it runs its ``__main__``. If the
package imported torch, which takes seconds, Ctrl-C would end these seconds with a traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    ``names``: the names of each module of the package."""
    home = {name: module for module, group in names.items() for name in group}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get
