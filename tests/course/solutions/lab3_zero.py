"""The reference solution of lab 3."""


def embed_row(zero: int) -> tuple[str, ...]:
    return ("dp", "cp") if zero > 0 else ()


def collectives(zero: int, blocks: int, microbatches: int) -> dict[str, int]:
    scales = 1
    if zero == 0:
        return {"all_reduce": 1}
    if zero == 1:
        return {"all_gather": 1, "reduce_scatter": 1, "all_reduce": scales}
    if zero == 2:
        return {"all_gather": 1, "reduce_scatter": microbatches, "all_reduce": scales}
    gathered = microbatches * (2 * 7 * blocks + 2)
    scattered = microbatches * (7 * blocks + 2)
    return {"all_gather": gathered, "reduce_scatter": scattered, "all_reduce": scales}


def bytes_on_rank(zero: int, n: int, ranks: int) -> tuple[int, int, int]:
    shard = n // ranks if zero > 0 else n
    gathered = 2 * n if zero in (1, 2) else 0
    weights = 4 * shard + 2 * shard + gathered
    gradients = 4 * (shard if zero >= 2 else n)
    return weights, gradients, 8 * shard
