"""The promise as a library: prove that a layer computes the same on every mesh.

    @given(mesh=meshes(), zero=zero_stages())
    def test_my_layer(mesh, zero):
        assert_equivalent(my_layer, MyParams, mesh, {"embed": 16, "mlp": 24}, zero=zero)

``assert_equivalent`` draws weights and inputs in float64, runs the function on one device and on
simulated ranks, and compares the output, the gradient of every weight and the gradient of every
input. The forward runs under the guard against hidden communication. What it can't see is a mistake
that one device makes too.

A check that cannot fail proves nothing, so mutant layouts break one thing on purpose (``dropped``,
``unsummed``), and ``assert_caught`` demands that the comparison notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, shard_like
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.errors import PlacementError
from dtron.mesh import Layout
from dtron.params import declare, draw, flat, gather, leaves, tree_map, unflatten
from dtron.rules import rules_for
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from dtron.tools.verify import relative_error
from dtron.training.gradients import EagerWeights

Axes = tuple[str | None, ...]
Mutate = Callable[[Layout], Layout]


def meshes(
    max_ranks: int = 8, axes: tuple[str, ...] = ("dp_replicate", "dp", "tp")
) -> st.SearchStrategy[str]:
    """Mesh texts of 2 to ``max_ranks`` ranks over these axes, prime sizes among them."""
    sizes = st.tuples(*(st.sampled_from([1, 1, 2, 3, 4]) for _ in axes))
    shapes = sizes.map(lambda ns: MeshShape(**dict(zip(axes, ns, strict=True))))
    return shapes.filter(lambda s: 2 <= s.size <= max_ranks).map(str)


def zero_stages() -> st.SearchStrategy[int]:
    return st.sampled_from([0, 1, 2, 3])


@dataclass(frozen=True)
class Outcome:
    """What a layer did: whole tensors, by name; and what its forward and its whole run
    communicated."""

    tensors: dict[str, Tensor]
    forward: CollectiveCounter
    total: CollectiveCounter


def run_layer(
    fn: Callable[..., Tensor],
    params: type,
    mesh: str,
    dims: Mapping[str, Any],
    inputs: Mapping[str, Axes] | None = None,
    out: Axes | None = None,
    tokens: int = 24,
    zero: int = 1,
    seed: int = 0,
    mutate: Mutate = lambda layout: layout,
    make: Mapping[str, Callable[[torch.Generator], Tensor]] | None = None,
) -> Outcome:
    """Run ``fn(params, *inputs, layout)`` forward and backward, in float64 on the simulated
    ``mesh`` (``"dp=1"`` is one device). ``inputs`` gives the logical axes of each; sizes are
    ``tokens`` and those in ``dims``, values normal unless ``make`` has a function of a generator
    for the name. The output must lie as ``out`` says (None: as the first input)."""
    inputs = {"x": ("tokens_sp", "act_embed")} if inputs is None else inputs
    sizes = {**dims, "tokens": tokens, "tokens_sp": tokens}
    spec = declare(params, dims)
    whole = tree_map(lambda w: draw(w, dims, seed).double() + _jitter(w.path, w.shape, seed), spec)
    values = {
        name: (make or {}).get(name, lambda g, axes=axes: _normal(axes, sizes, g))(
            _generator(seed, name)
        )
        for name, axes in inputs.items()
    }
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout = mutate(Layout(device_mesh, rules_for(zero)))
        placed = tree_map(lambda w, s: layout.shard(w, *s.axes), whole, spec)
        weights = tree_map(
            lambda w: w.detach().requires_grad_(), placed if zero == 3 else gather(placed, layout)
        )
        xs = [layout.shard(values[name], *axes) for name, axes in inputs.items()]
        xs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in xs]
        wanted = [x for x in xs if x.requires_grad]
        with CollectiveCounter(device_mesh) as total:
            with no_hidden_communication(), CollectiveCounter(device_mesh) as forward:
                y = fn(gather(weights, layout), *xs, layout)
            if device_mesh is not None:
                lies, should = (
                    y.placements,
                    layout.placements(*(out or next(iter(inputs.values())))),
                )
                assert lies == should, f"mesh {mesh}: the output lies {lies}, not {should}"
            with paused():  # every rank must draw the same
                direction = _normal((), {}, _generator(seed, "out"), y.shape)
            direction = shard_like(direction, y)
            grads = torch.autograd.grad(y, [*flat(weights), *wanted], direction)
            n = len(grads) - len(wanted)
            reduced = unflatten(
                weights, EagerWeights(layout).reduce(None, list(grads[:n]), flat(placed), False)
            )
        tensors = {"output": full(y.detach())}
        tensors |= {f"gradient of {path}": full(g) for path, g in leaves(reduced)}
        names = [name for name, x in zip(inputs, xs, strict=True) if x.requires_grad]
        tensors |= {
            f"gradient of input {name}": full(g) for name, g in zip(names, grads[n:], strict=True)
        }
    return Outcome(tensors, forward, total)


def assert_equivalent(
    fn: Callable[..., Tensor],
    params: type,
    mesh: str,
    dims: Mapping[str, Any],
    tolerance: float = 1e-9,
    mutate: Mutate = lambda layout: layout,
    **options: Any,
) -> Outcome:
    """Raise AssertionError, naming the first tensor that differs, unless ``fn`` on the mesh gives
    the output and all gradients of one device to ``tolerance``. Options are those of ``run_layer``;
    returns the mesh's Outcome."""
    want = run_layer(fn, params, "dp=1", dims, **options)
    got = run_layer(fn, params, mesh, dims, mutate=mutate, **options)
    floor = 1e-6 * max(t.abs().max().item() for t in want.tensors.values())
    for name, tensor in want.tensors.items():
        error = relative_error(got.tensors[name], tensor, floor)
        assert error <= tolerance, (
            f"mesh {mesh}: {name} differs from one device by {error:.1e} (> {tolerance:.0e})"
        )
    return got


