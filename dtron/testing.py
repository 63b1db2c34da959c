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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, shard_like
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.errors import PlacementError
from dtron.mesh import Layout
from dtron.params import WeightSpec, declare, draw, unshard
from dtron.rules import rules_for
from dtron.tools.compare_steps import relative_error
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from dtron.tools.poisoned_memory import poisoned_memory as poisoned_memory  # for tests
from dtron.training.gradients import EagerWeights
from dtron.tree import flat, leaves, tree_map, unflatten

Axes = tuple[str | None, ...]
Mutate = Callable[[Layout], Layout]


def meshes(
    max_ranks: int = 8, axes: tuple[str, ...] = ("dp_replicate", "dp", "tp")
) -> st.SearchStrategy[str]:
    """Draw mesh texts of 2 to ``max_ranks`` ranks over these axes; some sizes are prime."""

    def shape(sizes: tuple[int, ...]) -> MeshShape:
        return MeshShape(**dict(zip(axes, sizes, strict=True)))

    sizes = st.tuples(*(st.sampled_from([1, 1, 2, 3, 4]) for _ in axes))
    return sizes.map(shape).filter(lambda s: 2 <= s.size <= max_ranks).map(str)


def zero_stages() -> st.SearchStrategy[int]:
    """Draw a ZeRO stage."""
    return st.sampled_from([0, 1, 2, 3])


@dataclass(frozen=True)
class Outcome:
    """The results of a layer: unsharded tensors by name, and the collectives of its forward and of
    its whole run."""

    tensors: dict[str, Tensor]
    forward: CollectiveCounter
    total: CollectiveCounter


@dataclass(frozen=True)
class LayerCase:
    """A layer with its sizes and inputs.

    ``fn``: the layer, called as ``fn(params, *inputs, layout)``.
    ``params``: the class of its weights.
    ``dims``: sizes and flags for the declaration of the weights.
    ``inputs``: the logical axes of each input. The axis sizes are ``tokens`` and the sizes in
        ``dims``. None: one input ``x``, the residual stream.
    ``out``: the logical axes of the output, which must have their placements; None: the axes of the
        first input.
    ``zero``: the ZeRO stage.
    ``make``: for some inputs, a function from a generator to the value. Other values are normal."""

    fn: Callable[..., Tensor]
    params: type
    dims: Mapping[str, Any]
    inputs: Mapping[str, Axes] | None = None
    out: Axes | None = None
    tokens: int = 24
    zero: int = 1
    seed: int = 0
    make: Mapping[str, Callable[[torch.Generator], Tensor]] | None = None

    @property
    def axes(self) -> Mapping[str, Axes]:
        """The logical axes of each input."""
        return {"x": ("tokens_sp", "act_embed")} if self.inputs is None else self.inputs

    @property
    def out_axes(self) -> Axes:
        """The logical axes of the output."""
        return self.out or next(iter(self.axes.values()))

    def weights(self, spec: Any) -> Any:
        """Draw unsharded weights."""

        def drawn(w: WeightSpec) -> Tensor:
            return draw(w, self.dims, self.seed).double() + _jitter(w.path, w.shape, self.seed)

        return tree_map(drawn, spec)

    def values(self) -> dict[str, Tensor]:
        """Draw unsharded inputs."""
        sizes = {**self.dims, "tokens": self.tokens, "tokens_sp": self.tokens}
        made = {}
        for name, axes in self.axes.items():
            make, generator = (self.make or {}).get(name), _generator(self.seed, name)
            made[name] = make(generator) if make else _normal(_shape(axes, sizes), generator)
        return made


def unchanged(layout: Layout) -> Layout:
    """Return the layout itself: no mutant."""
    return layout


