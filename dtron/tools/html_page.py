"""Writes HTML pages of one file, which need no network: drawings, tables, and text beside colour.

A page has a light and a dark theme, which the reader's browser chooses. So drawings name colours by
variables of CSS (``series``), and ``THEME`` has their values. A page is also well-formed XML, so
any parser can read it. Its only script shows the title of the mark under the pointer. Without the
script, the browser shows the titles by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from dtron.errors import UserError
from dtron.tools.svg import Canvas

INK, FAINT, PAPER, RULE, IDLE = (
    f"var(--{name})" for name in ("ink", "faint", "paper", "rule", "idle")
)
_LIGHT = {
    "ink": "#1c2430",
    "faint": "#5d6877",
    "paper": "#ffffff",
    "panel": "#f4f6f9",
    "rule": "#cfd6df",
    "idle": "#e3e7ed",
    "good": "#1a7f4b",
    "bad": "#b3261e",
}
_DARK = {
    "ink": "#e4e8ee",
    "faint": "#9aa5b4",
    "paper": "#12161c",
    "panel": "#1b212a",
    "rule": "#3a4452",
    "idle": "#2a323d",
    "good": "#5fd39a",
    "bad": "#ff8a80",
}
# Fills with room for a label in ``ink``: blue, orange, green, purple, yellow, teal, red, brown and
# grey.
_FILLS = (
    ("#7fb2e8", "#2c66a3"),
    ("#f0a860", "#a85a14"),
    ("#8fca7a", "#3f7a2c"),
    ("#bf9ae0", "#74489f"),
    ("#ead05a", "#86700c"),
    ("#63c4b8", "#1d776c"),
    ("#ec8f8a", "#a63d38"),
    ("#c9aa85", "#765a3a"),
    ("#aab3bf", "#5c6672"),
)
COLOURS = len(_FILLS)


def series(i: int) -> str:
    """Return the fill of a series, as a value of CSS. There are nine; the tenth is the first."""
    return f"var(--c{i % COLOURS})"


def line_colour(i: int) -> str:
    """Return the colour of a line, as a value of CSS. A page needs ``LINE_THEME`` for it."""
    return f"var(--l{i % COLOURS})"


def _variables(theme: Mapping[str, str], which: int) -> str:
    pairs = dict(theme) | {f"c{i}": pair[which] for i, pair in enumerate(_FILLS)}
    return ";".join(f"--{name}:{value}" for name, value in pairs.items())


THEME = (
    f":root{{color-scheme:light dark;{_variables(_LIGHT, 0)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK, 1)}}}}}"
)
# The colours of lines: a series' darker fill on light paper, and the lighter one on dark paper.
LINE_THEME = "".join(
    f"\n{media}{{:root{{{';'.join(f'--l{i}:{x[which]}' for i, x in enumerate(_FILLS))}}}}}"
    for media, which in (("@media all", 1), ("@media (prefers-color-scheme:dark)", 0))
)
_STYLE = """
body{margin:0 auto;max-width:1160px;padding:24px 20px 60px;background:var(--paper);
  color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px} h2{font-size:18px;margin:40px 0 4px}
p{margin:4px 0 10px;max-width:90ch} .faint{color:var(--faint)}
code{background:var(--panel);padding:2px 5px;border-radius:4px;overflow-wrap:anywhere}
code span{white-space:nowrap} td code{background:none;padding:0}
.cards{display:flex;flex-wrap:wrap;gap:12px;padding:0;margin:18px 0}
.cards li{list-style:none;background:var(--panel);border-radius:8px;padding:10px 16px;
  min-width:140px}
.cards b{display:block;font-size:21px} .good b{color:var(--good)} .bad b{color:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;font-size:13px}
.legend li{list-style:none} .legend i{display:inline-block;width:12px;height:12px;
  border-radius:2px;margin-right:6px;vertical-align:-1px}
.wide{overflow-x:auto} svg{display:block;width:100%;min-width:760px;height:auto}
table{border-collapse:collapse;font-size:13px;margin:8px 0} caption{text-align:left}
th,td{padding:3px 10px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--faint);font-weight:600} .right{text-align:right;white-space:nowrap}
summary{cursor:pointer;color:var(--faint)} .mark:hover,.mark:focus{opacity:.75;outline:none}
#tip{position:fixed;z-index:1;max-width:420px;padding:7px 10px;border-radius:6px;font-size:13px;
  background:var(--ink);color:var(--paper);white-space:pre-line;overflow-wrap:anywhere;
  pointer-events:none}
