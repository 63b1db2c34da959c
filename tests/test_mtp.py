"""Multi-token prediction: what is predicted from what, and the same on every mesh."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_equivalence import assert_same_step as assert_same_step_here
from test_equivalence import model_config

from dtron.layers.mla import Latent
from dtron.mtp import Ahead
from dtron.shape import MeshShape
from dtron.testing import meshes, zero_stages

LATENT = Latent(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)


@settings(max_examples=12)
@given(
    mesh=meshes(), zero=zero_stages(), depth=st.sampled_from([1, 2]), tied=st.booleans(), mla=st.booleans(),
    learned=st.booleans(), recompute=st.sampled_from(["none", "selective", "full"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_step_is_that_of_one_device(mesh, zero, depth, tied, mla, learned, recompute, seed):
    config = model_config(
        mesh, 1, zero=zero, batch=4 * MeshShape.parse(mesh).data, micro_batch=2, tied=tied, seed=seed,
        mla=LATENT if mla else Latent(), positions="learned" if learned and not mla else "rotary",
        recompute=recompute, mtp=Ahead(depth, 0.7),
    )  # fmt: skip
    assert_same_step_here(config)