def run_layer(case: LayerCase, mesh: str, mutate: Mutate = unchanged) -> Outcome:
    """Run a layer forward and backward in float64.

    ``mesh``: the simulated mesh; ``"dp=1"`` is one device.
    ``mutate``: makes a mutant of the layout."""
    spec = declare(case.params, case.dims)
    whole, values = case.weights(spec), case.values()
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout = mutate(Layout(device_mesh, rules_for(case.zero)))
        placed = tree_map(partial(_placed, layout), whole, spec)
        weights = tree_map(_trained, placed if case.zero == 3 else unshard(placed, layout))
        xs = [layout.shard(values[name], *axes) for name, axes in case.axes.items()]
        xs = [_trained(x) if x.is_floating_point() else x for x in xs]
        wanted = [x for x in xs if x.requires_grad]
        with CollectiveCounter(device_mesh) as total:
            with no_hidden_communication(), CollectiveCounter(device_mesh) as forward:
                y = case.fn(unshard(weights, layout), *xs, layout)
            if device_mesh is not None:
                lies, declared = cast(DTensor, y).placements, layout.placements(*case.out_axes)
                assert lies == declared, (
                    f"mesh {mesh}: the output has placements {lies}, not {declared}"
                )
            with paused():  # every rank must draw the same values
                direction = _normal(y.shape, _generator(case.seed, "out"))
            direction = shard_like(direction, y)
            grads = torch.autograd.grad(y, [*flat(weights), *wanted], direction)
            n = len(grads) - len(wanted)
            reduced = EagerWeights(layout).reduce(None, list(grads[:n]), flat(placed), False)
        tensors = {"output": _whole("output", mesh, y.detach())}
        for path, g in leaves(unflatten(weights, reduced)):
            tensors[f"gradient of {path}"] = _whole(f"gradient of {path}", mesh, g)
        names = [name for name, x in zip(case.axes, xs, strict=True) if x.requires_grad]
        for name, g in zip(names, grads[n:], strict=True):
            tensors[f"gradient of input {name}"] = _whole(f"gradient of input {name}", mesh, g)
    return Outcome(tensors, forward, total)


def _whole(name: str, mesh: str, x: Tensor) -> Tensor:
    try:
        return full(x)
    except AssertionError as error:
        raise AssertionError(f"mesh {mesh}: {name}: {error}") from error


def _placed(layout: Layout, x: Tensor, w: WeightSpec) -> Tensor:
    return layout.shard(x, *w.axes)


def _trained(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def assert_equivalent(
    fn: Callable[..., Tensor],
    params: type,
    mesh: str,
    dims: Mapping[str, Any],
    tolerance: float = 1e-9,
    mutate: Mutate = unchanged,
    **options: Any,
) -> Outcome:
    """Compare ``fn`` on the mesh with ``fn`` on one device. Raises AssertionError if the output or
    a gradient differs by more than ``tolerance``; the error names the first tensor that differs.
    Returns the mesh's Outcome.

    ``mutate``: makes a mutant of the mesh's layout.
    ``options``: the other fields of ``LayerCase``."""
    case = LayerCase(fn, params, dims, **options)
    want = run_layer(case, "dp=1")
    got = run_layer(case, mesh, mutate)
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

    def mutate(layout: Layout) -> Layout:
        return _Dropped(layout.mesh, layout.rules, layout.compute, layout.reduce, number, [0])

    return mutate


def unsummed(layout: Layout) -> Layout:
    """Return a mutant whose local regions ignore that the gradient of a replicated input is a sum
    over ranks."""
    return _Unsummed(layout.mesh, layout.rules, layout.compute, layout.reduce)


@dataclass(frozen=True)
class _Dropped(Layout):
    number: int = 0
    calls: list[int] = field(default_factory=lambda: [0])

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        self.calls[0] += 1
        return x if self.calls[0] - 1 == self.number else super().constrain(x, *axes)


class _Unsummed(Layout):
    def input_gradients(
        self, placements: Sequence[tuple[Placement, ...] | None]
    ) -> list[Sequence[Placement] | None]:
        return [p and list(p) for p in placements]


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()))


def _shape(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[a.removeprefix("act_")] for a in axes if a is not None)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float64).normal_(generator=generator)


def _jitter(path: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise that moves weights away from their initial zeros and ones, which hide
    mistakes."""
    return 0.1 * _normal(shape, _generator(seed, path))
