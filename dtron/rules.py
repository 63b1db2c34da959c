"""The one table that defines how tensors are sharded on a mesh.

A tensor's dims have *logical* axes: ``w_up`` is ``(embed, mlp)``, an activation ``x_TD`` is
``(tokens, act_embed)``. ``RULES`` maps each logical axis to the mesh axes that shard it (mesh.py
lists the mesh axes). This table is the whole description of data, tensor, sequence, context and
expert parallelism and of ZeRO. To turn a parallelism off, edit a row. The layers never ask which
parallelism is on. (The idea comes from the logical axis rules of GSPMD, arXiv:2105.04663.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from dtron.distributed.mesh_shape import is_part

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    # activations
    "tokens": ("dp_replicate", "dp", "cp"),  # between the collectives of a tensor-parallel layer
    "tokens_sp": ("dp_replicate", "dp", "cp", "tp"),  # the residual stream: sequence parallelism
    "rows": ("dp_replicate", "dp"),  # tokens where each rank needs its sequences whole
    "sequence": ("cp",),  # the parts of a sequence
    "act_embed": (),  # also the small weights (norms, biases) that every rank keeps whole
    "act_q_rank": (),
    "act_kv_rank": (),
    "act_gate_rank": (),
    "kv_latent": (),
    "act_index_heads": (),
    "act_key_heads": (),  # of a Mamba-2 with one group
    # weights
    "embed": ("dp", "cp"),  # the ZeRO row
    "q_rank": ("dp", "cp"),  # and for the latents of MLA
    "kv_rank": ("dp", "cp"),
    "gate_rank": ("dp", "cp"),  # and for the gates of Kimi delta attention
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "index_heads": ("tp",),  # of the indexer of sparse attention
    "key_heads": ("tp",),  # of linear attention
    "value_heads": ("tp",),
    "head_dim": (),
    "qk_dim": (),
    "kv_dim": (),
    "v_dim": (),
    "index_dim": (),
    "mlp": ("tp",),
    "vocab": ("tp",),
    "positions": (),
    "taps": (),
    "rank": (),  # of a low-rank update
    # experts: their tokens, and their weights
    "tokens_ep": ("dp_replicate", "edp", "ep"),
    "experts": ("ep",),
    "act_experts": (),  # scores and bias of the router
    "expert_embed": ("edp",),  # the ZeRO row of experts
    "expert_mlp": ("etp",),
    "shared_mlp": ("tp",),  # the MLP of the expert that every token goes to
}
"""The mesh axes that shard each logical axis. Every parallelism is a row."""

# The rows that shard a weight at rest. The weight is all-gathered over these axes for compute.
ZERO = ("embed", "q_rank", "kv_rank", "gate_rank", "expert_embed")

# The reductions that may be pending, by the sign before a logical axis.
PENDING = {"+": "sum", "^": "max"}

# The mesh axes along which layers exchange rows themselves. Each axis has a process group.
EXCHANGED = ("ep", "cp")


def rules_for(zero: int) -> Rules:
    """Return the rules for a ZeRO stage. Stage 0 is the table with its ``ZERO`` rows emptied;
    stages 1 to 3 share the table (see training/gradients.py)."""
    return whole(RULES) if zero == 0 else RULES


def whole(rules: Rules) -> Rules:
    """Return the rules for gathered weights: the ``ZERO`` rows are emptied."""
    return {**rules, **dict.fromkeys(ZERO, ())}


def zero_axes(mesh_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the dims of the mesh over which ZeRO shards, and so all-gathers, a weight."""
    return expand(RULES["embed"], tuple(mesh_axes))


def place(rules: Rules, mesh_axes: Sequence[str], *axes: str | None) -> tuple[Placement, ...]:
    """Return one placement per mesh axis for a tensor with these logical axes.

    Raises ValueError for an axis without a row: an unknown axis must never silently replicate.
    Raises ValueError also if two dims would share a mesh axis.
    """
    return _place(rules, tuple(mesh_axes), axes)


def place_gathered(
    rules: Rules, mesh_axes: Sequence[str], *axes: str | None
) -> tuple[Placement, ...]:
    """Return the placements after the weight is all-gathered: ``place`` without the ``ZERO``
    rows."""
    return _place(rules, tuple(mesh_axes), axes, gathered=True)


def _place(
    rules: Rules, mesh_axes: tuple[str, ...], axes: tuple[str | None, ...], gathered: bool = False
) -> tuple[Placement, ...]:
    where: dict[str, Placement] = {}
    rules = whole(rules) if gathered else rules
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        pending = PENDING.get(axis[0])
        name = axis[1:] if pending else axis
        if name not in rules:
            raise ValueError(
                f"logical axis {name!r} has no row in the rules: {', '.join(rules)}; add one"
            )
        for atom in expand(rules[name], mesh_axes):
            if atom in where:
                raise ValueError(
                    f"{axes}: two dims share mesh axis {atom!r}; change a row of the rules"
                )
            where[atom] = Partial(pending) if pending else Shard(dim)
    return tuple([where.get(mesh_axis, Replicate()) for mesh_axis in mesh_axes])


def expand(axes: Sequence[str], mesh_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the dims of a DeviceMesh that make up these axes, in the mesh's order."""
    return tuple(atom for atom in mesh_axes if any(is_part(atom, axis) for axis in axes))
