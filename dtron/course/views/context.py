"""Pictures of context parallelism: who computes which pair of a query and a key."""

from __future__ import annotations

import torch

from dtron.distributed.collectives import shift, wait
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.errors import UserError
from dtron.layers.attention_mask import AttentionMask, allowed
from dtron.layers.context_parallel import ContextParallelMask, RowSharding, prepare
from dtron.layers.token_order import row_order
from dtron.mesh import Layout
from dtron.tools.drawing import FAINT, Canvas, colour

CELL, EMPTY = 11, "#f2f2f2"


def pairs(tokens: int, ranks: int, on: bool) -> list[int]:
    """Return the pairs of a query and a key that each rank computes under a causal mask.

    ``on``: whether the order is zig-zag."""
    order = row_order(tokens, ranks, on).view(ranks, -1)
    seen = allowed(AttentionMask(tokens), None, order.device)[0, 0]
    return [int(seen[part].sum()) for part in order]


def zigzag(tokens: int = 16, ranks: int = 4) -> str:
    """Draw the rank that computes each pair of query and key, in both token orders. Raises
    UserError if the tokens are not divisible."""
    if tokens % (2 * ranks):
        raise UserError(f"{tokens} tokens on {ranks} ranks: twice the ranks must divide the tokens")
    shape, canvas = MeshShape(cp=ranks), Canvas(560)
    for n, (name, on) in enumerate((("contiguous", False), ("zig-zag", True))):
        x = 20 + 270 * n
        order = row_order(tokens, ranks, on).view(ranks, -1)
        owner = {int(token): rank for rank, part in enumerate(order) for token in part}
        seen = allowed(AttentionMask(tokens), None, order.device)[0, 0]
        canvas.text(x, 24, f"{name}: {tokens} tokens over cp={ranks}", bold=True)
        for i in range(tokens):
            for j in range(tokens):
                fill = colour(owner[i], shape) if seen[i, j] else EMPTY
                canvas.rect(x + j * CELL, 34 + i * CELL, CELL, CELL, fill, line="#fff")
        for rank, (part, n_pairs) in enumerate(zip(order, pairs(tokens, ranks, on), strict=True)):
            y = 34 + tokens * CELL + 14 + 20 * rank
            canvas.rect(x, y, 12, 12, colour(rank, shape))
            line = f"rank {rank}: tokens {_runs(part.tolist())}, {n_pairs} pairs"
            canvas.text(x + 18, y + 11, line)
    return canvas.svg()


def _ring_places(tokens: int, ranks: int, on: bool) -> list[list[list[int]]]:
    """Return the queries of each rank, and then its keys in each step, from the ranks' masks and
    messages."""
    with simulated(MeshShape(cp=ranks)) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.ones(tokens, 1), "tokens", None)
        mask, sharding = AttentionMask(tokens), RowSharding("ring", on)
        context, _ = prepare(mask, None, False, (1, 1), x, layout, "sdpa", sharding)
        assert isinstance(context, ContextParallelMask)  # over cp
        first, group = context.steps[0], layout.group("cp")
        keys = first.keys
        assert group is not None and keys is not None and first.queries is not None
        arrived = [keys]
        for _ in range(1, ranks):
            keys = wait(shift(keys, *group.args))
            arrived.append(keys)
        found = (first.queries[0], *arrived)
        return [[by_rank(t, 0)[rank].tolist() for rank in range(ranks)] for t in found]


def ring(tokens: int = 16, ranks: int = 4, on: bool = True) -> str:
    """Draw each rank's queries and the keys that it has in each step. Both come from the ranks'
    masks and messages.

    ``on``: whether the order is zig-zag."""
    if ranks < 2 or tokens % (2 * ranks):
        raise UserError(f"{tokens} tokens on {ranks} ranks: twice the ranks must divide the tokens")
    shape = MeshShape(cp=ranks)
    queries, *steps = _ring_places(tokens, ranks, on)
    canvas, width = Canvas(40 + 220 * ranks), tokens // ranks * CELL * 2
    for step, at_hand in enumerate(steps):
        y = 56 + step * (width + 44)
        canvas.text(20, y + width / 2, f"step {step}", bold=True)
        for rank in range(ranks):
            x = 90 + 210 * rank
            if step == 0:
                canvas.text(x, 24, f"rank {rank}", bold=True)
                canvas.text(x, 40, f"queries {_runs(queries[rank])}", size=11, colour=FAINT)
            keys = torch.tensor(at_hand[rank])
            mask = AttentionMask(tokens, queries=torch.tensor([queries[rank]]), keys=keys)
            seen = allowed(mask, None, keys.device)[0, 0]
            holder = next(r for r in range(ranks) if queries[r] == at_hand[rank])
            for i, row in enumerate(seen):
                for j, ok in enumerate(row):
                    fill = colour(holder, shape) if ok else EMPTY
                    canvas.rect(
                        x + 2 * j * CELL, y + 2 * i * CELL, 2 * CELL, 2 * CELL, fill, line="#fff"
                    )
            canvas.text(x, y + width + 14, f"keys {_runs(at_hand[rank])}", size=11, colour=FAINT)
            if rank + 1 < ranks and step + 1 < ranks:
                canvas.arrow(x + width + 8, y + width + 10, 90)
    y = 56 + ranks * (width + 44) - 8
    note = "arrows: keys and values go to the next rank, the last one's to the first"
    canvas.text(90, y, note, colour=FAINT)
    return canvas.svg()


def _runs(tokens: list[int]) -> str:
    """Return tokens as ranges: ``0-1, 14-15``."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and runs[-1][-1] == token - 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
