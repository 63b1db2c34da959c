"""Wrong solutions of lab 10."""

from __future__ import annotations

from tests.course.wrong.mistake import mistake

MISTAKES = [
    mistake(
        10,
        "forward alone",
        "step_flops: bench-1.3b, 2 x 4096 tokens: a step has 6.8862e+13 FLOPs, and you say 2.2954e+13",
        (
            "(6 * weights + 6 * layers * width * seq_len)",
            "(2 * weights + 2 * layers * width * seq_len)",
        ),
    ),
    mistake(
        10,
        "attention without its mask",
        "a step has 6.8862e+13 FLOPs, and you say 7.8757e+13, 1.144 of it",
        ("6 * layers * width * seq_len", "12 * layers * width * seq_len"),
    ),
    mistake(
        10,
        "the peak of one GPU for all",
        "mfu: 6e+15 FLOPs in 1.5 s on 8 GPUs of 989 TFLOP/s: the MFU is 0.5056, and you say 4.0445",
        ("flops / (seconds * gpus * peak)", "flops / (seconds * peak)"),
    ),
    mistake(
        10,
        "no limit of memory",
        "[16, 4096] @ [4096, 4096]: its bytes take 7.05 us, and you say 0.54 us",
        ("return max(compute, memory)", "return compute"),
    ),
    mistake(
        10,
        "compute and memory one after the other",
        "[8192, 2048] @ [2048, 5632]: its FLOPs take",
        ("return max(compute, memory)", "return compute + memory"),
    ),
    mistake(
        10,
        "only the weights are read",
        "[16, 4096] @ [4096, 4096]: its bytes take 7.05 us, and you say 6.99 us",
        ("2 * (m * k + k * n + m * n) / bandwidth", "2 * k * n / bandwidth"),
    ),
    mistake(
        10,
        "the first all-gather is hidden too",
        "on 2 ranks, which compute for [0.001, 0.001, 0.001, 0.001] s: kernels wait for 0.0005 s",
        ("hidden = [0.0, *seconds[:-1]]", "hidden = seconds"),
    ),
    mistake(
        10,
        "all messages and all kernels at once",
        "on 8 ranks, which compute for [0.001, 0.001, 0.001, 0.001] s: kernels wait for 0.004 s",
        (
            "return sum(max(0.0, s - h) for s, h in zip(sent, hidden, strict=True))",
            "return max(sent[0], sum(sent) - sum(seconds))",
        ),
    ),
    mistake(
        10,
        "time left over hides the next message",
        "the arithmetic, other sizes: blocks of [300000000, 10000000, 400000000] weights on 16",
        (
            "return sum(max(0.0, s - h) for s, h in zip(sent, hidden, strict=True))",
            "return sent[0] + max(0.0, sum(sent[1:]) - sum(hidden))",
        ),
    ),
    mistake(
        10,
        "a plan that is too large",
        "PLAN: '--mesh dp=8 --zero 3 --micro-batch 1' has 8.6 GiB and 55,347 tokens/s per GPU; too l",
        (
            "--mesh dp=4,tp=2 --zero 3 --micro-batch 2 --recompute selective",
            "--mesh dp=8 --zero 3 --micro-batch 1",
        ),
    ),
    mistake(
        10,
        "a plan that is too slow",
        "too slow: at least 51,500",
        (
            "--mesh dp=4,tp=2 --zero 3 --micro-batch 2 --recompute selective",
            "--mesh tp=8 --micro-batch 1",
        ),
    ),
    mistake(
        10,
        "a plan of more GPUs",
        "has 16 GPUs, and there are 8",
        (
            "--mesh dp=4,tp=2 --zero 3 --micro-batch 2 --recompute selective",
            "--mesh dp=16 --micro-batch 2",
        ),
    ),
    mistake(
        10,
        "a plan of another model",
        "PLAN has --model.layers; its flags are --mesh, --zero, --micro-batch, --recompute",
        ("--recompute selective", "--model.layers 1"),
    ),
    mistake(
        10,
        "a batch that the mesh does not divide",
        "PLAN '--mesh dp=4,tp=2 --zero 3 --micro-batch 3 --recompute selective': ",
        ("--micro-batch 2", "--micro-batch 3"),
    ),
    mistake(
        10,
        "fused kernels are what their names have",
        "backward_clone_expand_transpose_unsqu is of the class elementwise, and you say attention",
        ('("sdpa", "cudnn::fusion")', '("sdpa", "cudnn")'),
        ('if name.startswith("triton")', 'if name.startswith("triton") and "cudnn" not in name'),
    ),
    mistake(
        10,
        "a square root of a norm",
        "kind: triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_4 is of the class elementwise, and",
        ('if "_sqrt" in name', 'if "sqrt" in name'),
    ),
    mistake(
        10,
        "the kernels of one trace alone",
        "kind, other traces: _ZN7cutlass13device_kernel",
        ('"matmul": ("nvjet", "cutlass", "cublas", "gemm")', '"matmul": ("nvjet", "xmma")'),
    ),
    mistake(
        10,
        "copies between GPUs are copies",
        "kind, other traces: Memcpy PtoP (Device -> Device) is of the class communication, and you",
        ('("nccl", "PtoP")', '("nccl",)'),
    ),
    mistake(
        10,
        "overlap counts twice",
        "busy: a message beside a matmul (matmul from 0 to 4, communication from 1 to 9): busy is 9",
        ("k.end - max(k.start, until)", "k.end - k.start"),
    ),
    mistake(
        10,
        "the last kernel ends last",
        "busy: a copy inside a matmul (matmul from 0 to 9, copy from 2 to 3, communication from 7 to",
        ("until = max(until, k.end)", "until = k.end"),
    ),
    mistake(
        10,
        "kernels in the order of the list",
        "busy: in no order of time (matmul from 6 to 9, matmul from 0 to 2): busy is 5 us, and you say",
        ("sorted(trace, key=lambda k: k.start)", "trace"),
    ),
    mistake(
        10,
        "all communication is exposed",
        "exposed: a message beside a matmul (matmul from 0 to 4, communication from 1 to 9): expo",
        (
            'busy(trace) - busy([k for k in trace if kind(k.name) != "communication"])',
            'busy([k for k in trace if kind(k.name) == "communication"])',
        ),
    ),
    mistake(
        10,
        "idle is no class of the sum",
        "breakdown: shipped trace: idle takes 1,605.3 us, and you say 1,596.8",
        ('"idle": span - busy(trace)', '"idle": span - sum(times.values())'),
    ),
    mistake(
        10,
        "no embedding in the update",
        "ANSWERS: 'GB/s of AdamW': 3740 is 0.947 of the right number; all weights, also the embedding",
        ("28 * (weights + embedding)", "28 * weights"),
    ),
]
