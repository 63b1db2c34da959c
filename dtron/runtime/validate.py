"""Checks that model, mesh and batch fit together. They run once, before anything is started."""

from __future__ import annotations

import math

import torch

from dtron.bounds import divides
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.fp8.recipe import Recipe
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA, LoraConfig, is_target
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec
from dtron.training.batch_ramp import BatchRamp
from dtron.tree import flat

LARGEST_COUNT = 1 << 16  # microbatches of a step; a schedule has a row for each


def check(
    model: ModelConfig,
    mesh: MeshShape,
    seq_len: int,
    cp_method: Method = "ring",
    zigzag: bool = True,
) -> None:
    """Check divisibility before any process group or weight exists. Raises UserError with the
    remedy."""
    check_experts(model, mesh)
    for mixer in model.mixers:
        mixer.check_mesh(mesh, seq_len, cp_method)
    if any(map(model.dense, model.blocks)):
        divides("model.mlp", model.mlp, "tp", mesh.tp)
    order = "zigzag" if zigzag else "contiguous"
    for mixer in model.mixers:
        if mesh.cp > 1 and order not in mixer.orders(cp_method):
            raise UserError(
                f"--zigzag {'on' if zigzag else 'off'} over cp={mesh.cp}: the tokens are then in "
                f"{order} order, which a layer of model.pattern={model.pattern} does not support "
                f"({mixer.params.segment}); use --zigzag auto, or a mesh without cp"
            )
    unit = sequence_unit(mesh, zigzag)
    if seq_len % unit:
        axes = {a: n for a, n in (("cp", mesh.cp), ("tp", mesh.tp)) if n > 1}
        over = ",".join(f"{a}={n}" for a, n in axes.items())
        how = ", two parts a rank" if mesh.cp > 1 and zigzag else ""
        raise UserError(
            f"data.seq_len={seq_len} over {over}: tokens are cut over {' and '.join(axes)}{how}, "
            f"so they must be a multiple of {unit}; use --data.seq-len {-(-seq_len // unit) * unit}"
        )
    if -(-model.padded_vocab // mesh.tp) * (mesh.tp - 1) >= model.padded_vocab:
        raise UserError(
            f"model.vocab={model.vocab} over tp={mesh.tp}: some rank would hold no row; "
            f"use --model.vocab-multiple {mesh.tp}"
        )
    if seq_len > model.context:
        raise UserError(
            f"data.seq_len={seq_len}: longer than model.context={model.context}; use "
            f"--data.seq-len {model.context} or --model.context {seq_len}"
        )


def sequence_unit(mesh: MeshShape, zigzag: bool) -> int:
    """Return the number that must divide the sequence length. Every cp rank holds equally many
    tokens, in zig-zag order as two equal chunks. Its tp ranks shard these tokens evenly."""
    return mesh.cp * math.lcm(mesh.tp, 2 if mesh.cp > 1 and zigzag else 1)


def check_experts(model: ModelConfig, mesh: MeshShape) -> None:
    """Raise UserError if ep or etp do not fit the mesh or the experts."""
    c, _ = model.moe, mesh.atoms  # raises if the mesh has no ranks for ep
    if not c.experts:
        if mesh.ep * mesh.etp > 1:
            raise UserError(f"mesh {mesh}: the model has no experts; leave ep and etp out")
        return
    for flag, size, axis in (
        ("experts", c.experts, "ep"),
        ("mlp", c.mlp, "etp"),
        ("shared", c.shared, "tp"),
    ):
        divides(f"model.moe.{flag}", size, axis, getattr(mesh, axis))


def check_expert_sizes(
    how: ComputeConfig,
    model: ModelConfig,
    mesh: MeshShape,
    compute: torch.dtype,
    lora: LoraConfig = NO_LORA,
) -> None:
    """Raise UserError if the kernel of grouped matmuls does not take the sizes: in bfloat16 a row
    has a multiple of 16 bytes."""
    c = model.moe
    padded = how.moe_dispatch == "static" or c.capacity_factor  # one matmul for each expert
    if not c.experts or compute != torch.bfloat16 or padded:
        return
    sizes = {"model.embed": (model.embed, 1), "model.moe.mlp": (c.mlp, mesh.etp)}
    for name, (size, cuts) in sizes.items():
        if size // cuts % 8:
            near = -(-size // (8 * cuts)) * 8 * cuts
            over = f" over etp={cuts}" if cuts > 1 else ""
            flag = name.replace("_", "-")
            raise UserError(
                f"{name}={size}{over}: the kernel of experts in bfloat16 takes multiples of 8 on a "
                f"rank; use --{flag} {near}, or --moe-dispatch static"
            )
    updated = any(w.axes[0] == "experts" and is_target(w, lora) for w in flat(declare_model(model)))
    if lora.rank % 8 and updated:
        raise UserError(
            f"--lora.rank {lora.rank}: the kernel of experts in bfloat16 takes multiples of 8; use "
            f"--lora.rank {-(-lora.rank // 8) * 8}, or --moe-dispatch static"
        )


def check_recompute(how: ComputeConfig, compiles: bool) -> None:
    """Raise UserError if the activation policy needs torch.compile and nothing is compiled."""
    if how.policy.budget is not None and not compiles:
        raise UserError(
            "--recompute budget: the compiler keeps to a budget, and nothing is compiled here; "
            "use --compile on or --recompute selective"
        )


def check_dispatch(how: ComputeConfig, model: ModelConfig, compiles: bool) -> None:
    """Raise UserError if the dispatcher does not support the capacity limit or torch.compile."""
    c = model.moe
    if c.experts and c.capacity_factor and how.moe_dispatch in ("alltoall", "allgather"):
        raise UserError(
            f"--moe-dispatch {how.moe_dispatch} with "
            f"model.moe.capacity_factor={c.capacity_factor}: it drops nothing; use --moe-dispatch "
            "static, or --model.moe.capacity-factor 0"
        )
    if c.experts and how.moe_dispatch == "alltoall" and compiles:
        raise UserError(
            "--moe-dispatch alltoall: how many rows it sends is known only while it runs, so it "
            "cannot be compiled; use --moe-dispatch allgather, --moe-dispatch static or --compile "
            "off"
        )


def check_fp8(
    how: ComputeConfig,
    model: ModelConfig,
    mesh: MeshShape,
    tokens: int,
    compute: torch.dtype,
) -> None:
    """Raise UserError if if FP8 is requested but no matmul would use it.

    ``tokens``: tokens of a microbatch on one rank.
    """
    if how.fp8 == "none":
        return
    flag = f"--fp8 {how.fp8}"
    if compute == torch.float64:
        raise UserError(
            f"{flag} --dtype float64: FP8 kernels give float32 at most; drop one of the two"
        )
    recipe = how.recipe(end=False)
    assert recipe is not None
    if model.layers < 3 and not how.fp8_first_last:
        raise UserError(
            f"{flag}: the first and the last block stay in high precision, and "
            f"model.layers={model.layers} has no other; use --fp8-first-last, or drop --fp8"
        )
    sizes = {
        _sizes(w, model, mesh, tokens, recipe)
        for p in declare_model(model).blocks
        for w in flat(p)
        if len(w.shape) > 1
    }
    if not any(recipe.converts(*size) for size in sizes):
        raise UserError(
            f"{flag}: no matrix of this model has {how.fp8_min_weights} weights on a rank (at most "
            f"{max(i * o for _, i, o in sizes):.0f}), and its sizes and the {tokens} tokens "
            f"multiples of {recipe.multiple}; drop --fp8, or lower --fp8-min-weights"
        )
    recipe.load()


def check_capability(how: ComputeConfig, device: str) -> None:
    """Raise UserError if a device of this machine has no kernels for the FP8 recipe."""
    recipe = how.recipe(end=False)
    if recipe is None or device == "cpu":
        return
    capabilities = torch.cuda.get_device_capability(device), recipe.capability
    if capabilities[0] < capabilities[1]:
        has, needs = (".".join(map(str, capability)) for capability in capabilities)
        raise UserError(
            f"--fp8 {how.fp8}: {torch.cuda.get_device_name(device)} has compute capability {has}, "
            f"and the recipe's kernels need {needs}; drop --fp8"
        )


def _sizes(
    w: WeightSpec, model: ModelConfig, mesh: MeshShape, tokens: int, recipe: Recipe
) -> tuple[float, float, float]:
    """Sizes of a matmul with this weight (or with one expert's weight) on one rank: tokens, width
    of the residual stream, and the weight's other dim."""
    beside = w.numel / model.embed
    if w.axes[0] == "experts":  # one expert matmul may have any number of rows
        return recipe.multiple, model.embed, beside / w.shape[0] / mesh.etp
    return tokens, model.embed, beside / mesh.tp


def check_attention(
    path: AttentionPath, model: ModelConfig, dtype: torch.dtype, device: str
) -> None:
    """Raise UserError if the attention path requested by name does not support the model, dtype or
    device."""
    for mixer in model.mixers:
        mixer.check_kernel(path, dtype, device)


def ramp_microbatches(
    ramp: BatchRamp, micro_batch: int | None, mesh: MeshShape
) -> tuple[tuple[int, ...], int]:
    """Return ``(number of microbatches for each size of the ramp, rows in each microbatch)``. All
    steps have microbatches of one size, so that one compiled step serves the whole run, in the same
    memory. Raises UserError as ``microbatches`` does."""
    remedy = "use a size of" if ramp.ramps else "use --batch"
    for size in ramp.sizes:
        microbatches(size, micro_batch, mesh, remedy)
    _, rows = microbatches(math.gcd(*ramp.sizes), micro_batch, mesh)
    counts = (microbatches(size, rows // mesh.data, mesh)[0] for size in ramp.sizes)
    return tuple(counts), rows


def microbatches(
    batch: int, micro_batch: int | None, mesh: MeshShape, remedy: str = "use --batch"
) -> tuple[int, int]:
    """Return ``(number of microbatches, rows in each over all data ranks)`` for a global batch.
    Raises UserError if the batch is not divisible, and suggests the nearest divisible batch.

    ``remedy``: the words of the error before this batch."""
    if batch < 1 or (micro_batch is not None and micro_batch < 1):
        raise UserError(
            f"batch={batch}, micro_batch={micro_batch}: both are at least 1; raise them"
        )
    given = micro_batch is not None
    if micro_batch is None:
        share = max(1, batch // mesh.data)
        enough = 2 * mesh.pp if mesh.pp > 1 else 1  # with fewer, a pipeline is mostly idle
        sizes = (n for n in range(1, share + 1) if share % n == 0 and share // n >= enough)
        micro_batch = max(sizes, default=1)
    rows = micro_batch * mesh.data
    if batch % rows:
        step = rows if given else mesh.data
        down, up = batch // step * step, -(-batch // step) * step
        near = up if down == 0 or up - batch < batch - down else down
        raise UserError(
            f"batch={batch}: not a multiple of micro_batch={micro_batch} times {mesh.data} data "
            f"ranks; {remedy} {near}"
        )
    if batch // rows > LARGEST_COUNT:
        raise UserError(
            f"batch={batch}: makes {batch // rows} microbatches, and a step has at most "
            f"{LARGEST_COUNT}; raise --micro-batch"
        )
    return batch // rows, rows
