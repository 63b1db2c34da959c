"""``python -m dtron.schedules``: time pipeline schedules and draw them.

python -m dtron.schedules compare --stages 8 --microbatches 32
python -m dtron.schedules draw zb-v --stages 4
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli
from dtron.schedules import SCHEDULES, Costs, Timeline, make, peaks, simulate
from dtron.tools import draw_schedules as pictures

MOST_ACTIONS = 1 << 16  # forwards in one table
LONGEST = 1e9


def timed(name: str, o: Namespace) -> Timeline:
    """Time a schedule on ranks that all have the same number of layers. A rank with n stages has
    stages of an n-th of the time."""
    actions = o.stages * o.microbatches * o.stages_per_rank
    if actions > MOST_ACTIONS:
        raise UserError(
            f"--stages {o.stages} --microbatches {o.microbatches} --stages-per-rank "
            f"{o.stages_per_rank}: {actions} forwards, and at most {MOST_ACTIONS} are timed; "
            "lower one of the three"
        )
    if o.F + o.I + o.W == 0:
        raise UserError("--F 0 --I 0 --W 0: nothing takes time; give one of them a time")
    t = make(name, o.stages, o.microbatches, o.stages_per_rank)
    n = t.per_rank
    return simulate(t, Costs(o.F / n, o.I / n, o.W / n, o.transfer))


def compare(o: Namespace, console: Console) -> int:
    """Show every schedule that these sizes allow, in one table and one picture."""
    lines: dict[str, Timeline] = {}
    sizes = f"{o.stages} pipeline ranks, {o.microbatches} microbatches"
    grid = Grid(title=f"{sizes}, F {o.F:g}, I {o.I:g}, W {o.W:g}")
    grid.add_column("schedule")
    for column in ("stages per rank", "step", "bubble", "most activations", "sends per rank"):
        grid.add_column(column, justify="right")
    left_out = []
    for name in SCHEDULES:
        try:
            line = lines[name] = timed(name, o)
        except ValueError as error:
            left_out.append(str(error))
            continue
        t = line.table
        crossings = sum(t.rank_of[s] != t.rank_of[s + 1] for s in range(t.stages - 1))
        sends = crossings * 2 * t.microbatches
        grid.add_row(
            name,
            str(t.per_rank),
            f"{line.makespan:g}",
            f"{line.bubble:.1%}",
            f"{max(peaks(t)) / t.per_rank:g}",
            f"{sends / o.stages:g}",
        )
    if not lines:
        raise UserError(left_out[0])
    console.print(grid)
    console.print(
        "Most activations: the peak of the rank with the most. The unit is one microbatch's "
        "activations in all layers of a rank."
    )
    for reason in left_out:
        console.print(f"left out: {reason}")
    for name, line in lines.items():
        if o.out:
            continue
        console.print(f"\n{name}")
        console.print(pictures.text(line), soft_wrap=True, highlight=False)
    return save(o, {f"{n}: bubble {line.bubble:.1%}": line for n, line in lines.items()}, console)


def draw(o: Namespace, console: Console) -> int:
    """Draw one schedule."""
    line = timed(o.name, o)
    title = f"{o.name}: {o.stages} ranks, {o.microbatches} microbatches, bubble {line.bubble:.1%}"
    if not o.out:
        console.print(title)
        console.print(pictures.text(line), soft_wrap=True, highlight=False)
    return save(o, {title: line}, console)


def save(o: Namespace, lines: dict[str, Timeline], console: Console) -> int:
    """Write the drawing to the file of ``-o``, if there is one."""
    if o.out:
        try:
            Path(o.out).write_text(pictures.svg(lines))
        except OSError as error:
            raise UserError(
                f"-o {o.out}: cannot be written ({error.strerror}); choose another"
            ) from error
        console.print(f"drawn to {o.out}")
    return 0


def parser() -> Parser:
    made = Parser(
        prog="python -m dtron.schedules", description="Time pipeline schedules and draw them."
    )
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    all_of_them = commands.add_parser("compare", help="all of them, in a table and a picture")
    one = commands.add_parser("draw", help="one schedule")
    one.add_argument("name", choices=list(SCHEDULES))
    for command in (all_of_them, one):
        add = command.add_argument
        add("--stages", type=int, default=4, metavar="N", help="pipeline ranks (4)")
        add("--microbatches", type=int, default=8, metavar="N", help="per step (8)")
        text = "interleaved: stages on each rank (2)"
        add("--stages-per-rank", type=int, default=2, metavar="N", help=text)
        for kind, work in (("F", "forward"), ("I", "input gradient"), ("W", "weight gradients")):
            text = f"time of a rank's {work} of a microbatch (1)"
            add(f"--{kind}", type=duration, default=1.0, metavar="T", help=text)
        text = "time to send an activation (0)"
        add("--transfer", type=duration, default=0.0, metavar="T", help=text)
        add("-o", dest="out", default="", metavar="FILE.svg", help="draw to a file")
    return made


def duration(text: str) -> float:
    value = float(text)
    if not 0 <= value <= LONGEST:
        raise ValueError
    return value


def main(argv: Sequence[str]) -> int:
    o = parser().parse_args(list(argv))
    return {"compare": compare, "draw": draw}[o.command](o, Console())


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
