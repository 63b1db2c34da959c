"""Frozen weights: weights of a tree that training does not change, as most weights are with LoRA.

A frozen weight has no gradient, no optimizer state and no master copy, and it is in no checkpoint.
So the gradients and the state of a step are trees that lack the frozen weights (None), and the
optimizer never sees them.
"""

from __future__ import annotations

from typing import Any

from dtron.tree import flat, unflatten


def trained(spec: Any, tree: Any) -> Any:
    """Return the tree without its frozen weights (None in their place).

    ``spec``: the declared tree."""
    return unflatten(
        tree, [None if w.frozen else x for w, x in zip(flat(spec), flat(tree), strict=True)]
    )


def with_frozen(spec: Any, params: Any, part: Any) -> Any:
    """Return the weights of ``part``, which ``trained`` has made, with the frozen ones of
    ``params``."""
    rest = iter(flat(part))
    pairs = zip(flat(spec), flat(params), strict=True)
    return unflatten(params, [x if w.frozen else next(rest) for w, x in pairs])
