"""The optimizer's state in host memory (Ren et al. 2021, arXiv:2101.06840).

A state is needed once a step, and the host has more memory than the device. So
``--optim.offload-state`` keeps the state in pinned host memory. The update takes the weights chunk
by chunk:

    copy in     chunk 1   chunk 2   chunk 3
    update                chunk 1   chunk 2   chunk 3
    copy out                        chunk 1   chunk 2   chunk 3

The copies have two streams of their own, so both directions of the bus and the kernels work at the
same time. The update runs on the device: it is the same arithmetic, and a CUDA graph records it
with its copies. The bus is slower than the device's memory by a factor of about 80, so the step
becomes longer by the time of the copies. The price per token is small where a step has many
microbatches.

``OffloadedState`` is an optimizer itself. It makes the state of another one, and updates with it.

Left out: an update on the host's CPUs, which would move gradients and weights over the bus instead;
copies that begin during the backward of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.copy_stream import CopyStream
from dtron.distributed.host_memory import empty_on_host
from dtron.distributed.redistribute import like, to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.optimizer import OptimizerState, WrappedOptimizer, init_each
from dtron.training.parameter_groups import part_of_trees
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map

CHUNK = 1 << 24  # elements of the weights of a chunk, over all ranks


class Chunk(NamedTuple):
    """The state of some weights on its way.

    ``trees``: params, gradients and state of the weights; the state is on the device.
    ``pairs``: each tensor of the state on the device, and on the host.
    ``wait``: waits for the end of a copy."""

    trees: tuple[Any, Any, Any, OptimizerState]
    pairs: list[tuple[Tensor, Tensor]]
    wait: Callable[[], None]


@dataclass(frozen=True)
class OffloadedState(WrappedOptimizer):
    """An optimizer with its state on the host."""

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        return init_each(spec, params, lambda w, x: _on_host(self.base.init((w,), (x,))))

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return 0

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        device = to_local(flat(params)[0]).device
        copy_in, copy_out = CopyStream(device.type), CopyStream(device.type)

        def fetched(members: Sequence[int]) -> Chunk:
            *trees, on_host = part_of_trees(members, spec, params, grads, state)
            pairs: list[tuple[Tensor, Tensor]] = []

            def device_buffer(x: Tensor) -> Tensor:
                host = to_local(x)
                pairs.append((torch.empty_like(host, device=device), host))
                return like(x, pairs[-1][0])

            on_host = replace(
                on_host, trees={n: tree_map(device_buffer, t) for n, t in on_host.trees.items()}
            )
            wait = copy_in.do(partial(_copy, [(host, x) for x, host in pairs]))
            w, p, g = trees
            return Chunk((w, p, g, on_host), pairs, wait)

        leaving: list[Chunk] = []
        chunks = _chunks(flat(spec))
        coming = fetched(chunks[0])
        for following in [*chunks[1:], None]:
            now = coming
            if following is not None:
                coming = fetched(following)
            now.wait()
            self.base.update(*now.trees, scalars, layout)
            wait = copy_out.do(partial(_copy, now.pairs))
            leaving.append(now._replace(wait=wait))
            if len(leaving) > 1:
                leaving.pop(0).wait()  # its memory on the device is free now
        leaving.pop().wait()
        return params, state


def _chunks(spec: Sequence[WeightSpec]) -> list[list[int]]:
    """Split the weights into chunks, the same on all ranks."""
    chunks: list[list[int]] = [[]]
    size = 0
    for i, w in enumerate(spec):
        if chunks[-1] and size + w.numel > CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += w.numel
    return chunks


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, target in pairs:
        target.copy_(source, non_blocking=True)


def on_device(tree: Any, device: torch.device | str) -> Any:
    """Return a tree of the state on a device. A tensor that is there already is not copied."""
    return tree_map(lambda x: like(x, to_local(x).to(device)), tree)


def _on_host(trees: dict[str, Any]) -> dict[str, Any]:
    def move(x: Tensor) -> Tensor:
        part = to_local(x)
        host = empty_on_host(part, *part.shape).copy_(part)
        return like(x, host) if isinstance(x, DTensor) else host

    return {name: tree_map(move, tree) for name, tree in trees.items()}
