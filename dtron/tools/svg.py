"""Writes small SVG pictures.

An SVG is text. So no library is needed, and a test can compare a figure that is drawn from live
objects with the committed figure."""

from __future__ import annotations

from html import escape

INK, PAPER, FAINT, MANY = "#222", "#fff", "#777", "#ddd"


class Canvas:
    """A picture of a given width, as tall as its shapes. Units are pixels; y grows downwards."""

    def __init__(self, width: float):
        self._width, self._height = width, 0.0
        self._parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = "none",
        line: str = INK,
        dashed: bool = False,
    ) -> None:
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
        colour: str = INK,
    ) -> None:
        style = f'font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"'
        style += ' font-weight="bold"' if bold else ""
        self._add(y + 4, f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def arrow(self, x: float, y: float, length: float) -> None:
        """Draw an arrow from (x, y) to the right."""
        path = f"M{x:.1f} {y:.1f}H{x + length:.1f}m-6 -4l6 4l-6 4"
        self._add(y + 4, f'<path d="{path}" fill="none" stroke="{INK}"/>')

    def line(self, points: list[tuple[float, float]], colour: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        box = f'points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"'
        self._add(max(y for _, y in points), f"<polyline {box}/>")

    def svg(self) -> str:
        """Return the picture as SVG text."""
        height = self._height + 16
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:g} {height:.0f}" '
            f'width="{self._width:g}" height="{height:.0f}" font-family="sans-serif">'
        )
        return "\n".join(
            [head, f'<rect width="100%" height="100%" fill="{PAPER}"/>', *self._parts, "</svg>\n"]
        )

    def _add(self, bottom: float, part: str) -> None:
        self._height = max(self._height, bottom)
        self._parts.append(part)
