"""The reference solution of lab 9."""

import torch


def cost(rows, columns):
    return rows * columns * min(rows, columns)


def deal(costs, ranks):
    owners, load = [[] for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = load.index(min(load))
        owners[rank].append(i)
        load[rank] += costs[i]
    return owners


def sent(matrices, size, ranks):
    others = (ranks - 1) / ranks
    return 2 * (matrices * size / ranks) * others, matrices * size * others


def orthogonalized(x):
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(40):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    return x.mT if tall else x


def update(shards, owners, orthogonalized):
    results = [[None] * len(own) for own in shards]
    for matrices in owners:
        for i in matrices:
            whole = torch.cat([own[i] for own in shards])
            parts = orthogonalized(whole).chunk(len(shards))
            for rank, part in enumerate(parts):
                results[rank][i] = part
    return results


def check_update(update):
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((4, 8), (8, 4)):
        x = torch.empty(rows, columns, dtype=torch.float64).normal_(generator=generator)
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        for ranks in (1, 2):
            torch.testing.assert_close(update(x, ranks), u @ vt)
