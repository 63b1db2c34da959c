"""Time attention kernels with values that are narrower than keys, unpadded and padded.

    python bench/kernels/latent.py --batch 2 --heads 16 --seq-len 4096

Prints one JSON line for each kernel: TFLOP/s of causal attention in forward and in backward, or the
reason why the kernel refused. FLOPs count half of the square, and unpadded widths. Needs a GPU and
torch, nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtron.layers.attention_kernels import attention_flex, with_blocks
from dtron.layers.attention_mask import AttentionMask
from dtron.runtime.exit import Parser, run_cli

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def kernels(seq_len: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def sdpa(backend: SDPBackend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    mask = with_blocks(AttentionMask(seq_len), None, torch.device("cuda"))

    def flex(q, k, v):
        return attention_flex(q, k, v, None, None, mask)

    return {name: sdpa(backend) for name, backend in BACKENDS.items()} | {"flex": flex}


def seconds(fn: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(5):
        fn()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats / 1e3


def padded_call(run: Callable, q: Tensor, k: Tensor, v: Tensor, padding: int) -> Tensor:
    """Run a kernel with padded values, and cut the padding off its output."""
    return run(q, k, F.pad(v, (0, padding)))[..., : v.shape[-1]]


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 2), ("heads", 16), ("seq-len", 4096), ("qk", 192), ("v", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args(argv)

    def make(width: int) -> Tensor:
        shape = o.batch, o.seq_len, o.heads, width
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = (make(width).requires_grad_() for width in (o.qk, o.qk, o.v))
    direction = make(o.v)
    flops = o.batch * o.heads * o.seq_len**2 * (o.qk + o.v)  # causal, forward
    for name, run in kernels(o.seq_len).items():
        for padded in (False, True):
            wide = o.qk - o.v if padded else 0
            forward = partial(padded_call, run, q, k, v, wide)
            line = {
                "kernel": name,
                "padded": padded,
                **vars(o),
                "device": torch.cuda.get_device_name(),
            }
            try:
                y = forward()
                backward = partial(torch.autograd.grad, y, (q, k, v), direction, retain_graph=True)
                line |= {"forward_tflops": flops / seconds(forward) / 1e12}
                line |= {"backward_tflops": 2.5 * flops / seconds(backward) / 1e12}
            except RuntimeError as error:
                line["refused"] = str(error).splitlines()[0]
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
