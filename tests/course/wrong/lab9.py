"""Wrong solutions of lab 9."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        9,
        "the product of the larger side",
        "cost: a matrix of 4 x 6 costs 96, and you say 144",
        ("* min(rows, columns)", "* max(rows, columns)"),
    ),
    mistake(
        9,
        "the cost is the size",
        "cost: a matrix of 4 x 6 costs 96, and you say 24",
        (" * min(rows, columns)", ""),
    ),
    mistake(
        9,
        "cheap matrices first",
        "your ranks have the work [8, 10], and the busiest can have 9",
        ("key=lambda i: -costs[i]", "key=lambda i: costs[i]"),
    ),
    mistake(
        9,
        "every rank in turn",
        "your ranks have the work [10, 8], and the busiest can have 9",
        ("rank = load.index(min(load))", "rank = sum(map(len, owners)) % ranks"),
    ),
    mistake(
        9,
        "all matrices on the first rank",
        "costs [8, 8, 8, 8] on 2 ranks: your ranks have the work [32, 0]",
        ("        load[rank] += costs[i]\n", ""),
    ),
    mistake(
        9,
        "the way back is forgotten",
        "8 matrices of 96 bytes on 4 ranks: with owners a rank sends 288 bytes, and you say 144",
        ("return 2 * (matrices", "return (matrices"),
    ),
    mistake(
        9,
        "an all-gather sends the rank's shards once",
        "with an all-gather a rank sends 576 bytes, and you say 144",
        ("others, matrices * size * others", "others, matrices * size / ranks * others"),
    ),
    mistake(
        9,
        "five iterations",
        "orthogonalized: [4, 6]: the result is wrong by 6.3e-02",
        ("range(40)", "range(5)"),
    ),
    mistake(
        9,
        "singular values above the range of the iteration",
        "orthogonalized: [4, 6]: the result is wrong by nan",
        ("    x = x / x.norm(dim=(-2, -1), keepdim=True)\n", ""),
    ),
    mistake(
        9,
        "shards are made orthogonal",
        "update: 4 matrices of 4 x 6 on 2 ranks: a matrix of 2 x 6 is made orthogonal: a shard",
        (
            "    results = [[None]",
            "    return [[orthogonalized(x) for x in own] for own in shards]\n"
            "    results = [[None]",
        ),
    ),
    mistake(
        9,
        "every rank does all the work",
        "4 matrices of 4 x 6 on 2 ranks: 8 are made orthogonal in all; each only on its owner",
        (
            "    for matrices in owners:\n        for i in matrices:",
            "    for _ in owners:\n        for i in range(len(shards[0])):",
        ),
    ),
    mistake(
        9,
        "shards go back in reverse",
        "update: 4 matrices of 4 x 6 on 2 ranks: rank 0 has a wrong shard of matrix 0",
        ("results[rank][i] = part", "results[-1 - rank][i] = part"),
    ),
    mistake(
        9,
        "a test of one rank",
        "check_update: your test catches 3 of 5 mutants",
        ("for ranks in (1, 2)", "for ranks in (1,)"),
    ),
    mistake(
        9,
        "a test of wide matrices",
        "check_update: your test catches 4 of 5 mutants",
        ("((4, 8), (8, 4))", "((4, 8),)"),
    ),
]
