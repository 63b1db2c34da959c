"""Simulated ranks compute the results of torch's own simulation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from dtron.distributed import simulated_ranks
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import by_rank, same_on_all, simulated
from dtron.testing import assert_caught

RANKS = 4


def ranks_of(shape: tuple[int, ...]) -> LocalTensor:
    """A tensor that differs on every rank."""
    n = torch.Size(shape).numel()
    return LocalTensor({r: torch.arange(n).view(shape) * 1.5 + 100 * r for r in range(RANKS)})


def views(x):
    y = x.view(2, 6)
    y[0].mul_(2)  # through a view of a view
    z = x.transpose(0, 1).narrow(0, 1, 2)
    z.add_(1)
    return x, y, z


def fake_shapes():
    """Shapes of tensors without values, as DTensor computes them."""
    with FakeTensorMode():
        y = torch.empty_strided((2, 3), (1, 2), device="cpu")
        z = (y @ torch.ones(3, 5)).add_(1)
        return tuple(y.stride()), tuple(z.shape), str(z.device)


OF_ALL = torch.arange(3.0)  # no tensor of ranks
OPERATIONS = {
    "views": views,
    "matmul": lambda x: x @ x.mT,
    "list": lambda x: torch.cat([x, x[:1]]),
    "split": lambda x: x.split(2),
    "several results": lambda x: x.max(1),
    "dtype": lambda x: x.sum(0, dtype=torch.float64),
    "in place": lambda x: x.add_(x[0].clone()),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "sizes": lambda x: (x.shape, x.stride(), x.storage_offset(), x[1:].storage_offset(), x.dim()),
    "random": lambda x: torch.manual_seed(3) and torch.rand_like(x) + x,
    "new": lambda x: x + torch.arange(3),
    "by name": lambda x: (x.sum(0, keepdim=True), torch.full_like(x, 2, dtype=torch.int32)),
    "written by index": lambda x: x.scatter_add_(0, (x > 150).long(), x.clone()),
    "copied": lambda x: (torch.zeros_like(x).copy_(x), x.fill_(3), x.zero_()),
    "turned in place": lambda x: x.t_() * 2,
    "plain": lambda x: (OF_ALL + x, str(OF_ALL * 2), str(OF_ALL.clone().add_(1))),
    "offsets that differ": lambda x: (
        y := LocalTensor({r: x._local_tensors[r][r:][:1] for r in range(RANKS)}),
        str(y.storage_offset()),
        y * 2,
    ),
    "fake": lambda x: fake_shapes(),
    "conjugate": lambda x: (x * 1j).conj(),
    "strides": lambda x: (x.mT * 2, x.mT.contiguous().stride(), (x.mT * 2).stride()),
    "sizes that differ": lambda x: (
        y := LocalTensor({r: x._local_tensors[r][: r + 1] for r in range(RANKS)}) * 2,
        y.sum(1),
        str(y.shape),
        str(y.T.stride()),
        torch.ones(y.shape[0], 2),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_short_way_gives_what_the_long_one_does(name):
    same_as_torch(name)


def test_a_wrapper_with_the_value_of_one_rank_is_noticed(monkeypatch):
    wrap = simulated_ranks._wrap_same_shapes
    first = lambda results: wrap(dict.fromkeys(results, results[0]))
    monkeypatch.setattr(simulated_ranks, "_wrap_same_shapes", first)
    for name in ("matmul", "sizes that differ"):
        assert_caught(lambda name=name: same_as_torch(name))


def test_an_argument_with_the_value_of_one_rank_is_noticed(monkeypatch):
    column = simulated_ranks._column
    first = lambda x, ranks: [column(x, ranks)[0]] * len(ranks)
    monkeypatch.setattr(simulated_ranks, "_column", first)
    for name in ("matmul", "list", "copied", "plain", "sizes that differ"):
        assert_caught(lambda name=name: same_as_torch(name))


def test_ranks_share_a_fake_tensor():
    with simulated(MeshShape(dp=RANKS)), FakeTensorMode():
        assert type(torch.ones(3) * 2) is FakeTensor


def same_as_torch(name: str) -> None:
    want, got = [], []
    for found, mode in (
        (want, LocalTensorMode(RANKS)),
        (got, simulated(MeshShape(dp=RANKS))),
    ):
        x = ranks_of((4, 3))  # in the mode its values would be tensors of all ranks
        with mode:
            result = OPERATIONS[name](x)
            for y in result if isinstance(result, (list, tuple)) else [result]:
                found.append(
                    {r: t.clone() for r, t in by_rank(y, 0).items()}
                    if isinstance(y, torch.Tensor)
                    else str(y)
                )
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        if isinstance(a, str):
            assert a == b
            continue
        assert a.keys() == b.keys() and len(a) == RANKS
        for r in a:
            torch.testing.assert_close(a[r], b[r], rtol=0, atol=0)


def test_gradients_pass_through_views():
    x = ranks_of((4, 3)).requires_grad_()
    with simulated(MeshShape(dp=RANKS)):
        (g,) = torch.autograd.grad((x.view(2, 6).transpose(0, 1).reshape(-1) ** 2).sum(), x)
        pairs = [(by_rank(g, 0)[r], by_rank(x.detach(), 0)[r]) for r in range(RANKS)]
    for a, b in pairs:
        torch.testing.assert_close(a, 2 * b)


def test_a_value_that_all_ranks_share_may_be_nan_and_may_not_differ():
    """A step that is not finite is reported. The simulation raises no error."""
    values = [torch.tensor([1.0, float("nan")]) for _ in range(RANKS)]
    got = same_on_all(LocalTensor(dict(enumerate(values))))
    torch.testing.assert_close(got, values[0], equal_nan=True)
    values[2] = torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError, match="differs by rank"):
        same_on_all(LocalTensor(dict(enumerate(values))))
