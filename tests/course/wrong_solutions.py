"""Plausible wrong solutions, as edits of the reference solutions, each with its line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtron.course.labs import LABS

SOLUTIONS = Path(__file__).parent / "solutions"


@dataclass(frozen=True)
class Mistake:
    """A wrong solution.

    ``edits``: pairs of a text of the reference solution and its replacement.
    ``line``: a text that the line of the check contains."""

    lab: int
    name: str
    line: str
    edits: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The whole file."""
        text = (SOLUTIONS / f"lab{self.lab}_{LABS[self.lab]}.py").read_text()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.name}: {old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        return text


def mistake(lab: int, name: str, line: str, *edits: tuple[str, str]) -> Mistake:
    return Mistake(lab, name, line, edits)


CEIL = "-(-(stop - start) // n)"
ENDS = "(min(start + i * each, stop), min(start + (i + 1) * each, stop))"
SPREAD = """
            each, more = divmod(stop - start, n)
            begin = start + i * each + min(i, more)
            found[p.dim] = (begin, begin + each + (i < more))"""

MISTAKES = [
    mistake(
        1,
        "tokens of the residual stream are sharded over tp too",
        "x_TD: shape (1024, 384) on dp=2,tp=4 (dp: Shard(0), tp: Shard(0)): rank 5 has (128, 384)",
        ('"x_TD": (128, 384)', '"x_TD": (512, 384)'),
    ),
    mistake(1, "shards of size // n", "size // n loses the rest", (CEIL, "(stop - start) // n")),
    mistake(
        1,
        "the first ranks take the rest",
        "the rest is not spread over the first ranks",
        (f"\n            each = {CEIL}\n            found[p.dim] = {ENDS}", SPREAD),
    ),
    mistake(
        1,
        "shards beyond the end",
        "the last ranks have fewer elements, or none",
        (ENDS, "(start + i * each, start + (i + 1) * each)"),
    ),
    mistake(
        1,
        "a pending sum is split",
        "Partial splits nothing",
        ("if isinstance(p, Shard):", "if not p.is_replicate():"),
        (
            "start, stop = found[p.dim]",
            "p = p if isinstance(p, Shard) else Shard(1)\n            start, stop = found[p.dim]",
        ),
    ),
    mistake(
        1,
        "an offset of the rank's own size",
        "uneven shards: shape (10, 6) on dp=4 (dp: Shard(0)): the shard of rank 3",
        (
            "    return tuple(start for start, _ in ranges(shape, mesh, placements, coordinate))",
            "    sizes = local_shape(shape, mesh, placements, coordinate)\n"
            "    if placements == (Shard(0),):\n        return (coordinate[0] * sizes[0], *shape[1:0], 0)\n"
            "    return tuple(start for start, _ in ranges(shape, mesh, placements, coordinate))",
        ),
    ),
    mistake(
        1,
        "the inner axis splits first",
        "two axes on one dim: shape (10, 3) on dp=2,tp=2 (dp: Shard(0), tp: Shard(0))",
        (
            "zip(mesh, placements, coordinate, strict=True)",
            "list(zip(mesh, placements, coordinate, strict=True))[::-1]",
        ),
    ),
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
    mistake(
        3,
        "a row for dp alone",
        "zero 1 on cp=2: embedding.w_tokens [vocab, embed] is sharded over cp",
        ('("dp", "cp")', '("dp",)'),
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
    mistake(
        4,
        "f is missing",
        "tensor_parallel: backward on tp=2 has 0 x all-reduce over tp, not 1",
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
        "F.gelu(x_TD @ p.w_up) @ p.w_down: an operand is not placed as this line needs it",
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
        "too few by the two norms of every block",
        ("head_dim, mlp) + 2 * embed\n    heads_and", "head_dim, mlp)\n    heads_and"),
    ),
    mistake(
        0,
        "the last norm is forgotten",
        "too few by the last norm",
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
        "attention is forgotten",
        "attention itself is missing",
        (" + attention\n", "\n"),
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
