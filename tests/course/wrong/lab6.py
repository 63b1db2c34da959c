"""Wrong solutions of lab 6."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        6,
        "exponentials without a maximum",
        "merge: scores near 1000: the lse of merge is not finite",
        ("torch.logaddexp(lse_a, lse_b)", "(lse_a.exp() + lse_b.exp()).log()"),
    ),
    mistake(
        6,
        "the larger lse",
        "merge: plain scores: the output of merge is wrong by",
        ("torch.logaddexp(lse_a, lse_b)", "torch.maximum(lse_a, lse_b)"),
    ),
    mistake(
        6,
        "the sum of two lse",
        "merge: plain scores: the lse of merge is wrong by",
        ("* share_b, lse\n", "* share_b, lse_a + lse_b\n"),
    ),
    mistake(
        6,
        "the output alone",
        "merge: plain scores: merge returns a pair, the output and the lse",
        ("* share_b, lse\n", "* share_b\n"),
    ),
    mistake(
        6,
        "shares without a dim for the heads",
        "RuntimeError: The size of tensor a",
        (".exp()[..., None], (lse_b", ".exp(), (lse_b"),
        ("(lse_b - lse).exp()[..., None]", "(lse_b - lse).exp()"),
    ),
    mistake(
        6,
        "a test with small scores alone",
        "check_merge: your test catches 5 of 6 mutants",
        ("for shift in (0.0, 1000.0)", "for shift in (0.0,)"),
    ),
    mistake(
        6,
        "a test where every query sees a key",
        "check_merge: your test catches 4 of 6 mutants",
        ("for shift in (0.0, 1000.0)", "for shift in (0.0,)"),
        ("for unseen in (False, True)", "for unseen in (False,)"),
    ),
    mistake(
        6,
        "a test that wants an lse of zero for no keys",
        "check_merge: your test fails on a solution that is right",
        ("(out_b, b.logsumexp(-1))", "(out_b, torch.nan_to_num(b.logsumexp(-1), neginf=0.0))"),
    ),
    mistake(
        6,
        "contiguous shards",
        "8 tokens on 2 ranks: rank 0 has the places [0, 1, 6, 7], not [0, 1, 2, 3]; with yours",
        ("chunks[r] + chunks[2 * ranks - 1 - r]", "chunks[2 * r] + chunks[2 * r + 1]"),
    ),
    mistake(
        6,
        "chunks in two rounds",
        "8 tokens on 2 ranks: rank 0 has the places [0, 1, 6, 7], not [0, 1, 4, 5]; with yours",
        ("chunks[2 * ranks - 1 - r]", "chunks[ranks + r]"),
    ),
    mistake(
        6,
        "a query does not see itself",
        "pairs: queries at [0, 1, 2, 3] see 10 keys in all, and you say 6",
        ("sum(i + 1 for", "sum(i for"),
    ),
    mistake(
        6,
        "values stay at home",
        "ring_attention: contiguous order: mesh cp=2: output differs from one device",
        ("ring_shift(k, peers), ring_shift(v, peers)", "ring_shift(k, peers), v"),
    ),
    mistake(
        6,
        "no gradient goes back to the keys",
        "ring_attention: contiguous order: mesh cp=2: gradient of w_k differs from one device",
        ("ring_shift(k, peers), ", "ring_shift(k.detach(), peers), "),
    ),
    mistake(
        6,
        "one exchange too many",
        "mesh cp=2: k and v are sent 4 times in all; once each is enough",
        (
            "        result = merge(result, attention_and_lse(q, k, v, None, mask))\n",
            "        result = merge(result, attention_and_lse(q, k, v, None, mask))\n"
            "    ring_shift(k, peers), ring_shift(v, peers)\n",
        ),
    ),
    mistake(
        6,
        "every step has the mask of the first",
        "ring_attention: zig-zag order: mesh cp=3: output differs from one device",
        (
            "attention_and_lse(q, k, v, None, mask))",
            "attention_and_lse(q, k, v, None, masks[1] if mask is masks[-1] else mask))",
        ),
    ),
]
