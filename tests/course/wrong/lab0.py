"""Wrong solutions of lab 0."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        0,
        "as many keys as queries",
        "the matmul with w_k is (24, 16, 16) (rows, summed, columns), and you say (24, 16, 32)",
        ("kv_heads * head_dim\n", "heads * head_dim\n"),
    ),
    mistake(
        0,
        "no gate",
        "the matmul with w_up is (24, 16, 40) (rows, summed, columns), and you say (24, 40, 16)",
        ("[(tokens, embed, mlp)] * 2", "[(tokens, embed, mlp)]"),
    ),
    mistake(
        0,
        "the norms of blocks are forgotten",
        "and you say 7504; too few by the two norms of every block",
        ("head_dim, mlp) + 2 * embed\n    heads_and", "head_dim, mlp)\n    heads_and"),
    ),
    mistake(
        0,
        "the last norm is forgotten",
        "and you say 7552; too few by the last norm",
        ("layers * each + embed +", "layers * each +"),
    ),
    mistake(
        0,
        "a tied head counts twice",
        "tied=True: the model has 19808 parameters, and you say 22048; too many by the head",
        ("1 if tied else 2", "2"),
    ),
    mistake(
        0,
        "the embedding is multiplied",
        "the embedding is looked up, not multiplied",
        ("6 * (weights + vocab * embed)", "6 * (weights + 2 * vocab * embed)"),
    ),
    mistake(
        0,
        "a token sees the whole sequence",
        "under a causal mask a token sees half of the sequence",
        ("6 * layers * heads", "12 * layers * heads"),
    ),
    mistake(
        0,
        "attention on the embedding",
        "attention works on heads * head_dim, not on embed",
        ("6 * layers * heads * head_dim * seq_len", "6 * layers * embed * seq_len"),
    ),
    mistake(
        0,
        "no norm at all",
        "too few by the two norms of every block and the last norm",
        ("head_dim, mlp) + 2 * embed\n    heads_and", "head_dim, mlp)\n    heads_and"),
        ("layers * each + embed +", "layers * each +"),
    ),
    mistake(
        0,
        "attention is forgotten",
        "attention itself is missing",
        (" + attention\n", "\n"),
    ),
    mistake(
        0,
        "attention of one block",
        "half of attention is missing: it is in every block, and has two matmuls",
        ("6 * layers * heads", "6 * heads"),
    ),
    mistake(
        0,
        "no FLOPs of the head",
        "the head is a matmul, also if it is tied",
        ("6 * (weights + vocab * embed)", "6 * weights"),
    ),
    mistake(
        0,
        "no FLOPs of scales",
        "the scales of norms count, too",
        ("mlp) + 2 * embed) + embed\n", "mlp))\n"),
    ),
    mistake(
        0,
        "forward alone",
        "forward alone; a backward takes twice as much again",
        (
            "6 * (weights + vocab * embed) + attention",
            "2 * (weights + vocab * embed) + attention / 3",
        ),
    ),
]
