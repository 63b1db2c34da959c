"""A run whose checkpoints are in an object store: memory, and a local server that speaks S3."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from dtron.checkpoint import files
from dtron.checkpoint.storage import any_path
from dtron.hf.__main__ import main as hf
from dtron.runtime.open_model import open_model
from dtron.runtime.run_directory import read_run
from tests.helpers.checkpoints import weights
from tests.helpers.ranks import Ranks
from tests.helpers.train_cli import SIX, TINY, losses, refused, run

CONSTANT = "--optim.schedule=constant"  # --steps changes no rate
NO_REQUESTS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
KEYS = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret"}


def bits(found: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes and checksums of the files of a checkpoint, by rank."""
    return [found[name] for name in sorted(found)]


def stored(url: str) -> list[str]:
    return [path.name for path in files.whole(any_path(url))]


def test_a_run_saves_resumes_exports_and_generates(run_dir, capsys, tmp_path):
    url = f"memory://{run_dir.parent.name}/runs/a"
    want = losses(run(run_dir.with_name("disk"), *SIX, CONSTANT))
    run(run_dir, *SIX, CONSTANT, "--steps=4", f"--checkpoint-store={url}", "--keep=1")
    assert stored(url) == ["step-00000004"] and not files.folder(run_dir).exists()
    # The store is in the config of the run.
    found = run(run_dir, "--resume", "--steps=6")
    assert losses(found) == want and stored(url) == ["step-00000006"]
    assert f"saved {url}/checkpoints/step-00000006" in capsys.readouterr().out
    assert bits(weights(any_path(url))) == bits(weights(run_dir.with_name("disk")))
    assert str(read_run(run_dir)[1]) == f"{url}/checkpoints/step-00000006"
    assert open_model(str(run_dir)).model.layers == 1
    assert hf(["export", str(run_dir), str(tmp_path / "out")]) == 0


def test_a_store_without_its_run_directory(run_dir, capsys):
    """The disk of a machine that is gone: the same command goes on on another."""
    url = f"memory://{run_dir.parent.name}/runs/b"
    flags = [*SIX, f"--checkpoint-store={url}", "--resume=auto"]
    run(run_dir, *flags, "--steps=4")
    other = run_dir.with_name("other")
    assert [r["step"] for r in run(other, *flags)] == [5, 6]
    said = refused(capsys, f"--run-dir={other}2", *SIX, f"--checkpoint-store={url}")
    assert f"--checkpoint-store {url}: holds checkpoints of another run" in said


def test_a_folder_may_be_the_store(run_dir):
    run(run_dir, *SIX, f"--checkpoint-store={run_dir.with_name('scratch')}")
    assert len(files.whole(run_dir.with_name("scratch"))) == 3


def test_stores_that_cannot_be_written(run_dir, capsys):
    said = refused(capsys, f"--run-dir={run_dir}", "--checkpoint-store=nothing://a/b")
    assert "--checkpoint-store nothing://a/b: cannot be opened" in said
    (run_dir.parent / "file").write_text("")
    said = refused(capsys, f"--run-dir={run_dir}", f"--checkpoint-store={run_dir.parent}/file")
    assert "file: cannot be written" in said


