"""Writes small SVG pictures.

An SVG is text. So no library is needed, and a test can compare a figure that is drawn from live
objects with the committed figure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

INK, PAPER, FAINT, MANY = "#222", "#fff", "#777", "#ddd"


class Canvas:
    """A picture of a given width, as tall as its shapes. Units are pixels; y grows downwards.

    ``ink``, ``paper``: the colours of text and lines, and of the background."""

    def __init__(self, width: float, ink: str = INK, paper: str = PAPER):
        self._width, self._height, self._ink, self._paper = width, 0.0, ink, paper
        self._parts: list[str] = []

    @contextmanager
    def mark(self, title: str, **attributes: object) -> Iterator[None]:
        """Shapes that are drawn inside have a title, which a reader sees over them. ``attributes``:
        further attributes of the group, such as ``data_rank=0``."""
        own = "".join(f' {k.replace("_", "-")}="{escape(str(v))}"' for k, v in attributes.items())
        self._parts.append(f'<g class="mark"{own}><title>{escape(title)}</title>')
        yield
        self._parts.append("</g>")

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = "none",
        line: str | None = None,
        dashed: bool = False,
    ) -> None:
        line = line or self._ink
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        box = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        self._add(y + h, f'<rect {box} fill="{fill}" stroke="{line}"{dash}/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        bold: bool = False,
        anchor: str = "start",
        colour: str | None = None,
    ) -> None:
        style = f'font-size="{size:g}" text-anchor="{anchor}" fill="{colour or self._ink}"'
        style += ' font-weight="bold"' if bold else ""
        self._add(y + 4, f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def arrow(self, x: float, y: float, length: float) -> None:
        """Draw an arrow from (x, y) to the right."""
        path = f"M{x:.1f} {y:.1f}H{x + length:.1f}m-6 -4l6 4l-6 4"
        self._add(y + 4, f'<path d="{path}" fill="none" stroke="{self._ink}"/>')

    def line(self, points: list[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        box = f'points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"'
        box += ' stroke-dasharray="5 3"' if dashed else ""
        self._add(max(y for _, y in points), f"<polyline {box}/>")

    def path(
        self,
        x: float,
        y: float,
        d: str,
        fill: str = "none",
        line: str = "none",
        height: float = 0.0,
    ) -> None:
        """Draw a path of SVG at (x, y).

        ``d``: its commands, from there.
        ``height``: how far it goes down."""
        place = f'transform="translate({x:.1f} {y:.1f})"'
        self._add(y + height, f'<path {place} d="{d}" fill="{fill}" stroke="{line}"/>')

    @property
    def height(self) -> float:
        """The lower end of the lowest shape."""
        return self._height

    def svg(self, style: str = "") -> str:
        """Return the picture as the text of an SVG file.

        ``style``: rules of CSS."""
        height = self._height + 16
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:g} {height:.0f}" '
            f'width="{self._width:g}" height="{height:.0f}" font-family="sans-serif">'
        )
        paper = f'<rect width="100%" height="100%" fill="{self._paper}"/>'
        styles = [f"<style>{style}</style>"] if style else []
        return "\n".join([head, *styles, paper, *self._parts, "</svg>\n"])

    def inline(self, label: str) -> str:
        """Return the picture as an element of an HTML page, without a background.

        ``label``: what a screen reader says."""
        box = f'viewBox="0 0 {self._width:g} {self._height + 8:.0f}"'
        head = f'<svg {box} role="group" aria-label="{escape(label)}" font-family="sans-serif">'
        return "\n".join([head, *self._parts, "</svg>"])

    def _add(self, bottom: float, part: str) -> None:
        self._height = max(self._height, bottom)
        self._parts.append(part)
