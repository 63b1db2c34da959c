"""Wrong solutions of lab 1."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

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
    mistake(
        1,
        "a number for a shape",
        "PREDICTIONS has 384 for 'scale'; a shape is a tuple, as (384,)",
        ("(384,)", "384"),
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
]
