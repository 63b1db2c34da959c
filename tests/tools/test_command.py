"""``dtron COMMAND``: every program has an entry, and a typo is answered in one line."""

from __future__ import annotations

import re

import pytest

from dtron.__main__ import COMMANDS, main, program
from dtron.runtime.exit import run_cli


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_program(name):
    assert callable(program(name))


def test_train_is_train_py():
    assert program("train").__code__.co_filename.endswith("train.py")


@pytest.mark.parametrize(
    ("argv", "part"), [(["verfy"], "did you mean verify?"), (["xyzzy"], "one of train, verify")]
)
def test_an_unknown_command_is_one_line(capsys, argv, part):
    assert run_cli(main, argv) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and part in err and not out


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
