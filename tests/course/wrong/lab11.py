"""Wrong solutions of lab 11."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        11,
        "a weight that ZeRO shards is declared whole",
        "w_down has the axes mlp, act_embed, not mlp, embed: on dp=2,tp=2 a rank of ZeRO-3 has (6, 3)",
        ('weight("mlp", "embed", summed=1)', 'weight("mlp", "act_embed", summed=1)'),
    ),
    mistake(
        11,
        "the mix is of the embedding",
        "the weights: mix has the axes embed, not mlp: on dp=2,tp=2 a rank of ZeRO-3 has (6,), and",
        ('mix: Tensor = weight("mlp")', 'mix: Tensor = weight("embed")'),
    ),
    mistake(
        11,
        "an axis without a size",
        "mix: dims has no 'hidden'; it has embed, mlp, layers; the axis of D is embed",
        ('mix: Tensor = weight("mlp")', 'mix: Tensor = weight("hidden")'),
    ),
    mistake(
        11,
        "documents are not told apart",
        "one device: token 5, the first token of its document, is wrong by",
        ("        before_TF = torch.where(first_T[:, None], 0, before_TF)\n", ""),
    ),
    mistake(
        11,
        "the square comes first",
        "24 of 24 tokens are",
        ("linear(F.relu(h_TF).square(), p.w_down)", "linear(F.relu(h_TF.square()), p.w_down)"),
    ),
    mistake(
        11,
        "no halo",
        "1 of 24 tokens are wrong, and token 12 is the first",
        ("if ranks is None else ring_shift(h_TF[-1:], ranks)", ""),
    ),
    mistake(
        11,
        "the first rank sends nothing",
        "the layer: the layer asks for the place of a rank; if some ranks do not call ring_shift",
        ("if ranks is None else", "if ranks is None or ranks.place == 0 else"),
    ),
    mistake(
        11,
        "the halo has no gradient",
        "the layer: mesh cp=2: gradient of w_up differs from one device by",
        ("ring_shift(h_TF[-1:], ranks)", "ring_shift(h_TF[-1:].detach(), ranks)"),
    ),
    mistake(
        11,
        "the halo is not masked",
        "1 of 24 tokens are wrong, and token 0 is the first",
        (
            "        before_TF = torch.where(first_T[:, None], 0, before_TF)\n",
            "        inner = torch.where(first_T[1:, None], 0, before_TF[1:])\n"
            "        before_TF = torch.cat([row, inner])\n",
        ),
    ),
    mistake(
        11,
        "a sum over tp is pending",
        "the layer: mesh tp=2: the output has placements (Partial(sum),), not (Shard(dim=0),); a sum",
        ('return layout.constrain(y_TD, "tokens_sp", "act_embed")', "return y_TD"),
    ),
    mistake(
        11,
        "tokens are not gathered over tp",
        "the layer: mesh tp=2: line",
        ('    x_TD = layout.constrain(x_TD, "tokens", "act_embed")\n', ""),
    ),
    mistake(
        11,
        "the row is gathered over cp",
        "the collectives: cp=2,tp=2: 2 x all-gather over cp; the last token of the previous rank is",
        ("if ranks is None else ring_shift(h_TF[-1:], ranks)", ""),
        ('hidden = ("tokens", "mlp")', 'hidden = ("rows", "mlp")'),
        ('constrain(x_TD, "tokens", "act_embed")', 'constrain(x_TD, "rows", "act_embed")'),
        ('("mlp",), ("tokens",))', '("mlp",), ("rows",))'),
        ("(h_TF, p.mix, first_T)", '(h_TF, p.mix, layout.constrain(first_T, "rows"))'),
    ),
    mistake(
        11,
        "a test on one device",
        "check_layer: your test catches 4 of 13 mutants",
        ("        assert_equivalent(layer, weights, mesh, dims, **options)\n", ""),
    ),
    mistake(
        11,
        "a test without the definition",
        "check_layer: your test catches 9 of 13 mutants",
        (
            "assert torch.allclose(got, by_definition(p, x_TD, first(None)), atol=1e-9)",
            "assert got.shape == x_TD.shape",
        ),
    ),
    mistake(
        11,
        "a test whose data ranks share a row",
        "check_layer: your test fails on a solution that is right: mesh dp=2",
        ('("dp=2", (0, 5, 12))', '("dp=2", (0, 5))'),
    ),
]
