"""The reference solution of lab 8."""

import torch

from dtron.testing import poisoned_memory


def unit_roundoff(mantissa_bits):
    return 2.0 ** -(mantissa_bits + 1)


def stalls_at(mantissa_bits):
    return 2.0 ** (mantissa_bits + 1)


def sum_bound(terms, mantissa_bits, total):
    return (terms - 1) * unit_roundoff(mantissa_bits) * total


def running_sum(x_N, dtype):
    total = torch.zeros((), dtype=dtype)
    for x in x_N:
        total = total + x.to(dtype)
    return total.to(torch.bfloat16)


def mean_over_ranks(grads):
    total = sum(g.float() for g in grads)
    return (total / len(grads)).bfloat16()


def stochastic(x, random):
    bits = x.view(torch.int32) + random
    return (bits >> 16 << 16).view(torch.float32).bfloat16()


def scale(x, dim):
    most = x.abs().amax(dim, keepdim=True)
    return torch.where(most == 0, 1.0, 448 / most)


def cast(x):
    x = x.clamp(-448, 448)
    exponent = torch.frexp(x).exponent.clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return (x / step).round() * step


def product(a_MK, b_KN):
    scale_a, scale_b = scale(a_MK, 1), scale(b_KN, 0)
    return cast(a_MK * scale_a) @ cast(b_KN * scale_b) / (scale_a * scale_b)


def most(x, dim):
    return torch.maximum(x.abs() * unit_roundoff(3), 2.0**-10 / scale(x, dim))


def bound(a_MK, b_KN):
    error_a, error_b = most(a_MK, 1), most(b_KN, 0)
    return a_MK.abs() @ error_b + error_a @ b_KN.abs() + error_a @ error_b


def check_means(means):
    expert_T = torch.tensor([0, 2, 2, 0, 2, 4, 0])
    x_TD = torch.arange(14, dtype=torch.float64).view(7, 2).requires_grad_()
    g_ED = torch.arange(1, 11, dtype=torch.float64).view(5, 2)
    with poisoned_memory():
        y_ED = means(x_TD, expert_T, 5)
        (dx_TD,) = torch.autograd.grad(y_ED, x_TD, g_ED)
    for e in range(5):
        own = expert_T == e
        n = max(1, own.sum().item())
        torch.testing.assert_close(y_ED[e], x_TD[own].sum(0) / n)
        torch.testing.assert_close(dx_TD[own], (g_ED[e] / n).expand(own.sum(), 2))
