"""The sizes of a mesh's axes and their text form, ``dp=8,tp=4,ep=8``. Nothing here needs torch, so
a mesh of any size can be described on any machine. mesh.py defines the axes.

Experts may be sharded over the same ranks in another way than the rest of the model (parallel
folding, Liu et al. 2025, arXiv:2504.14960): dp * cp * tp ranks are also edp * ep * etp ranks. These
two factorisations have a common refinement, made of *atoms*: each of the six axes is a product of
atoms. The dims of the DeviceMesh are the atoms. So one mesh has both views, and an axis is a name
for one or more of its dims. With ep = 4,

    dp=8,tp=2    is    dp.edp=4, dp.ep=2, tp.ep=2

``dp`` is ``(dp.edp, dp.ep)`` there, ``ep`` is ``(dp.ep, tp.ep)``, and ``edp`` is ``(dp.edp,)``. An
axis whose ranks all belong to ``edp`` keeps its name: without expert parallelism the atoms are the
axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dtron.bounds import nearest_divisor
from dtron.errors import UserError

AXES = ("pp", "dp_replicate", "dp", "cp", "tp")
EXPERT_AXES = ("edp", "ep", "etp")
LARGEST = 1 << 20  # ranks; a drawing or a table of more would never end
FOLDED = ("dp", "cp", "tp")  # the axes over whose ranks experts have other axes


@dataclass(frozen=True)
class MeshShape:
    """The size of every mesh axis, in ``AXES`` order, and the sizes of the expert axes over the
    ranks of dp, cp and tp. Experts are spread over ``ep`` groups of ranks, and each expert is
    sharded over ``etp`` ranks. ``MeshShape.parse("dp=8,tp=4")`` reads the text form."""

    pp: int = 1
    dp_replicate: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def size(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes in ``AXES``; their product is the number of ranks."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def data(self) -> int:
        """The number of ranks over which the sequences of a batch are sharded."""
        return self.dp_replicate * self.dp

    @property
    def edp(self) -> int:
        """The number of ranks with the same ep and etp shard of the experts, in one replica and
        stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def atoms(self) -> dict[str, int]:
        """The names and sizes of the DeviceMesh's dims, outermost first, without dims of size 1.

        etp takes its ranks from tp first, then cp, then dp. ep takes its ranks from the rest, in
        the same order. So both get adjacent ranks, as far as there are adjacent ranks left. Raises
        UserError if the sizes do not fit.
        """
        ranks = self.dp * self.cp * self.tp
        if ranks % (self.ep * self.etp):
            raise UserError(
                f"mesh {self}: ep={self.ep} must divide dp*cp*tp/etp = {ranks}/{self.etp}; use "
                f"{_nearest(ranks, self.ep, self.etp)}, or change dp"
            )
        left = {axis: getattr(self, axis) for axis in FOLDED}
        taken: dict[str, dict[str, int]] = {axis: {} for axis in FOLDED}
        for name in ("etp", "ep"):
            need = getattr(self, name)
            for axis in reversed(FOLDED):
                n = math.gcd(need, left[axis])
                taken[axis][name], left[axis], need = n, left[axis] // n, need // n
        atoms = {axis: getattr(self, axis) for axis in AXES if axis not in FOLDED}
        for axis in FOLDED:
            whole = left[axis] == getattr(self, axis)
            parts = {"edp": left[axis], "ep": taken[axis]["ep"], "etp": taken[axis]["etp"]}
            atoms |= (
                {axis: left[axis]} if whole else {f"{axis}.{name}": n for name, n in parts.items()}
            )
        return {name: n for name, n in atoms.items() if n > 1}

    def parts(self, axis: str) -> int:
        """The size of any axis, expert axes included."""
        return math.prod(n for atom, n in self.atoms.items() if is_part(atom, axis))

    def __str__(self) -> str:
        experts = {"ep": self.ep, "etp": self.etp}
        return ",".join(f"{a}={n}" for a, n in {**self.sizes, **experts}.items() if n > 1) or "dp=1"

    @staticmethod
    def parse(text: str, world: int | None = None) -> MeshShape:
        """Read ``"dp=8,tp=4"``. The axes may be in any order, and axes of size 1 are optional. If
        dp is left out, it is computed from ``world``.

        Raises UserError for an unknown or repeated axis, for a size that is not a positive integer,
        and for sizes whose product is not ``world``.
        """
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = (part.strip() for part in item.partition("="))
            if axis not in (*AXES, "ep", "etp"):
                names = ", ".join((*AXES, "ep", "etp"))
                raise UserError(
                    f"mesh {text!r}: unknown axis {axis!r}; the axes are {names}, as in dp=2,tp=2"
                )
            if axis in sizes:
                raise UserError(f"mesh {text!r}: axis {axis!r} is given twice; write it once")
            if not (size.isascii() and size.isdigit() and len(size) < 10 and int(size) > 0):
                raise UserError(
                    f"mesh {text!r}: {axis} has size {size!r}; a size is a positive integer, as "
                    f"in {axis}=2"
                )
            sizes[axis] = int(size)
        shape = MeshShape(**sizes)
        if shape.size > LARGEST:
            raise UserError(f"mesh {text!r} has {shape.size} ranks; at most {LARGEST} are possible")
        if world is None or shape.size == world:
            return shape
        if "dp" not in sizes and world % shape.size == 0:
            return replace(shape, dp=world // shape.size)
        remedy = (
            f"start {shape.size} processes (torchrun --nproc-per-node {shape.size}), or add "
            "--simulate"
            if "dp" in sizes or shape.size > world
            else f"choose sizes whose product divides {world}"
        )
        are_running = "is running" if world == 1 else "are running"
        raise UserError(
            f"mesh {text!r} has {shape.size} ranks, but {world} {are_running}: {remedy}"
        )


def is_part(atom: str, axis: str) -> bool:
    """Whether a dim of the DeviceMesh is this axis or a factor of it. ``dp.ep`` is a factor of dp
    and of ep. A ``dp`` that is not split is a factor of dp and of edp."""
    dense, _, expert = atom.partition(".")
    return axis == dense or axis == (expert or ("edp" if dense in FOLDED else ""))


def parts(atoms: Iterable[str], axis: str) -> tuple[str, ...]:
    """Return the dims of a DeviceMesh that make up an axis, outermost first."""
    return tuple(atom for atom in atoms if is_part(atom, axis))


def _nearest(ranks: int, ep: int, etp: int) -> str:
    if ranks % etp:
        return f"etp={nearest_divisor(ranks, etp)}"
    return f"ep={nearest_divisor(ranks // etp, ep)}"
