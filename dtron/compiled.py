"""The compiled way to run the same functions.

A stage is compiled whole, forward and backward, once per shape: ``fullgraph``, so nothing in it goes back to
Python. Eager, a block is some thirty kernels that each read and write every activation; compiled, what stands
between two matrix products is one. Of DTensor nothing is left in the result: the tracer sees through it, and
what runs is kernels and collectives on local tensors.

Compiled functions make all gradients in one call, so ``I`` and ``W`` of the zero-bubble schedules are not
split (see schedules/split.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from dtron.optim import Rule, adamw, written_out
from dtron.schedules.run import Program


def compiled(functions: Program, backend: str = "inductor") -> Program:
    """The same program with its stage function compiled."""
    stage = torch.compile(functions.stage, fullgraph=True, dynamic=False, backend=backend)
    return replace(functions, stage=stage, splits=False)


def compiled_rule(backend: str = "inductor") -> Rule:
    """AdamW's update, compiled: see ``optim.written_out``. Once for all sizes, which is seconds; all weights
    in one graph would be minutes, and no faster."""
    each = torch.compile(adamw, fullgraph=True, dynamic=True, backend=backend)
    return partial(written_out, each=each)
