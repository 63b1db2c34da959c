"""``python docs/draw/notebooks.py`` writes the notebook of every lab into
docs/course/notebooks/."""

from __future__ import annotations

from pathlib import Path

from dtron.course.labs import LABS
from dtron.course.notebook_files import notebook_name, notebook_text

FOLDER = Path(__file__).parents[1] / "course" / "notebooks"

if __name__ == "__main__":
    for number in LABS:
        (FOLDER / notebook_name(number)).write_text(notebook_text(number))
        print(FOLDER / notebook_name(number))
