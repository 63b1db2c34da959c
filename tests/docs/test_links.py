"""Every link of every page leads to a file and to a heading in it. The API page has every module,
and the site has every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings: lower case, no punctuation, dashes for spaces."""
    found: set[str] = set()
    for line in re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S).splitlines():
        if heading := re.match(r"#+ +(.+)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.group(1)).lower()
            slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
            n = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", a) is not None for a in found)
            found.add(f"{slug}-{n}" if n else slug)
    return found


def broken(at: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (at.parent / name).resolve() if name else at
        if not target.exists() or ROOT not in (target, *target.parents):
            found.append(link)
        elif anchor and target.suffix == ".md":
            page = text if target == at else target.read_text()
            found += [] if anchor in anchors(page) else [link]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_a_link_that_leads_nowhere_is_noticed():
    links = "[a](#a-heading-of-two-words) [b](#b) [c](docs/no.md) [d](dtron)"
    page = f"# A heading: of `two` words\n{links}"
    assert broken(ROOT / "README.md", page) == ["#b", "docs/no.md"]


def long_lines(text: str) -> list[str]:
    """The lines of prose over 100 columns. Tables, code, and a line that a link makes long may
    be longer."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S).splitlines()
    return [x for x in prose if len(LINK.sub("[]", x)) > 100 and not x.lstrip().startswith("|")]


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.name != "CHANGELOG.md"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_prose_has_100_columns(page):
    assert long_lines(page.read_text()) == []


def test_a_long_line_is_noticed():
    long = "word " * 21
    table, link = f"| {long} |", f"a [b]({'c' * 100}) d"
    assert long_lines(f"{long}\n```\n{long}\n```\n{table}\n{link}") == [long]


def test_the_site_has_every_page_and_the_api_every_module():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in site, page.name
    listed = set(re.findall(r"^::: dtron\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    there = {
        ".".join(p.relative_to(ROOT / "dtron").with_suffix("").parts)
        for p in (ROOT / "dtron").rglob("*.py")
    }
    commands = {
        "generate",
        "profile",
        "show",
        "verify",
    }  # these files only start programs of tools/
    assert listed == {m for m in there if not m.rpartition(".")[2].startswith("__")} - commands
