"""The compiled way to run the same functions.

A stage is compiled whole, forward and backward, once per shape: ``fullgraph``, so nothing in it goes back to
Python. Eager, a block is some thirty kernels that each read and write every activation; compiled, what stands
between two matrix products is one. Of DTensor nothing is left in the result: the tracer sees through it, and
what runs is kernels and collectives on local tensors.

Compiled functions make all gradients in one call, so ``I`` and ``W`` of the zero-bubble schedules are not
split (see schedules/split.py)."""

from __future__ import annotations

from dataclasses import replace

import torch

from dtron.optim import Rule, adamw, written_out
from dtron.schedules.run import Program


def compiled(functions: Program, backend: str = "inductor") -> Program:
    """The same program with its stage function compiled."""
    stage = torch.compile(functions.stage, fullgraph=True, dynamic=False, backend=backend)
    return replace(functions, stage=stage, splits=False)


def compiled_rule(backend: str = "inductor") -> Rule:
    """AdamW's update, compiled: see ``optim.written_out``. Once per shape, and a transformer has a dozen.
    (On an H200, bench-1.3b: with all weights in one graph the first step took 160 s instead of 70, and ran no
    faster; with one graph for any shape every step took 5 ms more.)"""
    each = torch.compile(adamw, fullgraph=True, dynamic=False, backend=backend)

    def rule(*args) -> None:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            written_out(*args, each=each)

    return rule


SHAPES = 64  # that AdamW may be compiled for; torch gives up after 8, to notice functions that never settle
