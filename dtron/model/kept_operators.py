"""The operators whose results a recomputed region keeps for backward, for activation policies
(activation_checkpoint.py). Each function here is a policy of torch's selective checkpoint: it is
called with every operator of the region."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

_CHOICES = ("topk", "select_keys")
_MATMULS = (
    "mm",
    "addmm",
    "bmm",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_dot_product",
    "flex_attention",
)


def _is_view(op: Any) -> bool:
    # flex_attention, an operator that takes functions, has no schema.
    schema = getattr(op, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _keep(op: Any, names: tuple[str, ...]) -> CheckpointPolicy:
    keep = getattr(op, "overloadpacket", op).__name__.startswith(names) and not _is_view(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def choices(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the choice of experts, and the choice of keys in sparse attention."""
    return _keep(op, _CHOICES)


def matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of matmuls and attention, and the choices."""
    return _keep(op, (*_MATMULS, *_CHOICES))


class AllKept:
    """Keep everything but gathered weights and views (a view may be of a gathered weight)."""

    def __init__(self) -> None:
        self.gathering = False

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = not self.gathering and not _is_view(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
