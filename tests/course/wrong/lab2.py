"""Wrong solutions of lab 2."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        2,
        "summed over tp alone",
        "mesh dp=2: gradient of scale: a tensor that should be whole on every rank",
        ('"+tokens_sp"', '"+mlp"'),
    ),
    mistake(
        2,
        "summed over dp alone",
        "mesh tp=2: gradient of scale: a tensor that should be whole on every rank",
        ('"+tokens_sp"', '"+tokens"'),
    ),
    mistake(
        2,
        "summed over the axes of ZeRO and tp, not over replicas",
        "the layer on other meshes: mesh dp_replicate=2: gradient of scale: a tensor that",
        (
            'list(layout.placements("+tokens_sp"))',
            'list(layout.placements("+embed", "+mlp"))',
        ),
    ),
    mistake(
        2,
        "averaged",
        "mesh tp=2: gradient of scale differs from one device by 5.0e-01",
        (
            'list(layout.placements("+tokens_sp"))',
            '[p if p.is_replicate() else type(p)("avg") for p in layout.placements("+tokens_sp")]',
        ),
    ),
    mistake(
        2,
        "the scale is a sum too",
        "mesh tp=2: in_placements do not fit the inputs, and torch says: an input has a mismatched",
        ("in_placements=(rows, whole)", 'in_placements=(rows, list(layout.placements("+vocab")))'),
    ),
    mistake(
        2,
        "the gradient of the tokens is a sum too",
        "mesh tp=2: gradient of input x differs from one device",
        ("(rows, list(", '(list(layout.placements("+tokens_sp")), list('),
    ),
    mistake(
        2,
        "all tokens are gathered before the norm",
        "mesh tp=2: the output has placements",
        (
            'return layout.constrain(y_TD, "tokens_sp", "act_embed")',
            'return layout.constrain(y_TD, "tokens", "act_embed")',
        ),
    ),
    mistake(
        2,
        "the gradient of the scale is sharded as the tokens are",
        "mesh tp=2: a placement does not fit its tensor, and torch says",
        ('list(layout.placements("+tokens_sp"))', "rows"),
    ),
    mistake(
        2,
        "one collective more than needed",
        "its collectives: mesh tp=2:",
        (
            "    h_TD = normalize(x_TD, p.scale, layout)\n",
            '    x_TD = layout.constrain(x_TD, "tokens", "act_embed")\n'
            '    x_TD = layout.constrain(x_TD, "tokens_sp", "act_embed")\n'
            "    h_TD = normalize(x_TD, p.scale, layout)\n",
        ),
    ),
    mistake(
        2,
        "a test on tp alone",
        "check_layer: your test catches 4 of 6 mutants",
        ('("tp=2", "dp=2", "dp_replicate=2")', '("tp=2",)'),
    ),
    mistake(
        2,
        "a test that a right layer fails",
        "your test fails on a solution that is right",
        ("mesh, DIMS)", "mesh, DIMS, tolerance=0)"),
    ),
]
