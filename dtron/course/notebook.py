"""What a notebook of the course imports: ``check`` for its lab, ``compare`` for a prediction, and
``play`` for a picture with controls, which needs ipywidgets (the extra ``course``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import FrameType, ModuleType
from typing import Any

from dtron.course.lab import LabResult, Place, check_parts
from dtron.course.labs import lab
from dtron.errors import UserError

_STYLE = ".dtron-view svg { max-width: 100%; height: auto }"


def check(number: int, namespace: Mapping[str, Any]) -> None:
    """Print the line of ``dtron course check`` for the functions of a notebook, and the points of
    each part.

    ``namespace``: ``globals()``. Raises UserError if there is no such lab."""
    print(with_points(checked(number, namespace)))


def checked(number: int, namespace: Mapping[str, Any]) -> LabResult:
    """Check a lab whose answers are in a notebook's namespace."""
    module = ModuleType("notebook")
    vars(module).update(namespace)
    return check_parts(lab(number), module, _place(namespace))


def with_points(result: LabResult) -> str:
    """Return the line of a result, above the points of each part."""
    parts = (f"  {p.points} of {p.of}  {p.name}{' (hidden)' * p.hidden}" for p in result.parts)
    return "\n".join([str(result), *parts])


def compare(guess: Any, found: Any) -> None:
    """Print whether a prediction is right. Without a prediction, the answer is not printed."""
    if guess is None:
        print("write your prediction first")
    elif guess == found:
        print(f"right: {found}")
    else:
        print(f"it is {found}, and you predicted {guess}")


def _place(namespace: Mapping[str, Any]) -> Place:
    """Find lines of a notebook: code whose globals are the notebook's. A line is counted in its
    cell."""

    def place(frame: FrameType, line: int) -> str | None:
        if frame.f_globals is not namespace:
            return None
        name = frame.f_code.co_qualname.partition(".")[0]
        return f"line {line} of the cell with {name}"

    return place


def play(view: Callable[..., str], **choices: Sequence[Any]) -> Any:
    """Return a picture with a control for each argument of its view.

    ``view``: returns SVG or HTML. A UserError of the view is shown in the picture's place.
    ``choices``: the values of each argument; the first is shown first."""
    import ipywidgets

    controls = {
        name: ipywidgets.SelectionSlider(
            options=[(_shown(value), value) for value in values],
            description=name.replace("_", " "),
            continuous_update=False,
            style={"description_width": "initial"},
        )
        for name, values in choices.items()
    }
    picture = ipywidgets.HTML()

    def draw(_: object = None) -> None:
        picture.value = drawn(view, {name: c.value for name, c in controls.items()})

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return ipywidgets.VBox([ipywidgets.VBox([*controls.values()]), picture])


def drawn(view: Callable[..., str], values: Mapping[str, Any]) -> str:
    """Return the picture of a view, no wider than the page. If the values do not fit
    together, return the line that says so."""
    try:
        return f'<div class="dtron-view"><style>{_STYLE}</style>{view(**values)}</div>'
    except UserError as error:
        return f"<p>{escape(str(error))}</p>"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "(none)" if isinstance(value, tuple) else str(value)
