"""The names of torch's operators by what a plan does with them."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast": "broadcast",
}

# A view of its argument's memory.
VIEWS = _names(
    """
    _reshape_alias _unsafe_view alias as_strided detach diagonal expand getitem lift_fresh
    narrow permute reshape select slice split split_with_sizes squeeze t transpose unbind
    unfold unsqueeze view view_as
    """
)
# Computes nothing, or what every kernel computes again.
WITHOUT_KERNEL = _names(
    """
    arange device dim empty empty_like empty_strided full full_like iota is_contiguous
    new_empty new_empty_strided new_zeros numel ones promote_types scalar_tensor size
    storage_offset stride sym_numel sym_size sym_storage_offset sym_stride zeros
    """
)
# A matmul of a library.
MATMULS = _names(
    """
    _grouped_mm _scaled_grouped_mm _scaled_mm _scaled_mm_v2 addmm baddbmm bmm mm
    """
)
# A kernel of its own, which writes into a copy of its first input.
IN_PLACE = _names(
    """
    index_put index_put_ scatter scatter_add scatter_reduce
    """
)
# Reads rows of a tensor in any order.
GATHERS = _names(
    """
    embedding gather index index_select
    """
)
