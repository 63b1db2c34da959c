"""The reference solution of lab 10."""

from dtron.course.lab10_trace import kernels

PLAN = "--mesh dp=4,tp=2 --zero 3 --micro-batch 2 --recompute selective"
TABLE = {
    "communication": ("nccl", "PtoP"),
    "copy": ("Memcpy", "Memset", "memcpy", "memset"),
    "optimizer": ("multi_tensor_apply", "lpnorm"),
    "attention": ("sdpa", "cudnn::fusion"),
    "matmul": ("nvjet", "cutlass", "cublas", "gemm"),
}


def step_flops(weights, layers, width, seq_len, tokens):
    return (6 * weights + 6 * layers * width * seq_len) * tokens


def mfu(flops, seconds, gpus, peak):
    return flops / (seconds * gpus * peak)


def matmul_seconds(m, k, n, peak, bandwidth):
    compute = 2 * m * k * n / peak
    memory = 2 * (m * k + k * n + m * n) / bandwidth
    return max(compute, memory)


def waiting(weights, seconds, ranks, bandwidth):
    sent = [2 * w * (ranks - 1) / ranks / bandwidth for w in weights]
    hidden = [0.0, *seconds[:-1]]
    return sum(max(0.0, s - h) for s, h in zip(sent, hidden, strict=True))


def kind(name):
    if name.startswith("triton"):
        return "optimizer" if "_sqrt" in name else "elementwise"
    for found, parts in TABLE.items():
        if any(part in name for part in parts):
            return found
    return "elementwise"


def busy(trace):
    total, until = 0.0, float("-inf")
    for k in sorted(trace, key=lambda k: k.start):
        total += max(0.0, k.end - max(k.start, until))
        until = max(until, k.end)
    return total


def exposed(trace):
    return busy(trace) - busy([k for k in trace if kind(k.name) != "communication"])


def breakdown(trace):
    kinds = (*TABLE, "elementwise")
    times = {c: busy([k for k in trace if kind(k.name) == c]) for c in kinds}
    span = max(k.end for k in trace) - min(k.start for k in trace)
    return {**times, "idle": span - busy(trace)}


def answers():
    trace, tokens, weights, embedding = kernels(), 2 * 4096, 1_199_671_296, 32768 * 2048
    seconds = {c: us / 1e6 for c, us in breakdown(trace).items()}
    step = (max(k.end for k in trace) - min(k.start for k in trace)) / 1e6
    flops = step_flops(weights, 24, 2048, 4096, tokens)
    of_weights = step_flops(weights, 0, 0, 0, tokens)
    adamw = sum(k.end - k.start for k in trace if "_sqrt" in k.name) / 1e6
    return {
        "MFU": mfu(flops, step, 1, 989e12),
        "TFLOP/s of matmuls": of_weights / seconds["matmul"] / 1e12,
        "TFLOP/s of attention": (flops - of_weights) / seconds["attention"] / 1e12,
        "GB/s of AdamW": 28 * (weights + embedding) / adamw / 1e9,
        "speedup without attention": step / (step - seconds["attention"]),
    }


ANSWERS = answers()
