"""Wrong solutions of lab 4."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        4,
        "f is missing",
        "tensor_parallel: backward on tp=2 has 0 x all-reduce over tp, not 1; f sums the gradient",
        (
            '    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # f: all-reduce in backward\n',
            "",
        ),
    ),
    mistake(
        4,
        "g is missing",
        "tensor_parallel: mesh tp=2: the output has placements (Partial(sum),)",
        ('    y_TD = layout.constrain(y_TD, "tokens", "act_embed")  # g: all-reduce\n', ""),
    ),
    mistake(
        4,
        "tokens are not gathered",
        "F.gelu(x_TD @ p.w_up) @ p.w_down: a collective over tp is missing before this line",
        ('    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather\n', ""),
    ),
    mistake(
        4,
        "an all-reduce, and then each rank keeps its tokens",
        "sequence_parallel: forward on tp=2 has 1 x all-reduce over tp, not 0",
        (
            '    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter\n',
            '    y_TD = layout.constrain(y_TD, "tokens", "act_embed")\n'
            '    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")\n',
        ),
    ),
    mistake(
        4,
        "tokens stay whole",
        "sequence_parallel: mesh tp=2: the output has placements (Replicate(),), not (Shard(dim=0),)",
        ('"tokens_sp", "act_embed")  # reduce-scatter', '"tokens", "act_embed")  # reduce-scatter'),
    ),
    mistake(
        4,
        "weights are gathered instead of tokens",
        "sequence_parallel: forward on tp=2 has 2 x all-gather over tp, not 1",
        (
            '    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather\n'
            "    y_TD = F.gelu(x_TD @ p.w_up) @ p.w_down\n",
            '    w_up = layout.constrain(p.w_up, "act_embed", "act_embed")\n'
            '    w_down = layout.constrain(p.w_down, "act_embed", "act_embed")\n'
            "    y_TD = F.gelu(x_TD @ w_up) @ w_down\n",
        ),
    ),
    mistake(
        4,
        "each rank adds the bias of its own",
        "tensor_parallel: mesh tp=2: output differs from one device",
        (
            "    return y_TD + p.b_down\n\n\ndef sequence_parallel",
            '    bias = layout.local_map(\n        lambda b: b, [("act_embed",)], ("act_embed", "+mlp")\n'
            '    )(p.b_down)\n    return y_TD + layout.constrain(bias, "act_embed")\n\n\n'
            "def sequence_parallel",
        ),
    ),
    mistake(
        4,
        "an all-reduce sends its bytes once",
        "on tp=2: a rank sends 1152 bytes under tensor_parallel, and you say 576",
        ("return 2 * ring, ring + ring", "return ring, ring + ring"),
    ),
    mistake(
        4,
        "sequence parallelism sends half",
        "on tp=2: a rank sends 1152 bytes under sequence_parallel, and you say 576",
        ("return 2 * ring, ring + ring", "return 2 * ring, ring"),
    ),
    mistake(
        4,
        "a rank keeps all tokens",
        "a rank keeps 576 bytes under sequence_parallel, and you say 1152",
        ("return whole, whole / tp", "return whole, whole"),
    ),
]
