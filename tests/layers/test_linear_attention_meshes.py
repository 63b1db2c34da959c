"""A model with linear attention trains on any mesh with the result of one device."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers import recurrent_mixer, state_passing
from dtron.layers.mamba2 import Mamba2Config
from dtron.layers.short_convolution import same_document
from dtron.layers.state_passing import Maps
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig
from dtron.runtime.config import DataConfig, RunConfig
from tests.layers.test_context_parallel import assert_same_step
from tests.layers.test_gated_delta_net import M

MAMBA = Mamba2Config(heads=4, head_dim=4, groups=1, state=3, chunk=3)
OLMO = {"delta": replace(M.delta, negative_eigenvalues=True), "post_norm_mixers": "A"}


def configured(mesh: str, pattern: str = "L", documents: bool = False, **choices) -> RunConfig:
    fields = {"mamba": MAMBA} | choices.pop("model", {})
    model = replace(M, pattern=pattern, layers=len(pattern), **fields)
    shape = MeshShape.parse(mesh)
    return RunConfig(
        mesh=mesh,
        model=model,
        batch=2 * shape.pp * shape.data,
        micro_batch=1,
        seed=3,
        data=DataConfig(seq_len=16, document_mask=documents),
        **choices,
    )


STEPS = [
    ("dp=3,tp=2", "LA", {"zero": 2, "documents": True}),
    ("cp=4", "L", {}),
    ("cp=2,tp=2", "L", {"zero": 3, "documents": True, "recompute": "full"}),
    ("dp=2,cp=2", "AL", {"zero": 3, "cp_method": "ulysses", "recompute": "offload"}),
    ("pp=2,cp=2", "LA", {"zero": 1, "recompute": "selective", "documents": True}),
    ("pp=2,tp=2", "LA", {"zero": 0, "model": OLMO}),
    ("cp=2,tp=2", "K", {"zero": 3, "documents": True, "recompute": "selective"}),
    ("dp=2,cp=2,tp=2", "S", {"zero": 3, "documents": True}),
    ("pp=2,tp=2", "SA", {"model": {"mamba": replace(MAMBA, groups=2)}, "recompute": "full"}),
    ("cp=2,ep=2", "L", {"model": {"moe": MoEConfig(4, 2, 8), "mtp": MTPConfig(1)}}),
]


@pytest.mark.parametrize(("mesh", "pattern", "choices"), STEPS)
def test_a_step_is_that_of_one_device(mesh, pattern, choices):
    assert_same_step(configured(mesh, pattern, **choices))


halo = recurrent_mixer.halo


def no_state(own: Maps, ranks) -> Tensor:
    return torch.zeros_like(own.offset)


def decayed_twice(own: Maps, ranks) -> Tensor:
    """Mutant: the state of earlier ranks passes this rank's map before it is used."""
    return own.transition @ earlier(own, ranks)


earlier = state_passing.state_of_earlier_ranks


def blind(documents_T: Tensor, *others: Tensor, **sizes) -> Tensor:
    """Mutant: on several ranks a token sees the preceding tokens of any document."""
    sees = same_document(documents_T, *others, **sizes)
    if sizes["parts"] == 1:
        return sees
    return torch.cat([sees[:, :2], torch.ones_like(sees[:, 2:])], dim=1)


def detached(own: Maps, ranks) -> Tensor:
    return earlier(own.each(Tensor.detach), ranks)


STATE, SEES = "state_passing.state_of_earlier_ranks", "short_convolution.same_document"
MUTANTS = {
    "the state is not passed": (STATE, no_state),
    "no gradient of the passed state": (STATE, detached),
    "a decay is applied twice": (STATE, decayed_twice),
    "the convolution sees other documents": (SEES, blind),
    "no halo": ("recurrent_mixer.halo", lambda *x: torch.zeros_like(halo(*x))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    place, mutant = MUTANTS[name]
    with mock.patch(f"dtron.layers.{place}", mutant), pytest.raises(AssertionError):
        assert_same_step(configured("cp=2", documents=True))
