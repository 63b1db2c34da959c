"""Activations that move to pinned host memory and back, on streams of their own: the losses of a
run that keeps them, in less memory of the GPU."""

from __future__ import annotations

import pytest
import torch

from dtron.distributed.host_memory import HostMemory
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.params import init
from dtron.runtime.config import DataConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.gradients import gradients
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.tree import flat, tree_map
from tests.gpu.test_training import losses
from tests.helpers.runs import random_rows
from tests.helpers.values import ADAMW

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

# Tensors of more than a MiB: 4096 tokens in rows of 512 or more bytes.
M = ModelConfig(
    vocab=61, embed=256, layers=6, heads=4, kv_heads=4, head_dim=64, mlp=1024, context=512
)
LAYOUT = Layout(compute=torch.bfloat16)


def batches(count: int, number: int = 0) -> list:
    config = RunConfig(model=M, data=DataConfig(seq_len=512), batch=8 * count, seed=number)
    return [make_batch(rows, LAYOUT) for rows in random_rows(config, number).cuda().chunk(count)]


def peak_and_gradients(how: ComputeConfig, compile: bool) -> tuple[int, list[torch.Tensor]]:
    """The peak memory of a second step, and its loss and gradients."""
    pipe = one_stage(M, 2, LAYOUT)
    functions = program(M, LAYOUT, how)
    functions = compiled(functions, LAYOUT, how) if compile else functions
    params = tree_map(lambda w: w.cuda(), init(pipe.spec, M.dims(), 0, LAYOUT))
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss, grads, _ = gradients(functions, params, batches(2), 1, pipe, 1)
    torch.cuda.synchronize()
    assert loss is not None
    return torch.cuda.max_memory_allocated(), [loss, *flat(grads)]


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_are_the_same_in_less_memory(compile):
    most, want = peak_and_gradients(ComputeConfig(), compile)
    least, got = peak_and_gradients(ComputeConfig("offload"), compile)
    half, _ = peak_and_gradients(ComputeConfig("offload", 0.5), compile)
    assert least < half < most
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # a sum by atomics may be rounded


@pytest.mark.parametrize("count", [1, 2])
def test_a_recorded_step_is_the_step(monkeypatch, count):
    """Every buffer is pinned before the recording."""
    found, recording = {}, []
    take = HostMemory.take

    def noted(self: HostMemory, x: torch.Tensor) -> torch.Tensor:
        before = self.allocated
        buffer = take(self, x)
        if torch.cuda.is_current_stream_capturing():
            recording.append(self.allocated > before)
        assert buffer.is_pinned()
        return buffer

    monkeypatch.setattr(HostMemory, "take", noted)
    for recompute in ("none", "offload"):
        how, pipe = ComputeConfig(recompute), one_stage(M, count, LAYOUT)
        params = tree_map(lambda w: w.cuda(), init(pipe.spec, M.dims(), 0, LAYOUT))
        opt = init_state(ADAMW, pipe.spec, params)
        functions = compiled(program(M, LAYOUT, how), LAYOUT, how)
        config = RunConfig(model=M, recompute=recompute)
        step = CudaGraphStep(TrainStep(functions, pipe, config, ADAMW.compiled()), "cuda")
        found[recompute] = []
        for number in range(8):
            rows = batches(count, number)
            loss, norm, _, params, opt = step(params, opt, rows, 4096 * count, 1e-3)
            found[recompute].append((loss.item(), norm.item()))
    assert recording and not any(recording)
    assert found["offload"] == [pytest.approx(x, rel=1e-3) for x in found["none"]]


FLAGS = ["--model.layers", "6", "--model.embed", "256", "--model.mlp", "1024", "--batch", "16"]
FLAGS += ["--model.head-dim", "64", "--data.seq-len", "512", "--model.context", "512"]


@pytest.mark.parametrize("more", [["--compile", "off"], ["--cuda-graph", "off"], []])
def test_a_run_has_the_losses_of_a_run_that_keeps_all(tmp_path, more):
    """Eager, compiled and recorded."""
    want, got = (
        losses(tmp_path / name, *FLAGS, *more, "--recompute", name, dtype="bfloat16")
        for name in ("none", "offload")
    )
    assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("mesh", [["dp=2", "--zero", "3"], ["pp=2", "--micro-batch", "4"]])
def test_two_gpus_too(tmp_path, mesh, compile):
    own = [*FLAGS, "--mesh", *mesh, "--compile", compile]
    want, got = (
        losses(tmp_path / name, *own, "--recompute", name, processes=2, dtype="bfloat16")
        for name in ("none", "offload")
    )
    assert got == pytest.approx(want, rel=1e-3)
