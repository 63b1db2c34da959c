"""dtron.tools.draw_schedules: times that cannot be drawn are one line."""

import pytest

from dtron.schedules.__main__ import main
from tests.helpers.texts import one_line


@pytest.mark.parametrize("command", [["draw", "1f1b"], ["draw", "zb-v"], ["compare"]])
def test_times_that_cannot_be_drawn_are_one_line(command):
    for flag in ("--F", "--I", "--W", "--transfer"):
        for time, says in (("1e308", "invalid duration"), ("1e9", "time")):
            one_line(lambda f=flag, t=time: main([*command, f"{f}={t}"]), says)


@pytest.mark.parametrize("flag", ["--F", "--I", "--W"])
def test_an_action_may_take_no_time(flag, capsys):
    assert main(["draw", "zb-h1", f"{flag}=0"]) == 0
    assert "rank 0" in capsys.readouterr().out
