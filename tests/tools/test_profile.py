"""Where a step's time goes: the breakdown against counting microseconds, and traces read as what
they are."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from dtron.runtime.exit import run_cli
from dtron.runtime.profiler import Recorder
from dtron.runtime.time_breakdown import ORDER, Breakdown, breakdown, top
from dtron.runtime.trace import Span, classify, read, spans_of
from dtron.tools import profile
from tests.helpers.paths import ROOT


@st.composite
def span(draw) -> Span:
    start, long = draw(st.integers(0, 30)), draw(st.integers(1, 12))
    return Span("", draw(st.sampled_from(ORDER)), start, start + long)


spans = st.lists(span(), min_size=1, max_size=12)


def counted(found: list[Span]) -> Breakdown:
    """The definition: every microsecond is asked what runs in it."""
    begin, end = min(s.start for s in found), max(s.end for s in found)
    times = dict.fromkeys(("span", *ORDER, "idle", "hidden"), 0)
    for t in range(begin, end):
        running = [c for c in ORDER if any(s.category == c and s.start <= t < s.end for s in found)]
        times["span"] += 1
        times[running[0] if running else "idle"] += 1
        times["hidden"] += "communication" in running and running[0] != "communication"
    return Breakdown(**times)


def close(a: Breakdown, b: Breakdown) -> bool:
    return asdict(a) == pytest.approx(asdict(b))


@given(spans)
def test_the_breakdown_is_what_counting_gives(found):
    assert close(breakdown(found), counted(found))


@given(spans)
def test_the_parts_sum_to_the_span(found):
    b = breakdown(found)
    assert (
        b.matmul + b.attention + b.elementwise + b.communication + b.copy + b.idle
        == pytest.approx(b.span)
    )
    assert 0 <= b.hidden <= sum(s.end - s.start for s in found if s.category == "communication")
    assert min(asdict(b).values()) >= 0


@given(spans, st.integers(-1000, 10**9), st.randoms())
def test_neither_when_nor_in_which_order_matters(found, shift, random):
    moved = [s._replace(start=s.start + shift, end=s.end + shift) for s in found]
    random.shuffle(moved)
    assert close(breakdown(moved), breakdown(found))


def no_overlap(found: list[Span]) -> Breakdown:
    """A mutant: times of kernels are added up, and what runs beside another counts twice."""
    b = breakdown(found)
    total = {c: sum(s.end - s.start for s in found if s.category == c) for c in ORDER}
    return Breakdown(span=b.span, idle=b.span - sum(total.values()), hidden=0, **total)


def all_exposed(found: list[Span]) -> Breakdown:
    """A mutant: communication comes first, so none of it is hidden."""
    alone = breakdown([s for s in found if s.category == "communication"] or found)
    return Breakdown(
        **{**asdict(breakdown(found)), "communication": alone.communication, "hidden": 0}
    )


@pytest.mark.parametrize("mutant", [no_overlap, all_exposed])
def test_a_breakdown_that_ignores_overlap_is_noticed(mutant):
    assert find(spans, lambda found: not close(mutant(found), counted(found)))


def test_a_step_by_hand():
    """Two products with a gap, and a collective that begins beside the first and ends in the
    gap."""
    found = [
        Span("", "matmul", 0, 10),
        Span("", "communication", 6, 13),
        Span("", "matmul", 15, 20),
    ]
    assert breakdown(found) == Breakdown(
        span=20, matmul=15, attention=0, elementwise=0, communication=3, copy=0, idle=2, hidden=4
    )


# ---- names

NAMES = {
    "matmul": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>>>",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4>",
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
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloop>>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<bfloat16_t>)",
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
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
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
        (10, 15, "aten::linear"), (15, 20, "aten::copy_"), (20, 45, "aten::mm"), (40, 65, "gloo:all_reduce"),
        (45, 50, "aten::linear"), (60, 70, "aten::mul"),
    ]  # fmt: skip


def test_the_names_with_most_time_come_first():
    found = [Span("a", "matmul", 0, 3000), Span("b", "copy", 0, 5000), Span("a", "matmul", 0, 4000)]
    assert [line.split() for line in top(found, 1)] == [
        ["7.00", "ms", "2", "x", "elementwise", "a"]
    ]
    assert len(top(found, 5)) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_reads_a_trace(tmp_path, capsys, packed):
    data = json.dumps(
        {"traceEvents": [*device_trace(), {"ph": "M", "name": "process_name"}]}
    ).encode()
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert run_cli(profile.main, [str(path), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"matmul +│ +0\.04 │ +66\.7%", out) and re.search(
        r"exposed +│ +0\.0[12] │ +25\.0%", out
    )
    assert out.splitlines()[-1].split() == ["0.04", "ms", "1", "x", "matmul", "nvjet_sm90_tst"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read (No such file"),
        (b"not json", "not a Chrome trace"),
        (b"[1, 2]", "not a Chrome trace"),
        (b'{"loss": 1}', "not a Chrome trace"),
        (b'{"traceEvents": [3]}', "not a Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "x"}]}', "not a Chrome trace"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-4], "not a Chrome trace"),
        (b'{"traceEvents": []}', "no kernel and no operator"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, capsys, content, part):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    assert run_cli(profile.main, [str(path)]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and not out
    assert str(path) in err and part in err and "--profile" in err


# ---- recording


@pytest.mark.parametrize("target", [1, 3])
def test_one_step_is_recorded_and_no_other(tmp_path, target):
    """Every step makes products of its own width; the one asked for is found again."""
    seen = []
    recorder = Recorder(tmp_path / "trace.json", target, "cpu", seen.append)
    recorded = []
    for step in range(1, 5):
        recorder.begin()
        for _ in range(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
        recorded.append(recorder.end())
        torch.ones(8).exp()
    assert recorded == [step == target for step in range(1, 5)]
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in trace]
    assert names.count("aten::mm") == target and "aten::exp" not in names
    assert seen == [read(tmp_path / "trace.json")]
    assert "matmul" in {s.category for s in seen[0]}


def test_nothing_is_recorded_unless_asked(tmp_path):
    recorder = Recorder(tmp_path / "trace.json", 0, "cpu", pytest.fail)
    for _ in range(3):
        recorder.begin()
        assert not recorder.end()
    assert not any(tmp_path.iterdir())


def test_each_process_writes_its_own_and_the_first_speaks(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "03":
        monkeypatch.setenv("RANK", rank)
        recorder = Recorder(tmp_path / "trace.json", 1, "cpu", seen.append)
        recorder.begin()
        torch.ones(8).exp()
        recorder.end()
    assert {p.name for p in tmp_path.iterdir()} == {"trace-rank0.json", "trace-rank3.json"}
    assert len(seen) == 1


def test_the_benchmarks_need_torch_and_numpy_alone():
    """What else dtron depends on is out of reach. One process for both: most of its time goes into
    torch."""
    code = """
import runpy, sys
sys.modules.update(dict.fromkeys(["rich", "tyro", "tokenizers", "datasets"]))
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    sys.path.insert(0, program.rpartition("/")[0])  # as python does for a program
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
"""
    command = [
        sys.executable,
        "-c",
        code,
        *(str(ROOT / "bench" / f"{n}.py") for n in ("train", "pipeline")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    helps = done.stdout.split("usage: ")[1:]
    assert [text.split()[0] for text in helps] == ["train.py", "pipeline.py"]
    assert all("--microbatches" in text for text in helps)
