"""Wrong solutions of lab 7."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        7,
        "place and slot swapped",
        "of 4: slot_R is [3, 5, 1, 0, 2, 4], not [3, 2, 4, 0, 5, 1]",
        ("    return slot_R, place_S, torch", "    return place_S, slot_R, torch"),
    ),
    mistake(
        7,
        "one count too few",
        "counts_E is [",
        (", minlength=experts)\n\n\ndef permute", ")\n\n\ndef permute"),
    ),
    mistake(
        7,
        "rows by slot instead of token",
        "line 17 of lab7_experts.py: IndexError",
        ("x_TD[slot_R // k]", "x_TD[slot_R]"),
    ),
    mistake(
        7,
        "slots in the order of k, tokens",
        "yours has another token",
        ("x_TD[slot_R // k]", "x_TD[slot_R % len(x_TD)]"),
    ),
    mistake(
        7,
        "outputs without weights",
        "unpermute: the output is wrong by 5.0e+00",
        ("(y_TKD * weights_TK[:, :, None]).sum(1)", "y_TKD.sum(1)"),
    ),
    mistake(
        7,
        "no gradient for the router",
        "unpermute: the gradient of the weights is missing",
        ("y_TKD * weights_TK[:, :, None]", "y_TKD * weights_TK.detach()[:, :, None]"),
    ),
    mistake(
        7,
        "rows come back sorted by expert",
        "unpermute: the output is wrong by 5.2e+00",
        ("y_RD[place_S].unflatten", "y_RD.unflatten"),
    ),
    mistake(
        7,
        "capacity rounded down",
        "9 tokens, 2 of 4 experts, factor 1.25: an expert has room for 6, and you say 5",
        ("math.ceil(", "math.floor("),
    ),
    mistake(
        7,
        "capacity without k",
        "16 tokens, 2 of 4 experts, factor 1: an expert has room for 8, and you say 4",
        ("factor * tokens * k / experts", "factor * tokens / experts"),
    ),
    mistake(
        7,
        "room for more than all tokens",
        "4 tokens, 2 of 4 experts, factor 8: an expert has room for 4, and you say 16",
        (
            "min(tokens, math.ceil(factor * tokens * k / experts))",
            "math.ceil(factor * tokens * k / experts)",
        ),
    ),
    mistake(
        7,
        "the first slots are kept",
        "slot 1 of expert 1 is dropped: largest weights are kept, and the first slots of equal ones",
        ("own[order[:room]]", "own[:room]"),
    ),
    mistake(
        7,
        "equal weights in any order",
        "slot 6 of expert 1 is kept: largest weights are kept, and the first slots of equal ones",
        (
            "weight_S[own].argsort(descending=True, stable=True)",
            "weight_S[own].argsort(stable=True).flip(0)",
        ),
    ),
    mistake(
        7,
        "room for all experts together",
        "and room for 8, and you keep",
        ("own[order[:room]]", "own[order[: room // 2]]"),
    ),
    mistake(
        7,
        "each rank counts its own load",
        "balance_loss: mesh dp=2: output differs from one device by 2.6e-02",
        (
            'layout.all_reduce(counts_E.to(scores_TE.dtype), "tokens_sp")',
            "counts_E.to(scores_TE.dtype)",
        ),
    ),
    mistake(
        7,
        "the loss without E",
        "balance_loss: one device: the loss of 24 tokens is",
        ("return experts * (scores_TE", "return (scores_TE"),
    ),
    mistake(
        7,
        "load over dp alone",
        "balance_loss, other meshes: mesh tp=2: output differs from one device",
        ('"tokens_sp")', '"tokens")'),
    ),
    mistake(
        7,
        "each rank adds the whole loss",
        "balance_loss: mesh dp=2: output differs from one device by 1.0e+00",
        (
            "    return experts * (scores_TE * f_E).sum()",
            '    p_E = layout.all_reduce(scores_TE.sum(0), "tokens_sp")\n'
            "    return experts * (p_E * f_E).sum()",
        ),
    ),
    mistake(
        7,
        "received rows stay sorted by rank",
        "dispatch: mesh dp=2,ep=2: output differs from one device by 5.2e-01",
        ("run(rows[order_R], own_E)[back_R]", "run(rows, own_E)"),
    ),
    mistake(
        7,
        "outputs are sent without their order",
        "dispatch: mesh dp=2,ep=2: output differs from one device by 9.9e-01",
        ("run(rows[order_R], own_E)[back_R]", "run(rows[order_R], own_E)"),
    ),
    mistake(
        7,
        "received and sent swapped",
        "dispatch: line 52 of lab7_experts.py: RuntimeError: split_with_sizes",
        (
            "index_TK.shape[1]), ranks, received, sent)",
            "index_TK.shape[1]), ranks, sent, received)",
        ),
    ),
    mistake(
        7,
        "weights are sent too",
        "mesh dp=2,ep=2: 4 all-to-alls; three are enough",
        (
            "    return unpermute(y, weights_TK, place_S)",
            "    all_to_all(y, ranks, received, sent)\n    return unpermute(y, weights_TK, place_S)",
        ),
    ),
    mistake(
        7,
        "a test without gradients",
        "check_experts: your test catches 11 of 13 mutants",
        ("(y, loss, *torch.autograd.grad(y.sin().sum() + loss, inputs))", "(y, loss)"),
    ),
    mistake(
        7,
        "a test without a capacity",
        "check_experts: your test catches 8 of 13 mutants",
        ("((6, 2, None), (5, 2, 1.1), (5, 1, 0.7))", "((6, 2, None), (5, 2, None))"),
    ),
    mistake(
        7,
        "a test of the balance loss alone",
        "check_experts: your test catches 3 of 13 mutants",
        ("(y, loss, *torch.autograd.grad(y.sin().sum() + loss, inputs))", "(loss,)"),
    ),
    mistake(
        7,
        "a test that counts kept slots",
        "check_experts: your test fails on a solution that is right",
        (
            "torch.bincount(index_TK.flatten(), minlength=experts) / (tokens * k)",
            "torch.bincount(index_TK[mask], minlength=experts) / mask.sum()",
        ),
    ),
]
