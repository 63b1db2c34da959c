"""Lab 0: a transformer on one device. The student's counts are compared with the declared weights,
with the FLOPs that dtron reports, and with the matmuls of a real forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.transformer import declare_model, predict
from dtron.params import init


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, which the student's functions take by name."""

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False

    def model(self) -> ModelConfig:
        return ModelConfig(**vars(self), vocab_multiple=1)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())


VISIBLE = (
    Sizes(2, 16, 4, 4, 4, 40, 50),
    Sizes(3, 16, 4, 2, 8, 40, 50),
    Sizes(2, 32, 4, 1, 8, 64, 70, tied=True),
)
HIDDEN = (
    Sizes(1, 24, 6, 3, 16, 56, 31),
    Sizes(32, 4096, 32, 8, 128, 14336, 128256),
    Sizes(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
)
SEQ_LENS = (8, 4096)


def pieces(s: Sizes) -> Mapping[str, int]:
    """The parameters that are easily forgotten, counted double, or counted wrongly."""
    return {
        "the head": s.vocab * s.embed,
        "the gate of every feed-forward layer": s.layers * s.embed * s.mlp,
        "the two norms of every block": 2 * s.layers * s.embed,
        "the last norm": s.embed,
        "the difference of heads and kv_heads in w_k and w_v": (
            2 * s.layers * s.embed * (s.heads - s.kv_heads) * s.head_dim
        ),
        "w_o of every block": s.layers * s.embed * s.heads * s.head_dim,
    }


def parameters(cases: Sequence[Sizes]) -> Callable[[ModuleType], None]:
    """Make a check of ``parameters``."""

    def check(module: ModuleType) -> None:
        count = answer(module, "parameters")
        for s in cases:
            got, want = count(**vars(s)), parameter_count(s.model())
            if got != want:
                line = f"{s}: the model has {want} parameters, and you say {got}"
                why = _which_pieces(pieces(s), abs(got - want))
                more = "too many" if got > want else "too few"
                raise Wrong(f"{line}; {more} by {' and '.join(why)}" if why else line)

    return check


def _which_pieces(found: Mapping[str, int], n: int) -> tuple[str, ...]:
    """Return the fewest pieces that have n parameters in all, of at most three."""
    for size in (1, 2, 3):
        for names in combinations([name for name, m in found.items() if m], size):
            if sum(found[name] for name in names) == n:
                return names
    return ()


def flops(cases: Sequence[Sizes]) -> Callable[[ModuleType], None]:
    """Make a check of ``flops_per_token``."""

    def check(module: ModuleType) -> None:
        count = answer(module, "flops_per_token")
        for s in cases:
            for seq_len in SEQ_LENS:
                m = s.model()
                got, want = count(**vars(s), seq_len=seq_len), flops_per_token(m, seq_len)
                if abs(got - want) > 1e-9 * want:
                    what = f"{s}, seq_len={seq_len}: a token takes {want:.0f} FLOPs, and you say"
                    raise Wrong(f"{what} {got:.0f}{_why(s, seq_len, got, want)}")

    return check


def _why(s: Sizes, seq_len: int, got: float, want: float) -> str:
    attention = 6.0 * s.layers * s.heads * s.head_dim * seq_len
    reasons = {
        "the embedding is looked up, not multiplied": want + 6 * s.vocab * s.embed,
        "under a causal mask a token sees half of the sequence": want + attention,
        "attention itself is missing": want - attention,
        "the head is a matmul, also if it is tied": want - 6 * s.vocab * s.embed,
        "the scales of norms count, too": want - 6 * (2 * s.layers + 1) * s.embed,
        "attention works on heads * head_dim, not on embed": (
            want - attention + 6.0 * s.layers * s.embed * seq_len
        ),
        "forward alone; a backward takes twice as much again": want / 3,
        "a multiplication and an addition are two FLOPs": want / 2,
        "half of attention is missing: it is in every block, and has two matmuls": (
            want - attention / 2
        ),
    }
    why = [text for text, value in reasons.items() if abs(got - value) <= 1e-9 * want]
    return f"; {why[0]}" if why else ""


class _Matmuls(TorchDispatchMode):
    """Records ``(rows, summed, columns)`` of every matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.found.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def matmuls(cases: Sequence[Sizes]) -> Callable[[ModuleType], None]:
    """Make a check of ``matmuls``: those of the first block of a real forward."""

    def check(module: ModuleType) -> None:
        predicted = answer(module, "matmuls")
        rows, seq_len = 3, 8
        for s in cases:
            m = s.model()
            params = init(declare_model(m), m.dims(), 0, Layout())
            batch = make_batch(torch.zeros(rows, seq_len + 1, dtype=torch.long), Layout())
            with torch.no_grad(), _Matmuls() as recorded:
                predict(params, batch, m, Layout())
            sizes = {k: v for k, v in vars(s).items() if k not in ("layers", "vocab", "tied")}
            given = predicted(tokens=rows * seq_len, **sizes)
            for name, got, want in zip(NAMES, [*given, *[None] * 7], recorded.found, strict=False):
                if got is None or tuple(got) != want:
                    raise Wrong(
                        f"{s}, {rows * seq_len} tokens: the matmul with {name} is {want} (rows, "
                        f"summed, columns), and you say {got}"
                    )
            if len(given) > len(NAMES):
                raise Wrong(f"a block has {len(NAMES)} matmuls with weights, not {len(given)}")

    return check


NAMES = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")

LAB = Lab(
    0,
    "one_device",
    (
        Part("matmuls", 3, matmuls(VISIBLE)),
        Part("parameters", 3, parameters(VISIBLE)),
        Part("flops_per_token", 3, flops(VISIBLE)),
        Part("parameters, other models", 1, parameters(HIDDEN), hidden=True),
        Part("flops_per_token, other models", 2, flops(HIDDEN), hidden=True),
    ),
)
