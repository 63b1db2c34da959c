"""What the pages say is what the code is."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import settings

from dtron.hf.config import best_family, to_hf
from dtron.model.presets import preset
from dtron.runtime.cli import parse
from dtron.schedules.__main__ import main
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_block(containing: str) -> str:
    return next(code for language, code in BLOCKS if language == "python" and containing in code)


@pytest.mark.parametrize(
    ("containing", "file"),
    [("class MLP", "dtron/layers/mlp.py"), ("RULES: Rules", "dtron/rules.py")],
)
def test_code_shown_is_the_code(containing, file):
    assert python_block(containing) in (ROOT / file).read_text()


def test_the_schedule_shown_is_the_schedule():
    page = (ROOT / "docs" / "pipelining.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert shown in (ROOT / "dtron" / "schedules" / "one_f_one_b.py").read_text()


def test_the_comparison_shown_is_what_the_command_prints(capsys):
    assert main(["compare", "--stages", "8", "--microbatches", "32", "-o", "/dev/null"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed]
    page = (ROOT / "docs" / "pipelining.md").read_text()
    assert len(cells) == 6 and all("| " + " | ".join(row) + " |" in page for row in cells)


def test_the_five_line_proof_runs():
    """With fewer examples than a reader draws."""
    few = settings(settings.get_profile("default"), max_examples=15)
    settings.register_profile("few", few)
    settings.load_profile("few")
    try:
        scope = {}
        exec(compile(python_block("def test_my_layer"), "README.md", "exec"), scope)
    finally:
        settings.load_profile("default")
    scope["test_my_layer"]()


def test_the_two_commands_come_first():
    assert [code.strip() for _, code in BLOCKS[:2]] == [
        "pip install -e . && python train.py",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("line", re.findall(r"train\.py (--.*?)(?:  #.*)?$", README, re.M))
def test_commands_shown_are_understood(line, tmp_path, monkeypatch):
    m = preset("llama3.2-1b")
    folder = tmp_path / "Llama-3.2-1B"  # which some begin with
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(m, best_family(m))))
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert parse(line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link
