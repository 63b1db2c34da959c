"""Models and steps that are compared with one device."""

from __future__ import annotations

from dtron.distributed.mesh_shape import MeshShape
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.tools.compare_steps import StepResult, compare


def model_config(mesh: str, group: int, **choices) -> RunConfig:
    """A run of a model that fits this mesh.

    ``group``: queries to a key head.
    ``choices``: fields of the model or of the run."""
    shape = MeshShape.parse(mesh)
    kv = shape.tp
    layers = choices.pop("layers", 1)
    fields = {k: choices.pop(k) for k in list(choices) if k in ModelConfig.__dataclass_fields__}
    sizes = dict(vocab=29, embed=10, layers=layers, heads=kv * group, kv_heads=kv, head_dim=4)
    sizes |= dict(mlp=4 * shape.tp, vocab_multiple=1, context=24)
    model = ModelConfig(**sizes | fields)
    return RunConfig(mesh=mesh, model=model, data=DataConfig(seq_len=12), **choices)


def assert_same_result(want: StepResult, got: StepResult) -> None:
    """Loss, gradients and weights of two steps differ by at most 1e-9."""
    loss, rows = compare(want, got)
    assert loss <= 1e-9
    for row in rows:
        assert row.grad <= 1e-9 and row.weight <= 1e-9, row
