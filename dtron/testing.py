"""A test library: prove that a layer computes the same on every mesh.

    @given(mesh=meshes(), zero=zero_stages())
    def test_my_layer(mesh, zero):
        assert_equivalent(my_layer, MyParams, mesh, {"embed": 16, "mlp": 24}, zero=zero)

``assert_equivalent`` draws weights and inputs in float64. It runs the function on one device and on
simulated ranks. Then it compares the output, the gradient of every weight and the gradient of every
input. The forward runs under ``no_hidden_communication``. A mistake that one device makes too is
not detected.

A check that cannot fail proves nothing. So mutant layouts break one thing on purpose (``dropped``,
``unsummed``), and ``assert_caught`` requires that the comparison fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from dtron.tools.compare_steps import relative_error
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from dtron.tools.poisoned_memory import poisoned_memory as poisoned_memory  # for tests
from dtron.training.gradients import EagerWeights

Axes = tuple[str | None, ...]
Mutate = Callable[[Layout], Layout]


def meshes(
    max_ranks: int = 8, axes: tuple[str, ...] = ("dp_replicate", "dp", "tp")
) -> st.SearchStrategy[str]:
    """Draw mesh texts of 2 to ``max_ranks`` ranks over these axes; some sizes are prime."""
    sizes = st.tuples(*(st.sampled_from([1, 1, 2, 3, 4]) for _ in axes))
    shapes = sizes.map(lambda ns: MeshShape(**dict(zip(axes, ns, strict=True))))
    return shapes.filter(lambda s: 2 <= s.size <= max_ranks).map(str)


def zero_stages() -> st.SearchStrategy[int]:
    return st.sampled_from([0, 1, 2, 3])


@dataclass(frozen=True)
class Outcome:
    """The results of a layer: unsharded tensors by name, and the collectives of its forward and of
    its whole run."""

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
    """Run ``fn(params, *inputs, layout)`` forward and backward in float64.

    ``mesh``: the simulated mesh; ``"dp=1"`` is one device.
    ``inputs``: the logical axes of each input. The axis sizes are ``tokens`` and the sizes in
        ``dims``.
    ``out``: the logical axes of the output, which must have their placements; None: the axes of the
        first input.
    ``make``: for some inputs, a function from a generator to the value. Other values are normal.
    """
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
            with paused():  # every rank must draw the same values
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
    """Compare ``fn`` on the mesh with ``fn`` on one device. Raises AssertionError if the output or
    a gradient differs by more than ``tolerance``; the error names the first tensor that differs.
    Returns the mesh's Outcome. ``options`` are the options of ``run_layer``."""
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
    """Require that a check on a mutant fails. It may fail by its own assertion, or because DTensor
    or a local region gets a tensor with wrong placements. Any other error is a fault of the check
    itself and is raised."""
    try:
        check()
    except (AssertionError, RuntimeError, PlacementError):
        return
    raise AssertionError("the mutant went unnoticed: the check cannot fail here")


def dropped(number: int) -> Mutate:
    """Return a mutant whose ``number``-th constrain does nothing."""
    return lambda layout: _Dropped(
        layout.mesh, layout.rules, layout.compute, layout.reduce, number, [0]
    )


def unsummed(layout: Layout) -> Layout:
    """Return a mutant whose local regions ignore that the gradient of a replicated input is a sum
    over ranks."""
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
    """Return noise that moves weights away from their initial zeros and ones, which hide
    mistakes."""
    return 0.1 * _normal((), {}, _generator(seed, path), shape)
