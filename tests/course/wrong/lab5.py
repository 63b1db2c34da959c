"""Wrong solutions of lab 5."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        5,
        "a W right after its I",
        "the step takes 11, and ZB-H1 10; F(stage 1, microbatch 1) is the first that starts late",
        ("delay = rank\n", "delay = 0\n"),
    ),
    mistake(
        5,
        "every W at the end",
        "zb_h1_row: 2 ranks, 3 microbatches: rank 0 keeps 3 activations",
        ("delay = rank\n", "delay = microbatches\n"),
    ),
    mistake(
        5,
        "the last W are forgotten",
        "2 ranks, 3 microbatches: rank 1 lacks W(stage 1, microbatch 2)",
        ('return actions + [Action("W", rank, m) for m in rest]', "return actions"),
    ),
    mistake(
        5,
        "every rank starts with one forward alone",
        "the step takes 15, and ZB-H1 10; F(stage 0, microbatch 1) is the first that starts late",
        ("warmup = min(microbatches, ranks - rank)", "warmup = 1"),
    ),
    mistake(
        5,
        "a W before its I",
        "2 ranks, 3 microbatches: deadlock: rank 0 at W(stage 0, microbatch 0) waits for I(stage 0",
        (
            '    actions = [Action("F", rank, m) for m in range(warmup)]\n',
            '    delay = -1\n    actions = [Action("F", rank, m) for m in range(warmup)]\n'
            '    actions.append(Action("W", rank, 0))\n',
        ),
        ("if m >= delay:", "if m < microbatches - 1:"),
        ("range(max(microbatches - delay, 0), microbatches)", "()"),
    ),
    mistake(
        5,
        "the first rank takes one microbatch at a time",
        "zb_h1_row: 2 ranks, 3 microbatches: deadlock: rank 0 at I(stage 0, microbatch 0) waits",
        (
            "    rest = range(",
            "    if rank == 1:\n        actions = [*actions[:1], *actions[3:], *actions[1:3]]\n"
            "    rest = range(",
        ),
    ),
    mistake(
        5,
        "the bubble as a share of the work",
        "1f1b, 2 ranks, 4 microbatches: the bubble of the table is 0.2000, and your formula says 0.25",
        ("idle / (3 * microbatches + idle)", "idle / (3 * microbatches)"),
    ),
    mistake(
        5,
        "the idle time of ZB-H1 is that of 1F1B",
        "zb-h1, 2 ranks, 4 microbatches: the bubble of the table is",
        ('(3 if schedule == "1f1b" else 1)', "3"),
    ),
    mistake(
        5,
        "a rank that has ended waits",
        "gpipe has no deadlock, and you say that ranks [0, 1, 2] wait forever",
        ("enumerate(rows) if row]", "enumerate(rows)]"),
    ),
    mistake(
        5,
        "only the first waiting rank",
        "of 5 deadlocks are right; 1f1b, rank 0 spoilt: ranks [0, 1, 2] wait forever, and you say",
        ("enumerate(rows) if row]", "enumerate(rows) if row][:1]"),
    ),
]
