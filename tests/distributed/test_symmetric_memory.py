"""Which groups of ranks have copy engines, and which copies a wait covers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import dtron.distributed.symmetric_memory
import dtron.training.compiled_stage
from dtron.distributed.copy_engine import CopyStream
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.symmetric_memory import backends
from dtron.rules import zero_axes

pytestmark = pytest.mark.xdist_group("pool")


class Stream:
    """A stream that logs its waits. An event is the number of copies issued before it."""

    copies = 0

    def __init__(self, **_):
        self.waits = []

    def wait_event(self, event):
        self.waits.append(event.copies)

    def wait_stream(self, other):
        pass


class Event:
    def record(self):
        self.copies = Stream.copies


@given(st.lists(st.one_of(st.just("ask"), st.integers(0, 5)), max_size=60))
def test_a_wait_is_for_the_copy_and_never_for_what_was_just_asked_for(plan):
    """Draws are "ask", which issues a copy, or a number n, which waits for the n-th copy before the
    last."""
    main, Stream.copies, asked, before = Stream(), 0, [], 0
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in (
            ("Stream", Stream),
            ("Event", Event),
            ("current_stream", lambda: main),
            ("stream", nullcontext),
        ):
            patch.setattr(torch.cuda, name, fake)
        beside = CopyStream("cuda")
        for step in plan:
            if step == "ask":
                asked.append(beside.do(lambda: setattr(Stream, "copies", Stream.copies + 1)))
            elif step < len(asked):
                mine, waited = len(asked) - step, max(main.waits, default=0)
                asked[mine - 1]()
                assert max(main.waits) == (waited if waited >= mine else max(mine, before))
                before = len(asked)
        assert main.waits == sorted({*main.waits})  # no wait that another wait covers


def test_memory_that_cannot_be_shared_is_one_clear_line(monkeypatch):
    import torch.distributed._symmetric_memory as symmetric

    def fails(memory, group):
        raise RuntimeError("pidfd_getfd: Operation not permitted\nException raised from ...")

    monkeypatch.setattr(symmetric, "rendezvous", fails)
    with pytest.raises(ValueError, match=r"not permitted\); use --copy-engines off$"):
        dtron.distributed.symmetric_memory._rendezvous(torch.empty(0), "1.copies")


def test_nothing_is_carried_where_there_is_no_mesh():
    """As in a pipeline with one rank per stage."""
    assert not dtron.distributed.symmetric_memory.copy_engine_groups(None)


def test_one_host_and_gpus_that_reach_each_other_or_nothing(monkeypatch):
    monkeypatch.setattr(
        dtron.distributed.symmetric_memory, "_gpus_access_each_other", lambda count: True
    )
    monkeypatch.setattr(dist.Backend, "COPIES", "copies", raising=False)
    axes = lambda shape: zero_axes(tuple(shape.atoms))
    found = lambda mesh: set(backends(s := MeshShape.parse(mesh), "cuda", axes(s)) or ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (
        found("dp=8") == {"dp"}
        and found("dp=4,cp=2") == {"dp", "cp"}
        and found("dp=2,tp=4") == {"dp"}
    )
    assert found("pp=2,dp=4") == {"dp"} and found("tp=8") == set() and found("") == set()
    assert found("dp=16") == set() and found("dp=4,cp=4") == {"cp"} and found("dp=4,tp=4") == set()
    assert backends(MeshShape.parse("dp=8"), "cpu", ["dp"]) is None
    monkeypatch.setattr(
        dtron.distributed.symmetric_memory, "_gpus_access_each_other", lambda count: False
    )
    assert found("dp=8") == set()
