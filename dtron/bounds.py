"""Range checks for the numbers of a config; a number out of range raises UserError."""

from __future__ import annotations

from typing import Any

from dtron.errors import UserError


def from_to(config: Any, prefix: str, limits: dict[str, tuple[float, float]]) -> None:
    """Check that each named field of a config is within its limits: ``{name: (low, high)}``."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:  # "not (low <= x <= high)" also refuses NaN
            raise UserError(f"{prefix}.{name}={value}: must be from {low} to {high}; change it")


def under(config: Any, prefix: str, limits: dict[str, float]) -> None:
    """Check that each named field of a config is at least 0 and under its limit."""
    for name, high in limits.items():
        value = getattr(config, name)
        if not 0 <= value < high:
            raise UserError(f"{prefix}.{name}={value}: must be from 0 to under {high}; change it")


def divides(name: str, size: int, axis: str, n: int) -> None:
    """Check that the ``n`` ranks of a mesh axis divide a size of the model: ``model.heads``."""
    if size % n:
        raise UserError(
            f"{name}={size} over {axis}={n}: {axis} must divide {name.rpartition('.')[2]}; use "
            f"{axis}={nearest_divisor(size, n)} or --{name.replace('_', '-')} {-(-size // n) * n}"
        )


def nearest_divisor(n: int, near: int) -> int:
    """Return the divisor of ``n`` nearest to ``near``; of two, the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - near), d))