# ---- a server


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of the server, for the access of this process and of its ranks."""
    for name, value in access(server).items():
        monkeypatch.setenv(name, value)
    place = any_path("s3://checkpoints/runs")
    if not place.storage.fs.exists("checkpoints"):
        place.storage.fs.mkdir("checkpoints")
    return "s3://checkpoints/runs"


def access(server: str) -> dict[str, str]:
    return NO_REQUESTS | KEYS | {"AWS_ENDPOINT_URL": server}


RUN = [*TINY, CONSTANT, "--eval-every=0", "--sample-tokens=0", "--save-every=1", "--log-every=1"]


def on_ranks(argv: list[str], output: Path, **environment: str) -> str:
    """Run two ranks to their end, and return what they said."""
    codes = Ranks([*RUN, *argv], 2, output, **environment).codes()
    said = output.read_text()
    assert codes == [0, 0], said
    assert "Unclosed" not in said and "Traceback" not in said
    return said


def until(ranks: Ranks, text: str) -> None:
    """Wait until the ranks have said this."""
    while text not in ranks.output.read_text():
        assert not ranks.ended(0.01), ranks.output.read_text()


@pytest.mark.slow
def test_real_ranks_save_to_s3_are_killed_and_resume_on_another_mesh(run_dir, server, bucket):
    """Beside them is a run on a disk, which is not killed. The bits are the same."""
    disk, output, url = run_dir.with_name("disk"), run_dir.with_name("output.txt"), f"{bucket}/a"
    argv, env = ["--mesh=dp=2", "--zero=3"], access(server)
    there = [f"--run-dir={run_dir}", f"--checkpoint-store={url}"]
    ranks = Ranks([*RUN, *argv, "--steps=100000", *there], 2, output, **env)
    until(ranks, "step-00000003\n")
    ranks.kill([0, 1])
    assert all(ranks.codes())
    for name in stored(url):
        path = files.folder(any_path(url)) / name
        assert not files.damaged(path, files.read_meta(path))
    last = int(stored(url)[-1].removeprefix("step-"))
    on_ranks([*argv, f"--steps={last}", f"--run-dir={disk}"], output, **env)
    more = ["--resume", "--mesh=tp=2", "--zero=0", f"--steps={last + 2}", "--keep=2"]
    for at in (run_dir, disk):
        assert f"resumed at step {last}" in on_ranks([*more, f"--run-dir={at}"], output, **env)
    assert bits(weights(any_path(url))) == bits(weights(disk))
    assert len(stored(url)) == 2


@pytest.mark.slow
def test_a_bucket_that_is_gone_for_a_while_costs_the_checkpoints_alone(run_dir, server, bucket):
    fs, output = any_path(bucket).storage.fs, run_dir.with_name("output.txt")
    fs.mkdir("away")
    there = [f"--run-dir={run_dir}", "--checkpoint-store=s3://away/a", "--steps=100000"]
    ranks = Ranks([*RUN, "--mesh=dp=2", *there], 2, output, **access(server))
    until(ranks, "step-00000001\n")
    moto("reset", server)  # no bucket is left
    until(ranks, "cannot write the checkpoint (The specified bucket does not exist)")
    fs.mkdir("away")
    failed = output.read_text().count("\nsaved ")
    while output.read_text().count("\nsaved ") <= failed:
        assert not ranks.ended(0.01), output.read_text()
    for process in ranks.processes:
        process.terminate()
    assert ranks.codes() == [0, 0] and "Traceback" not in output.read_text()


def moto(command: str, server: str, body: bytes = b"") -> None:
    """Change the server, beside S3."""
    headers = {"Content-Type": "text/plain"}
    with urlopen(Request(f"{server}/moto-api/{command}", body, headers)) as answer:
        assert answer.status == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("s3://nowhere/a", KEYS, "(The specified bucket does not exist)"),
        ("s3://checkpoints/a", dict.fromkeys(KEYS, ""), "(Unable to locate credentials)"),
        ("s3://checkpoints/a", KEYS, "The AWS Access Key Id you provided does not exist"),
    ],
)
def test_what_s3_refuses_is_one_line(run_dir, server, bucket, url, environment, said):
    output = run_dir.with_name("output.txt")
    argv = [*RUN, f"--run-dir={run_dir}", f"--checkpoint-store={url}"]
    known = "Access Key" not in said
    moto("reset-auth", server, b"inf" if known else b"0")
    environment = NO_REQUESTS | environment | {"AWS_ENDPOINT_URL": server}
    try:
        assert Ranks(argv, 1, output, **environment).codes() == [2]
    finally:
        moto("reset-auth", server, b"inf")
    (line,) = output.read_text().splitlines()
    assert line.startswith(f"error: --checkpoint-store {url}: cannot be written") and said in line