def assert_caught(check: Callable[[], Any]) -> None:
    """Demand that a check on a mutant fails: by its own assertion, or because DTensor or a local
    region gets a tensor that lies elsewhere than it must. Any other error is one of the check
    itself."""
    try:
        check()
    except (AssertionError, RuntimeError, PlacementError):
        return
    raise AssertionError("the mutant went unnoticed: the check cannot fail here")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel allocates holds NaN (integers: the largest) until the kernel writes it.
    So a read of an unwritten row shows as NaN, where fresh memory often holds zeros and hides the
    read."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def dropped(number: int) -> Mutate:
    """A mutant whose ``number``-th constrain does nothing."""
    return lambda layout: _Dropped(
        layout.mesh, layout.rules, layout.compute, layout.reduce, number, [0]
    )


def unsummed(layout: Layout) -> Layout:
    """A mutant whose local regions forget that the gradient of a whole input is a sum over
    ranks."""
    return _Unsummed(layout.mesh, layout.rules, layout.compute, layout.reduce)


@dataclass(frozen=True)
class _Dropped(Layout):
    number: int = 0
    calls: list[int] | None = None

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        self.calls[0] += 1
        return x if self.calls[0] - 1 == self.number else super().constrain(x, *axes)


class _Unsummed(Layout):
    def input_gradients(self, placements):
        return [p and list(p) for p in placements]


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()))


def _normal(
    axes: Axes, sizes: Mapping[str, int], generator: torch.Generator, shape: tuple | None = None
) -> Tensor:
    shape = shape or tuple(sizes[a.removeprefix("act_")] for a in axes if a is not None)
    return torch.empty(tuple(shape), dtype=torch.float64).normal_(generator=generator)


def _jitter(path: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Weights away from their initial zeros and ones, where mistakes hide."""
    return 0.1 * _normal((), {}, _generator(seed, path), shape)
