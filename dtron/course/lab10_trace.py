"""The traces of lab 10: the shipped trace of one step, traces that are made up, and the classes of
real kernels."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from dtron.runtime.trace import read

SHIPPED = "bench-1.3b-step.json.gz"
CLASSES = ("matmul", "attention", "optimizer", "communication", "copy", "elementwise")


class Kernel(NamedTuple):
    """One kernel or copy of a GPU, from ``start`` to ``end``, in microseconds."""

    name: str
    start: float
    end: float


def kernels(path: Path | str | None = None) -> list[Kernel]:
    """Read the kernels of one step from a trace.

    ``path``: a trace that ``train.py --profile`` wrote. None: the shipped trace, one step of
        bench-1.3b in bfloat16, 2 x 4096 tokens, on one H200 (torch 2.11.0+cu130).

    Raises UserError if the file is no trace."""
    if path is None:
        return list(_shipped())
    return [Kernel(span.name, span.start, span.end) for span in read(path)]


@cache
def _shipped() -> tuple[Kernel, ...]:
    with as_file(files("dtron.course") / "files" / SHIPPED) as path:
        return tuple(kernels(path))


# ---- the right answers

# The first row with a part that the lower-case name contains gives the class. Triton's fused
# kernels have the names of what they fuse, so they come before matmuls and attention.
TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "memcpy ptop")),
    ("copy", ("memcpy", "memset")),
    ("optimizer", ("multi_tensor_apply", "lpnorm_cleanup")),
    ("attention", ("sdpa", "cudnn::fusion", "flash_fwd", "flash_bwd", "fmha")),
    ("matmul", ("nvjet", "cutlass", "cublas", "xmma_gemm")),
)


def kind(name: str) -> str:
    """Return the class of a kernel."""
    if name.startswith("triton_"):
        return "optimizer" if "_sqrt" in name else "elementwise"
    lower = name.lower()
    found = (k for k, parts in TABLE if any(part in lower for part in parts))
    return next(found, "elementwise")


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of intervals as sorted disjoint intervals."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def busy(trace: Iterable[Kernel]) -> float:
    """Return the microseconds in which at least one kernel runs."""
    return sum(end - start for start, end in merged((k.start, k.end) for k in trace))


def exposed(trace: Iterable[Kernel]) -> float:
    """Return the microseconds in which communication runs, and no other kernel."""
    trace = list(trace)
    return busy(trace) - busy(k for k in trace if kind(k.name) != "communication")


# ---- traces that are made up

MADE_UP = {
    "matmul": "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
    "attention": "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
    "elementwise": "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
    "communication": "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "copy": "Memcpy DtoH (Device -> Pinned)",
}


def made_up(seed: int, count: int = 40) -> list[Kernel]:
    """Make a trace with streams of kernels, of messages and of copies. Intervals overlap, touch,
    and contain one another; the list is in no order of time."""
    draw = random.Random(seed)
    trace = []
    for stream in (("matmul", "attention", "elementwise"), ("communication",), ("copy",)):
        now = float(draw.randrange(1000, 1040))
        for _ in range(count if len(stream) > 1 else count // 4):
            now += draw.choice((0, 0, 0, 3, 20) if len(stream) > 1 else (0, 30, 90))
            end = now + draw.choice((2, 8, 15, 40, 120))
            trace.append(Kernel(MADE_UP[draw.choice(stream)], now, end))
            now = end
    draw.shuffle(trace)
    return trace


# Names of real kernels of other traces: FP8, experts, several GPUs. Long names are cut.
OTHER_NAMES = (
    ("nvjet_sm90_qrtst_320x128_128x3_1x2_h_bz_coopB_TNT", "matmul"),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x128x8_stage3_warpsize1x4x1", "matmul"),
    ("_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm", "matmul"),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x256_8x4_nt_align1>(", "matmul"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmul"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
    ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
    ("triton_poi_fused__scaled_mm__to_copy_clamp_clone_exp2_floor_log2_mul_t_15", "elementwise"),
    ("triton_red_fused__to_copy_abs_add_max_mean_mul_pow_rsqrt_12", "elementwise"),
    ("triton_poi_fused__scaled_dot_product_cudnn_attention_backward_clone_expand", "elementwise"),
    ("triton_per_fused__softmax_exp_prepare_softmax_online_sub_sum_xlogy_6", "elementwise"),
    ("void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16>", "elementwise"),
    ("void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel", "elementwise"),
    ("triton_poi_fused__to_copy_add_copy_copy__div_mul_rsub_sqrt_sub_where_0", "optimizer"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native", "optimizer"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "communication"),
    ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("Memcpy PtoP (Device -> Device)", "communication"),
    ("Memcpy DtoH (Device -> Pinned)", "copy"),
    ("memset32", "copy"),
)