#tip[hidden]{display:none}
"""
# Without "less than" and "and", which XML would read as its own signs.
_SCRIPT = """
const tip = document.getElementById("tip");
for (const mark of document.querySelectorAll(".mark")) {
  const title = mark.querySelector("title");
  mark.setAttribute("aria-label", title.textContent);
  mark.setAttribute("role", "img");
  title.remove();  // or the browser would show it a second time
}
function show(event) {
  const mark = event.target.closest ? event.target.closest(".mark") : null;
  tip.hidden = mark === null;
  if (tip.hidden) return;
  tip.textContent = mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect();
  const x = event.clientX === undefined ? box.right : event.clientX;
  const y = event.clientY === undefined ? box.bottom : event.clientY;
  const left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8);
  const above = y + 18 + tip.offsetHeight > innerHeight;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = (above ? y - tip.offsetHeight - 12 : y + 18) + "px";
}
for (const kind of ["pointermove", "focusin"]) document.addEventListener(kind, show);
document.addEventListener("focusout", () => { tip.hidden = true; });
"""


def page(
    title: str, lead: Sequence[str], sections: Iterable[str], style: str = "", script: str = ""
) -> str:
    """Return a page.

    ``lead``: elements of HTML below the title.
    ``sections``: see ``section``.
    ``style``, ``script``: rules of CSS and statements that this page has beside those of all pages.
        Neither may have the signs "less than" and "and"."""
    name = escape(title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{name}</title><style>{THEME}{_STYLE}{style}</style></head><body>",
        f"<h1>{name}</h1>",
        *lead,
        *sections,
        f'<div id="tip" role="tooltip" hidden="hidden"></div><script>{_SCRIPT}{script}</script>',
        "</body></html>\n",
    ]
    return "\n".join(parts)


def section(heading: str, text: str, *parts: str) -> str:
    """Return a part of a page.

    ``text``: what the reader sees there, as plain text.
    ``parts``: elements of HTML."""
    inner = "\n".join(parts)
    return f"<section><h2>{escape(heading)}</h2><p>{escape(text)}</p>\n{inner}</section>"


def drawing(canvas: Canvas, label: str) -> str:
    """Return a drawing. A narrow window scrolls it.

    ``label``: what a screen reader says."""
    return f'<div class="wide">{canvas.inline(label)}</div>'


def paragraph(text: str, code: str = "") -> str:
    """Return a paragraph of plain text, with a command behind it."""
    return f'<p class="faint">{escape(text)} {_code(code) if code else ""}</p>'


def _code(text: str) -> str:
    """Return a command that is wrapped between its words only."""
    return f"<code>{' '.join(f'<span>{escape(word)}</span>' for word in text.split(' '))}</code>"


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return the numbers that matter most: triples of value, text, and "good", "bad" or nothing."""
    rows = (
        f'<li class="{kind}"><b>{escape(value)}</b>{escape(text)}</li>'
        for value, text, kind in entries
    )
    return f'<ul class="cards">{"".join(rows)}</ul>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return names beside their colours."""
    rows = (f'<li><i style="background:{fill}"></i>{escape(name)}</li>' for name, fill in entries)
    return f'<ul class="legend">{"".join(rows)}</ul>'


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[int] = (),
    code: Sequence[int] = (),
) -> str:
    """Return a table of text.

    ``right``: the columns of numbers.
    ``code``: the columns of commands."""

    def line(cells: Sequence[str], tag: str) -> str:
        found = ""
        for i, x in enumerate(cells):
            kind = ' class="right"' if i in right else ""
            found += f"<{tag}{kind}>{_code(x) if i in code and tag == 'td' else escape(x)}</{tag}>"
        return f"<tr>{found}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    head = line(headers, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def folded(heading: str, *parts: str) -> str:
    """Return elements of HTML that the reader unfolds."""
    return f"<details><summary>{escape(heading)}</summary>{''.join(parts)}</details>"


def same_table(shown: Table) -> str:
    """Return a table of the terminal as HTML, folded away: the numbers of a drawing, as text."""
    columns = [(str(c.header), [str(x) for x in c.cells], c.justify) for c in shown.columns]
    right = [i for i, (_, _, justify) in enumerate(columns) if justify == "right"]
    rows = zip(*(cells for _, cells, _ in columns), strict=True)
    inner = table([name for name, _, _ in columns], list(rows), right)
    return folded(str(shown.title), inner)


def check_output(flag: str, name: str) -> None:
    """Raise UserError for a file that certainly cannot be written, before any work for it."""
    path = Path(name)
    try:
        if path.is_dir():
            raise UserError(f"{flag} {name}: is a folder; give a file, as plan.html")
        if not path.parent.is_dir():
            raise UserError(f"{flag} {name}: there is no folder {path.parent}; make it first")
        target = path if path.exists() else path.parent
    except OSError as error:
        raise UserError(_cannot(flag, name, error)) from None
    if not os.access(target, os.W_OK):
        raise UserError(f"{flag} {name}: {target} may not be written; choose another")


def write_page(flag: str, name: str, text: str) -> None:
    """Write a page. Raises UserError if the file cannot be written."""
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(_cannot(flag, name, error)) from None


def _cannot(flag: str, name: str, error: OSError) -> str:
    return f"{flag} {name}: cannot be written ({error.strerror}); choose another"
