"""Traces of the profiler: which kernels a step has, and the kind of each."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from dtron.runtime.time_breakdown import Breakdown, breakdown
from dtron.runtime.trace import classify, read, spans_of

# ---- names

NAMES = {
    "matmul": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute"
        "_segment_k_off",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn"
        "_align8>(Params)",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int,"
        " int, int>>>",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv"
        "_bfloat16, true>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float,"
        " 128, 16, 4, 4>",
        "triton_tem_fused__scaled_mm_3",
        "triton_tem_fused_addmm_relu_0",
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_mm",
        "aten::linear",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "triton_tem_fused_flex_attention_backward_view_4",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel"
        "_traits<128>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash:"
        ":CollectiveMainloop>>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel"
        "<bfloat16_t>)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "communication": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "gloo:all_reduce",
        "c10d::allreduce_",
        "_c10d_functional::wait_tensor",
    ],
    "copy": [
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
    ],
    "elementwise": [
        "triton_poi_fused_mul_silu_silu_backward_1",
        "triton_red_fused__to_copy_mm_mul_sum_t_2",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_view_5",
        "triton_per_fused_flex_attention_backward_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor"
        "<float, 4>>",
        "aten::mul",
    ],
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in NAMES.items() for name in names]
)
def test_names_say_what_a_kernel_does(name, kind):
    assert classify(name) == kind


# ---- traces


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": 1,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "args": args,
    }


def device_trace() -> list[dict]:
    """The host launches step 5 from 100 to 130, while the device is still in step 4 until 150."""
    return [
        event("user_annotation", "ProfilerStep#5", 100, 30),
        event("gpu_user_annotation", "ProfilerStep#5", 150, 90, 7),
        event("cuda_runtime", "cudaLaunchKernel", 90, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 105, 2, correlation=2),
        event(
            "cuda_runtime", "cudaMemcpyAsync", 110, 2, 2, correlation=3
        ),  # another thread: backward
        event("cuda_runtime", "cudaLaunchKernelExC", 120, 2, 2, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 140, 2, correlation=5),
        event("cpu_op", "aten::mm", 104, 4),
        event("kernel", "nvjet_of_step_4", 101, 49, 7, correlation=1, stream=7),
        event("kernel", "nvjet_sm90_tst", 150, 40, 7, correlation=2, stream=7),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 200, 10, 7, correlation=3, stream=7),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 180, 25, 20, correlation=4, stream=20),
        event("kernel", "triton_poi_of_step_6", 240, 5, 7, correlation=5, stream=7),
    ]


def test_a_step_has_the_kernels_it_launched():
    found = spans_of(device_trace())
    assert [(s.name[:5], s.category, s.start, s.end) for s in found] == [
        ("nvjet", "matmul", 150, 190),
        ("Memcp", "copy", 200, 210),
        ("ncclD", "communication", 180, 205),
    ]
    assert breakdown(found) == Breakdown(
        span=60, matmul=40, attention=0, elementwise=0, communication=15, copy=5, idle=0, hidden=10
    )


def test_without_marks_or_launches_a_trace_is_one_step():
    unmarked = [e for e in device_trace() if not e["name"].startswith("ProfilerStep")]
    assert len(spans_of(unmarked)) == 5
    unlaunched = [e for e in device_trace() if e["cat"] not in ("cuda_runtime", "cuda_driver")]
    assert len(spans_of(unlaunched)) == 5


def test_of_several_steps_the_last_is_read():
    later = [event("user_annotation", "ProfilerStep#6", 131, 20)]
    assert [s.name for s in spans_of(device_trace() + later)] == ["triton_poi_of_step_6"]


def test_an_operator_of_the_cpu_counts_less_those_it_calls():
    events = [
        event("user_annotation", "ProfilerStep#5", 0, 100),
        event("cpu_op", "aten::linear", 10, 40),
        event("cpu_op", "aten::mm", 15, 30),
        event("cpu_op", "aten::copy_", 15, 5),
        event("cpu_op", "MmBackward0", 60, 20),
        event("cpu_op", "aten::mul", 60, 10),
        event("cpu_op", "aten::detach", 70, 0),
        event("user_annotation", "gloo:all_reduce", 40, 25, 2),
        event("python_function", "train", 0, 100),
        event("cpu_op", "aten::add", 120, 10),  # after the step
    ]
    assert sorted((s.start, s.end, s.name) for s in spans_of(events)) == [
        (10, 15, "aten::linear"), (15, 20, "aten::copy_"), (20, 45, "aten::mm"),
        (40, 65, "gloo:all_reduce"), (45, 50, "aten::linear"), (60, 70, "aten::mul"),
    ]  # fmt: skip


def test_reading_takes_the_memory_of_the_trace(tmp_path):
    """And not that of the largest trace: a process with a limit of memory reads it too."""
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": device_trace()}))
    tracemalloc.start()
    try:
        assert read(path) == spans_of(device_trace())
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()
