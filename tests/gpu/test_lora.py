"""Updates beside frozen weights on a GPU: compiled code and recorded steps, in bfloat16, with
weights in 4 and 8 bits. ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.compute_config import ComputeConfig
from dtron.model.lora import LoraConfig, with_lora
from dtron.model.presets import preset
from dtron.params import draw, normal, stored_dtype
from dtron.runtime.config import DataConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.gradients import gradients
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.tree import fill, flat
from tests.helpers.runs import random_rows
from tests.helpers.values import ADAMW

pytestmark = pytest.mark.gpu
LORA = LoraConfig(rank=8)
CASES = {
    "lora": LORA,
    "dora": replace(LORA, dora=True),
    "nf4": replace(LORA, quantize_base="nf4"),
    "fp8": replace(LORA, quantize_base="fp8"),
}


def model(name: str):
    m = replace(preset(name), layers=3, head_dim=64)
    return replace(m, moe=replace(m.moe, balanced=True)) if m.moe.experts else m


def stage(m, lora: LoraConfig, layout: Layout, count: int = 1):
    """A pipeline of one stage, and its weights, with updates that have an effect."""
    pipe = one_stage(m, count, layout)
    pipe = replace(pipe, specs=tuple(with_lora(s, lora) for s in pipe.specs))

    def load(w):
        x = draw(replace(w, init=normal) if w.path.endswith("lora_b") else w, m.dims(), 0)
        return (1 + x if w.derived else x).to("cuda", stored_dtype(w, layout, torch.float32))

    return pipe, fill(pipe.spec, load)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_gradients_are_those_of_eager(name, case, recompute):
    m, layout = model(name), Layout(compute=torch.bfloat16)
    pipe, params = stage(m, CASES[case], layout)
    copies = with_compute_copies(
        init_state(ADAMW, pipe.spec, params), params, pipe.spec, torch.bfloat16
    )
    rows = torch.randint(m.vocab, (2, 129), generator=torch.Generator().manual_seed(0)).cuda()
    batches = [make_batch(rows, layout)]
    plain = program(m, layout, ComputeConfig(recompute))
    fast = compiled(plain, layout, ComputeConfig(recompute))
    weights = copies.compute_copies
    want, got = (gradients(fn, weights, batches, 256, pipe, 1)[:2] for fn in (plain, fast))
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-3)
    trained = [w for w in flat(pipe.spec) if not w.frozen]
    for w, a, b in zip(trained, flat(got[1]), flat(want[1]), strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert w.buffer or (b.norm() > 0 and error < 5e-2), w.path


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_step(case):
    """A recorded step copies nothing to the device: weights are made of codes without a table."""
    m, layout = model("tiny"), Layout(compute=torch.bfloat16)
    found = []
    for record in (False, True):
        pipe, params = stage(m, CASES[case], layout)
        opt = with_compute_copies(
            init_state(ADAMW, pipe.spec, params), params, pipe.spec, torch.bfloat16
        )
        config = RunConfig(model=m, lora=CASES[case], batch=2, data=DataConfig(seq_len=128), seed=3)
        functions = compiled(program(m, layout), layout)
        step = TrainStep(functions, pipe, config, ADAMW.compiled())
        step = CudaGraphStep(step, "cuda") if record else step
        losses = []
        for i in range(8):
            rows = random_rows(config, i)
            batch = make_batch(rows.cuda(), layout)
            loss, _, _, params, opt = step(params, opt, [batch], valid_tokens(rows), 1e-2)
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0][-1] < found[0][0]


def test_frozen_weights_are_kept_in_few_bytes():
    """A model of 4 bits has a third of the memory of bfloat16."""
    m, used = replace(model("tiny"), layers=8, embed=512, mlp=2048), {}
    for case in ("lora", "nf4"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        kept = stage(m, CASES[case], Layout(compute=torch.bfloat16))
        used[case] = torch.cuda.memory_allocated() - before
        del kept
    assert used["nf4"] < 0.5 * used["lora"]
