"""The figures of docs/context-parallelism.md, drawn from simulated ranks; see figures.py."""

from __future__ import annotations

import torch

from dtron.distributed.collectives import shift, wait
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.attention_mask import AttentionMask, allowed
from dtron.layers.context_parallel import RowSharding, prepare
from dtron.layers.token_order import row_order
from dtron.mesh import Layout
from dtron.tools.drawing import FAINT, Canvas, colour

CELL, EMPTY = 11, "#f2f2f2"


def zigzag(tokens: int = 16, ranks: int = 4) -> str:
    """Draw the rank that computes each pair of query and key, in both token orders."""
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
        for rank, part in enumerate(order):
            y = 34 + tokens * CELL + 14 + 20 * rank
            canvas.rect(x, y, 12, 12, colour(rank, shape))
            pairs = int(seen[part].sum())
            canvas.text(
                x + 18, y + 11, f"rank {rank}: tokens {_runs(part.tolist())}, {pairs} pairs"
            )
    return canvas.svg()


def ring(tokens: int = 16, ranks: int = 4) -> str:
    """Draw each rank's queries and the keys that it has in each step. Both come from the ranks'
    masks and messages."""
    shape = MeshShape(cp=ranks)
    with simulated(shape) as mesh:
        layout = Layout(mesh)
        x = layout.shard(torch.ones(tokens, 1), "tokens", None)
        context, _ = prepare(
            AttentionMask(tokens), None, False, (1, 1), x, layout, "sdpa", RowSharding("ring", True)
        )
        keys = context.steps[0].keys
        arrived = [keys]
        for _ in range(1, ranks):
            keys = wait(shift(keys, *layout.group("cp").args))
            arrived.append(keys)
        places = [
            [_of(t, rank) for rank in range(ranks)] for t in (context.steps[0].queries[0], *arrived)
        ]
    canvas, width = Canvas(40 + 220 * ranks), tokens // ranks * CELL * 2
    queries, steps = places[0], places[1:]
    for step, at_hand in enumerate(steps):
        y = 56 + step * (width + 44)
        canvas.text(20, y + width / 2, f"step {step}", bold=True)
        for rank in range(ranks):
            x = 90 + 210 * rank
            if step == 0:
                canvas.text(x, 24, f"rank {rank}", bold=True)
                canvas.text(x, 40, f"queries {_runs(queries[rank])}", size=11, colour=FAINT)
            mask = AttentionMask(
                tokens, queries=torch.tensor([queries[rank]]), keys=torch.tensor(at_hand[rank])
            )
            seen = allowed(mask, None, mask.keys.device)[0, 0]
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


def _of(x: torch.Tensor, rank: int) -> list[int]:
    return x._local_tensors[rank].tolist()


def _runs(tokens: list[int]) -> str:
    """Return tokens as ranges: ``0-1, 14-15``."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and runs[-1][-1] == token - 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
