"""Wrong solutions of lab 3."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        3,
        "a row for dp alone",
        "zero 1 on cp=2: embedding.w_tokens [vocab, embed] is sharded over cp",
        ('("dp", "cp")', '("dp",)'),
    ),
    mistake(
        3,
        "a text for a row",
        "zero 1: a row is a tuple of mesh axes, and not 'dp'",
        ('("dp", "cp")', '("dp")'),
    ),
    mistake(
        3,
        "a row with tp",
        "two dims share mesh axis 'tp'",
        ('("dp", "cp")', '("dp", "cp", "tp")'),
    ),
    mistake(
        3,
        "a row that shards over replicas",
        "zero 1 on dp_replicate=2: embedding.w_tokens [vocab, embed] is not sharded over",
        ('("dp", "cp")', '("dp_replicate", "dp", "cp")'),
    ),
    mistake(
        3,
        "stage 0 is sharded",
        "zero 0 on dp=2: embedding.w_tokens [vocab, embed] is not sharded over dp",
        (" if zero > 0 else ()\n\n\ndef collectives", "\n\n\ndef collectives"),
    ),
    mistake(
        3,
        "the gradients of scales are forgotten",
        "zero 1, blocks=1, microbatches=1: a step has 1 x all-reduce over dp, and you say 0",
        ("scales = 1", "scales = 0"),
    ),
    mistake(
        3,
        "stage 2 sums once a step",
        "zero 2, blocks=1, microbatches=2: a step has 2 x reduce-scatter over dp, and you say 1",
        ('"reduce_scatter": microbatches,', '"reduce_scatter": 1,'),
    ),
    mistake(
        3,
        "stage 3 keeps gathered weights for backward",
        "zero 3, blocks=1, microbatches=1: a step has 16 x all-gather over dp, and you say 9",
        ("(2 * 7 * blocks + 2)", "(7 * blocks + 2)"),
    ),
    mistake(
        3,
        "stage 1 shards gradients",
        "zero 1, a weight of 8192 elements on 2 ranks: a rank keeps 32768 bytes of gradients",
        ("shard if zero >= 2 else n", "shard if zero >= 1 else n"),
    ),
    mistake(
        3,
        "the gathered weights are forgotten",
        "zero 1, a weight of 8192 elements on 2 ranks: a rank keeps 40960 bytes of weights",
        ("2 * n if zero in (1, 2) else 0", "0"),
    ),
    mistake(
        3,
        "one moment",
        "bytes of optimizer state, and you say",
        ("8 * shard", "4 * shard"),
    ),
]
