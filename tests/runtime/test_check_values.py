"""Values of flags that no run can have, flags without effect, and models that no machine holds."""

from __future__ import annotations

import pytest

from dtron.bounds import from_to
from dtron.distributed.mesh_shape import MeshShape
from dtron.model.activation_bytes import block_bytes, host_bytes
from dtron.model.activation_checkpoint import policy_for
from dtron.runtime import check_memory
from dtron.runtime.cli import parse
from dtron.runtime.launch import plan_run
from dtron.schedules import make
from dtron.tools.verify import main as verify
from tests.helpers.texts import one_line

LONG = "x" * 300


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.softcap", "nan"], ["model.softcap=nan", "positive"]),
        (["--model.z-loss", "inf"], ["z", "change it"]),
        (["--optim.lr", "nan"], ["lr"]),
        (["--seed", str(10**23)], [f"--seed {10**23}", "at most"]),
        (["--timeout-seconds", str(10**14)], ["--timeout-seconds", "at most"]),
        (["--recompute", "unload"], ["--recompute unload", "offload", "--recompute full"]),
        (["--recompute-budget", "0.5"], ["--recompute-budget 0.5", "budget and offload"]),
        (["--recompute", "offload", "--recompute-budget", "1.5"], ["1.5", "from 0 to 1"]),
        (["--recompute", "offload", "--recompute-budget", "nan"], ["nan", "from 0 to 1"]),
        (["--recompute", "budget"], ["--recompute budget", "--recompute-budget 0.5"]),
        (["--batch", str(10**12)], ["--batch", "at most"]),
        (["--data.path", ""], ["--data.path ''", "is empty"]),
        (["--data.tokenizer", " "], ["--data.tokenizer ' '", "is empty"]),
        (["--run-dir", ""], ["--run-dir ''"]),
        (["--compile-cache", ""], ["--compile-cache ''"]),
        (["--compile-cache", LONG], ["--compile-cache", "300 bytes"]),
        (["--data.path", LONG], ["--data.path", "300 bytes", "255"]),
        (["--data.path", f"0.5 a, 0.5 b/{LONG}"], ["--data.path", "300 bytes"]),
        (["--run-dir", f"runs/{LONG}"], ["--run-dir", "300 bytes"]),
        (["--init-from", ""], ["--init-from ''", "is empty"]),
        (["--data.path", "a\0b"], ["--data.path", "zero byte"]),
        (["--model.layers", str(10**7)], ["model.layers=10000000", "from 1 to 10000"]),
        (["--model.vocab", str(10**11)], ["model.vocab=100000000000"]),
        (["--model.mtp.depth", str(10**9)], ["model.mtp.depth=1000000000", "at most"]),
        (["--model.moe.experts", str(10**9)], ["model.moe.experts=1000000000", "at most"]),
    ],
)
def test_a_value_that_no_run_can_have(flags, said):
    one_line(lambda: parse(flags), *said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cp-method", "ulysses"], ["--cp-method", "a mesh without cp"]),
        (["--pipeline.schedule", "zb-v"], ["--pipeline.schedule", "a mesh without pp"]),
        (["--data.learn-next-document"], ["--data.learn-next-document", "--data.document-mask"]),
        (["--check-replicas-every", "9"], ["--check-replicas-every", "one process"]),
        (["--mesh", "dp=4097", "--batch", "4097"], ["4097 simulated ranks", "4096"]),
        (["--mesh", "dp=999999999"], ["999999999 ranks", "1048576"]),
        (["--batch", "100000", "--micro-batch", "1"], ["100000 microbatches", "--micro-batch"]),
        (
            ["--model.embed", "65536", "--model.mlp", "262144", "--model.layers", "500"],
            ["weights and optimizer state take", "GiB", "use a smaller model"],
        ),
    ],
)
def test_a_flag_without_effect_and_a_run_without_end(flags, said):
    mesh = [] if "--mesh" in flags else ["--mesh", "dp=1"]
    one_line(lambda: plan_run(parse(["--simulate", *mesh, *flags])), *said)


def test_a_flag_that_has_its_default_is_no_error():
    plan_run(parse(["--simulate", "--mesh", "dp=1", "--cp-method", "ring"]))


def test_memory_is_that_of_the_group_too(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(check_memory, "_GROUP_LIMIT", limit)
    config = parse(["--simulate", "--mesh", "dp=1"])
    for text, refused in (("max", False), ("1000000000000000", False), ("1000000", True)):
        limit.write_text(text + "\n")
        if refused:
            one_line(lambda: plan_run(config), "which has 0 GiB")
        else:
            plan_run(config)


def test_activations_that_the_host_cannot_hold(tmp_path, monkeypatch):
    """Of all ranks together. In a pipeline a rank has several microbatches in flight. The last
    block of a stage stays on the device."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(check_memory, "_GROUP_LIMIT", limit)
    flags = ["--simulate", "--model.layers", "3", "--model.context", "4096", "--batch", "64"]
    flags += ["--data.seq-len", "4096", "--model.kv-heads", "2"]
    config = parse([*flags, "--mesh", "dp=1"])
    one = host_bytes(
        config.model, MeshShape(), 64 * 4096, policy_for("offload"), range(3), element=4
    )
    sizes = block_bytes(config.model, MeshShape(), 64 * 4096, element=4)
    assert one == 2 * sizes.all > 2**30
    for mesh, needed in (("dp=1", one), ("dp=2", one), ("tp=2", None), ("pp=2", None)):
        own = [*flags, "--mesh", mesh, "--recompute", "offload"]
        own += ["--model.layers", "6", "--micro-batch", "16"] if mesh == "pp=2" else []
        limit.write_text(str(2**29))
        one_line(lambda own=own: plan_run(parse(own)), "--recompute offload", "--recompute full")
        plan_run(parse([*own, "--recompute", "full"]))
        if needed is not None:
            limit.write_text(str(needed))
            plan_run(parse(own))
            limit.write_text(str(needed - 1))
            one_line(lambda own=own: plan_run(parse(own)), "--recompute offload")


def test_programs_that_would_not_end():
    one_line(lambda: make("1f1b", 4, 999_999_999), "more than", "fewer microbatches")
    one_line(lambda: verify(["--mesh", "dp=2", "--batch", "0"]), "batch 0", "at least 1")
    one_line(lambda: verify(["--mesh", "dp=2", "--micro-batch", "0"]), "at least 1")


def test_bounds_refuse_nan():
    class Config:
        x = float("nan")

    one_line(lambda: from_to(Config(), "c", {"x": (0, 1)}), "c.x=nan")
