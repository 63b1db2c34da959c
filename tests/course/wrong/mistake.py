"""A plausible wrong solution, as edits of the reference solution, with its line. Those of each lab
are in a file of this folder."""

from __future__ import annotations

from dataclasses import dataclass

from dtron.course.labs import LABS
from tests.helpers.paths import ROOT

SOLUTIONS = ROOT / "tests" / "course" / "solutions"


@dataclass(frozen=True)
class Mistake:
    """A wrong solution.

    ``edits``: pairs of a text of the reference solution and its replacement.
    ``line``: a text that the line of the check contains."""

    lab: int
    name: str
    line: str
    edits: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The whole file."""
        text = (SOLUTIONS / f"lab{self.lab}_{LABS[self.lab]}.py").read_text()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.name}: {old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        return text


def mistake(lab: int, name: str, line: str, *edits: tuple[str, str]) -> Mistake:
    return Mistake(lab, name, line, edits)
