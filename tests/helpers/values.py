"""Small values that tests of single functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from dtron.layers.rope import RopeConfig, frequencies
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import declare, init
from dtron.runtime.config import ModelConfig, OptimConfig
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map

ONE, F64 = Layout(), torch.float64
ADAMW = build_optimizer(OptimConfig())
SMALL = ModelConfig(
    vocab=50, embed=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=40, vocab_multiple=8
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, dtype=F64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


def close(got, want, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def tree(cls: type, **dims):
    """Draw random weights, away from 1 and 0, where mistakes hide."""
    absent = ("qk_norm", "qk_heads_norm", "qkv_bias", "bias", "sinks")
    absent += ("layernorm", "learned_positions", "attention_gate")
    spec = declare(cls, dict.fromkeys(absent, False) | dims)
    return tree_map(lambda w: normal(*w.shape, seed=sum(w.path.encode())), spec)


def same(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    """Assert equal values, and equal gradients of every input along one random direction."""
    close(got, want)
    direction = normal(*want.shape, seed=99).detach()
    close(torch.autograd.grad(got, inputs, direction), torch.autograd.grad(want, inputs, direction))


def turned(x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
    """Rotate pairs (i, i + H/2) as complex numbers, by e^(i angle)."""
    freq, scale = frequencies(rope, x.shape[-1], F64)
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * positions[:, None, None] * freq) * scale
    return torch.cat([z.real, z.imag], dim=-1)


def halves(w: Tensor, rotary: int) -> Tensor:
    """Reorder the last ``rotary`` columns. DeepSeek puts the two of a pair side by side; dtron puts
    them half a width apart."""
    plain, turned = w.split([w.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, turned[..., 0::2], turned[..., 1::2]], dim=-1)


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Allow flex_attention's backward on a CPU.

    torch refuses it there, because no fused kernel exists. Uncompiled it works. So the functions
    that dtron gives to flex can be tested without a GPU."""
    compiles = {
        "recompile_limit": 1000,
        "accumulated_recompile_limit": 1000,
        "automatic_dynamic_shapes": False,
    }
    refusal = mock.patch(
        "torch.nn.attention.flex_attention._validate_device", lambda *tensors: None
    )
    with refusal, torch._dynamo.config.patch(**compiles):
        yield
    torch._dynamo.reset()


def assert_steps_of_torch(
    optimizer, model: ModelConfig, reference, factors=(None,) * 5, **options
) -> None:
    """Assert that five steps of one block are the steps of an optimizer of torch.

    Gradients are scaled by 0.7. Matrices decay by 0.3.
    ``reference``: torch's class.
    ``factors``: of the weight decay in each step; None: 1.
    ``options``: arguments of the class."""
    spec = declare_model(model).blocks[0]
    ours = init(spec, model.dims(), 0, ONE, F64)
    theirs = {path: w.clone().requires_grad_() for path, w in leaves(ours)}
    groups = {True: [], False: []}
    for path, w in theirs.items():
        groups[path.rpartition(".")[2].startswith("w_")].append(w)
    decays = [
        {"params": groups[True], "weight_decay": 0.3},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    theirs_step = reference(decays, **options)
    state = init_state(optimizer, spec, ours)
    for step in range(5):
        lr = 0.1 / (step + 1)
        grads = tree_map(lambda w, step=step: normal(*w.shape, seed=step).detach(), ours)
        for w, g in zip(theirs.values(), flat(grads), strict=True):
            w.grad = 0.7 * g
        for group in theirs_step.param_groups:
            group["lr"] = lr
        theirs_step.param_groups[0]["weight_decay"] = 0.3 * (factors[step] or 1.0)
        theirs_step.step()
        scalars = UpdateScalars(lr, 0.7, decay=factors[step])
        ours, state = apply_update(optimizer, spec, ours, grads, state, scalars, ONE)
        close(flat(ours), [w.detach() for w in theirs.values()], 1e-12)


def assert_steps_of_torch_in_groups(
    optimizer, model: ModelConfig, options_of: Callable[[str], dict[str, float]], compile: bool
) -> None:
    """Assert that three steps of the model are those of torch.optim.AdamW with a parameter group
    for each weight.

    ``options_of``: returns the group of a path: ``rate``, ``weight_decay`` and ``beta2``."""
    spec = declare_model(model)
    ours = init(spec, model.dims(), 0, ONE, F64)
    theirs, parts = {path: w.clone().requires_grad_() for path, w in leaves(ours)}, []
    for path, w in theirs.items():
        o = options_of(path)
        betas = (0.9, o["beta2"])
        parts.append({"params": [w], "betas": betas, "weight_decay": o["weight_decay"], "of": o})
    torchs = torch.optim.AdamW(parts, eps=1e-8)
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    state = init_state(optimizer, spec, ours)
    for step in range(3):
        lr = 0.1 / (step + 1)
        grads = tree_map(lambda w, step=step: normal(*w.shape, seed=step).detach(), ours)
        for w, g in zip(theirs.values(), flat(grads), strict=True):
            w.grad = 0.7 * g
        for group in torchs.param_groups:
            group["lr"] = lr * group["of"]["rate"]
        torchs.step()
        ours, state = apply_update(optimizer, spec, ours, grads, state, UpdateScalars(lr, 0.7), ONE)
        close(flat(ours), [w.detach() for w in theirs.values()], 1e-12)
