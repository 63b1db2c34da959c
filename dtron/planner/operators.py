"""Operators of a step: what each one computes, reads and writes.

An operator is what one kernel does, or one message. A plan (rank_trace.py) collects the operators
of a rank in the order in which the rank launches them. step_time.py turns them into milliseconds.
FLOPs and bytes come from the shapes of the operator's own tensors. There is no formula of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from dtron.planner.operator_names import COLLECTIVES, IN_PLACE, MATMULS

Kind = Literal[
    "matmul", "attention", "elementwise", "collective", "wait", "message", "host", "mark"
]


@dataclass(frozen=True)
class Operator:
    """One kernel, or one message.

    ``name``: torch's name of the operator.
    ``flops``: floating-point operations, without those that a causal mask skips.
    ``read``, ``written``: bytes of its inputs and outputs in memory. For a collective ``written``
        is the size of the unsharded tensor on one rank.
    ``size``: of a matmul (batch, M, N, K); of attention (batch * heads, queries, keys, head dim).
    ``bits``: bits of one number of a matmul's inputs.
    ``layout``: of a matmul, for each input "n" if its rows are contiguous, or "t" if its columns
        are.
    ``access``: how a kernel without a library reads memory: "stream", "rows" (it has a reduction
        of each row), "columns" (a reduction over rows), "transposed", "gathered" (rows in any
        order), or "added" (into a sum of another dtype).
    ``group``: the process group of a collective.
    ``token``: a number that a collective and the wait for it share."""

    kind: Kind
    name: str
    flops: float = 0.0
    read: int = 0
    written: int = 0
    size: tuple[int, ...] = ()
    bits: int = 16
    layout: str = ""
    access: str = "stream"
    group: str = ""
    token: int = 0


def called(target: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Return the operator that a node calls, and its arguments. A recomputed operator that could
    draw random numbers is wrapped, to draw the same numbers again."""
    if "rng_state" not in name_of(target):
        return target, args
    place = next(i for i, x in enumerate(args) if hasattr(x, "overloadpacket"))
    return args[place], args[place + 1 :]


def name_of(target: Any) -> str:
    """Return the short name of the target of a graph's node: ``mm`` for ``aten.mm.default``."""
    if hasattr(target, "overloadpacket"):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def is_collective(target: Any) -> bool:
    namespace = getattr(target, "namespace", "")
    return namespace in ("_c10d_functional", "_dtensor") and name_of(target) in COLLECTIVES


def is_attention(name: str) -> bool:
    return "scaled_dot_product" in name or name.startswith("planned_attention")


def is_library(target: Any) -> bool:
    """Whether an operator is one kernel of a library, with which the compiler fuses nothing."""
    name = name_of(target)
    if name in MATMULS or is_attention(name) or is_collective(target) or name == "wait_tensor":
        return True
    return name in IN_PLACE or name in ("sort", "topk", "cumsum", "bincount")


def tensors_in(xs: Any) -> list[Tensor]:
    """Return the tensors of arguments, in order."""
    if isinstance(xs, Tensor):
        return [xs]
    if isinstance(xs, (list, tuple)):
        return [x for y in xs for x in tensors_in(y)]
    return []


def nbytes(x: Tensor) -> int:
    """The bytes of a tensor's numbers. A dim of stride 0 is stored once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod([int(n) for n, stride in sizes if stride or n == 0]) * x.element_size()


def library_operator(target: Any, args: Sequence[Any], result: Any, group: str = "") -> Operator:
    """Return the operator of a library's kernel.

    ``args``: its arguments, tensors as they are.
    ``result``: its result, a tensor or several."""
    name, given, made = name_of(target), tensors_in(args), tensors_in(result)
    read, written = sum(map(nbytes, given)), sum(map(nbytes, made))
    if is_collective(target):
        kind = COLLECTIVES[name]
        whole = written if kind == "all_gather" else read
        return Operator("collective", kind, 0.0, read, whole, group=group)
    if name in MATMULS:
        size = _matmul_size(name, given, made[0])
        bits = 8 * given[0].element_size()
        flops = 2.0 * math.prod(size)
        layout = "".join("n" if x.stride(-1) == 1 else "t" for x in _factors(name, given))
        return Operator("matmul", name, flops, read, written, size, bits, layout)
    if is_attention(name):
        backward = "backward" in name
        query, key, value = given[1:4] if backward else given[:3]
        batch = query.shape[0] * query.shape[1]
        pairs = args[-1] if name.startswith("planned") else query.shape[2] * key.shape[2]
        pairs = pairs / 2 if _argument(target, args, "is_causal") else pairs
        flops = 2.0 * batch * pairs * (query.shape[3] + value.shape[3])
        size = (batch, query.shape[2], key.shape[2], query.shape[3])
        name = "attention_backward" if backward else "attention_forward"
        return Operator("attention", name, flops * (2.5 if backward else 1), read, written, size)
    mixed = name in ("add_", "_foreach_add_") and len({x.dtype for x in given}) > 1
    access = "added" if mixed else "stream"
    return Operator("elementwise", name, 0.0, read, written, access=access)


def with_rows(op: Operator, rows: int) -> Operator:
    """Return the operator of experts' matmuls with the rows that the experts really get. Their
    buffer may have room for more."""
    if "grouped" not in op.name:
        return op
    batch, m, n, k = op.size
    size = (batch, min(m, rows), n, k)
    return replace(op, size=size, flops=2.0 * math.prod(size))


def _factors(name: str, given: Sequence[Tensor]) -> Sequence[Tensor]:
    return given[1:3] if name in ("addmm", "baddbmm") else given[:2]


def _matmul_size(name: str, given: Sequence[Tensor], out: Tensor) -> tuple[int, int, int, int]:
    a, b = _factors(name, given)
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    if "grouped" in name:  # the rows of all experts are M, also where they are summed over
        return (1, k, n, m) if out.ndim == 3 else (1, m, n, k)
    return (a.shape[0] if a.ndim == 3 else 1, m, n, k)


def _argument(target: Any, args: Sequence[Any], name: str) -> Any:
    """Return an argument of an operator by its name; None if it is not given."""
    names = [x.name for x in target._schema.arguments]
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None
