"""The sizes of a mesh's axes and their text form, ``dp=8,tp=4``. Nothing here needs torch: a mesh of any size
can be spoken of on any machine. What the axes mean stands in mesh.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

AXES = ("pp", "dp_replicate", "dp", "cp", "tp")


@dataclass(frozen=True)
class MeshShape:
    """The size of every mesh axis, in ``AXES`` order. ``MeshShape.parse("dp=8,tp=4")`` reads the text
    form."""

    pp: int = 1
    dp_replicate: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def data(self) -> int:
        """How many ways the sequences of a batch are split."""
        return self.dp_replicate * self.dp

    def __str__(self) -> str:
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "dp=1"

    @staticmethod
    def parse(text: str, world: int | None = None) -> MeshShape:
        """Read ``"dp=8,tp=4"``: any order, axes of size 1 optional, dp filled in from ``world`` when left
        out.

        Raises ValueError for an unknown or repeated axis, a size that is no positive integer, and sizes whose
        product is not ``world``.
        """
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = (part.strip() for part in item.partition("="))
            if axis not in AXES:
                raise ValueError(
                    f"mesh {text!r}: unknown axis {axis!r}; the axes are {', '.join(AXES)}, as in dp=2,tp=2"
                )
            if axis in sizes:
                raise ValueError(f"mesh {text!r}: axis {axis!r} is given twice; write it once")
            if not (size.isascii() and size.isdigit() and len(size) < 10 and int(size) > 0):
                raise ValueError(
                    f"mesh {text!r}: {axis} has size {size!r}; a size is a positive integer, as in {axis}=2"
                )
            sizes[axis] = int(size)
        shape = MeshShape(**sizes)
        if world is None or shape.size == world:
            return shape
        if "dp" not in sizes and world % shape.size == 0:
            return replace(shape, dp=world // shape.size)
        remedy = (
            f"start {shape.size} processes (torchrun --nproc-per-node {shape.size}), or add --simulate"
            if "dp" in sizes or shape.size > world
            else f"choose sizes whose product divides {world}"
        )
        raise ValueError(
            f"mesh {text!r} has {shape.size} ranks, but {world} {'is' if world == 1 else 'are'} running: "
            f"{remedy}"
        )
