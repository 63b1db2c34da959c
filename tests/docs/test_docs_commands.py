"""Every command of the pages runs, or it names what it needs and its flags are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import settings
from pyarrow import parquet

from dtron.errors import UserError
from dtron.fp8.recipes import RECIPES
from dtron.hf import Source
from dtron.hf.adapter import write_adapter
from dtron.model.activation_checkpoint import POLICIES
from dtron.model.config import MIXERS
from dtron.model.lora import LoraConfig
from dtron.params import draw
from dtron.training.optim_config import OPTIMIZERS
from tests.helpers.examples import examples
from tests.helpers.hf_models import folder
from tests.helpers.pages import (
    PAGES,
    Command,
    check,
    commands,
    main_of,
    python_fences,
    unknown_flags,
)
from tests.helpers.paths import ROOT
from tests.helpers.texts import words
from tests.helpers.train_cli import enter

pytestmark = pytest.mark.xdist_group("pages")

TEXT = " ".join(f"w{i * i % 60}" for i in range(20_000))
TRAIN = ["--device=cpu", "--steps=2", "--batch=8", "--data.seq-len=32", "--sample-tokens=3"]
MODEL = ["--model.layers=2", "--model.embed=32", "--model.heads=4", "--model.kv-heads=4"]
MODEL += ["--model.head-dim=8", "--model.mlp=64", "--model.vocab=300"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the files that the commands start from. No test writes to it."""
    tmp_path = tmp_path_factory.mktemp("files")
    vocab = {f"w{i}": i for i in range(60)} | {"</s>": 60}
    shutil.copytree(folder("llama"), tmp_path / "Llama-3.2-1B")
    config = tmp_path / "Llama-3.2-1B" / "config.json"
    long = json.loads(config.read_text()) | {"max_position_embeddings": 512}
    config.write_text(json.dumps(long))
    page = (ROOT / "docs" / "config-files.md").read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "run.toml").write_text(toml)
    shutil.copytree(tmp_path / "Llama-3.2-1B", tmp_path / "Llama-3.1-8B")
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").write_text(TEXT)
    adapter(tmp_path / "Llama-3.2-1B-chat")
    (tmp_path / "model").mkdir()
    for place in (".", "model", "Llama-3.2-1B"):
        words(vocab, tmp_path / place / "tokenizer.json")
    rows = [TEXT[i : i + 400] for i in range(0, len(TEXT), 400)]
    for name in ("corpus.jsonl", "web.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parquet.write_table(pa.table({"text": rows}), tmp_path / "code.parquet")
    chat = {
        "messages": [
            {"role": "user", "content": "w1 w2"},
            {"role": "assistant", "content": TEXT[:40]},
        ]
    }
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 200)
    pair = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
    answer = {"question": "w1 w2", "answer": "w3 w4"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 200)
    (tmp_path / "answers.jsonl").write_text((json.dumps(answer) + "\n") * 200)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def adapter(at: Path) -> None:
    """Write adapter files for the model."""
    source, config = Source(folder("llama")), LoraConfig(rank=2)
    at.mkdir()
    read = lambda w: draw(w, {}, 0)
    write_adapter(at, source.model, source.family, config, read, "Llama-3.2-1B")


@pytest.fixture
def beside(files, monkeypatch):
    """Work in this folder, without writing."""
    enter(files, monkeypatch)


@pytest.fixture
def desk(files, tmp_path, monkeypatch):
    """Work in a copy of this folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)


def short(command: Command) -> list[str]:
    """The arguments of a command, with flags that make it small."""
    args = [word.replace("step-00000100", "step-00000002") for word in command.args]
    if command.program == "train":
        args += TRAIN
        args += [] if "--init-from" in args else MODEL
        args += [] if "--data.path" in args else ["--data.path=my_text"]
        args += (
            ["--model.layers=3"] if "--fp8" in args else []
        )  # the first and the last example have no flag
        args += ["--save-every=1"] if "--save-every" in args else []
        args += ["--steps=3"] if "--resume" in args else []
        args += ["--simulate"] if command.processes > 1 else []
        args += (
            ["--steps=1", "--model.layers=1", "--sample-tokens=0"] if "--simulate" in args else []
        )
    if command.program == "verify":
        args += MODEL
    if command.program == "plan" and args[0] == "search":
        args += ["--gpus=1"]  # more GPUs have more meshes, and each takes seconds
    if command.program == "generate":
        args += ["--tokens=3"]
    return args


@contextmanager
def built(script: str) -> Iterator[types.ModuleType]:
    """Run the file that a page builds. Afterwards dtron's tables are restored."""
    with ExitStack() as tables:
        for table in (OPTIMIZERS, POLICIES, MIXERS, RECIPES):
            tables.enter_context(mock.patch.dict(table))
        module = types.ModuleType("file_of_the_page")
        sys.modules[module.__name__] = module  # dataclasses look there
        exec(compile(script, "page", "exec"), vars(module))
        yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood(page, beside):
    text = page.read_text()
    for command in commands(text):
        check(command)
    assert unknown_flags(text) == []


SLOW = {ROOT / "CONTRIBUTING.md"}
RUN = [
    pytest.param(
        page,
        marks=[pytest.mark.slow] if page in SLOW else [],
        id=str(page.relative_to(ROOT)),
    )
    for page in PAGES
    if any(command.runs for command in commands(page.read_text()))
]


@pytest.mark.parametrize("page", RUN)
def test_every_command_runs(page, desk):
    for command in commands(page.read_text()):
        if command.runs and not command.script:
            assert main_of(command.program)(short(command)) == 0, command.text


BUILT = [c for p in PAGES for c in commands(p.read_text()) if c.script]


def test_the_files_that_the_pages_build_can_be_imported():
    assert len(scripts := {command.script for command in BUILT}) == 4
    for script in scripts:
        with built(script):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("command", BUILT, ids=lambda command: command.text)
def test_a_file_that_a_page_builds_runs(command, desk, tmp_path):
    """In a separate process: the file extends dtron's tables, and must do so before dtron reads
    them."""
    (tmp_path / "file.py").write_text(command.script)
    argv = [sys.executable, "file.py", command.program, *short(command)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def recipe(page: str) -> str:
    """The layer of CONTRIBUTING's first recipe, and its test, as a file; empty for other pages."""
    found = re.search(r"^## Add a layer$(.*?)^## ", page, re.M | re.S)
    return "\n".join(python_fences(found[1])) if found else ""


def test_the_layer_of_the_recipe_is_right():
    """The first recipe of CONTRIBUTING, put together, passes its own test of its layer."""
    with built(recipe((ROOT / "CONTRIBUTING.md").read_text())) as module:
        settings(max_examples=examples(5))(module.test_gate)()


def squeezed(code: str) -> str:
    """Code without spaces. So neither indentation nor wrapping matters."""
    return "".join(code.split())


TOYS = [p for kind in ("test_*_seam.py", "toy_*.py") for p in (ROOT / "tests").rglob(kind)]
READERS = [ROOT / "tests" / "helpers" / "checkpoints.py"]
FILES = [*(ROOT / "dtron").rglob("*.py"), *TOYS, *READERS]
SOURCE = squeezed("".join(p.read_text() for p in FILES))
RUN_ELSEWHERE = "def test_my_layer"  # by docs/test_readme.py


def strangers(text: str, source: str) -> list[str]:
    """The Python fences of a page that no test runs and that the source does not contain either."""
    known = source + squeezed("".join(c.script for c in commands(text)) + recipe(text))
    fences = [code for code in python_fences(text) if RUN_ELSEWHERE not in code]
    return [code for code in fences if squeezed(code) not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_is_run_or_is_the_source(page):
    assert strangers(page.read_text(), SOURCE) == []


def test_python_that_is_neither_is_noticed():
    page = "```python\nRULES = 7 / 3\n```\n```python\nfrom dtron.mesh import Layout\n```"
    assert strangers(page, SOURCE) == ["RULES = 7 / 3\n"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("```bash\npython train.py --step 2\n```", "--step: unknown flag; did you mean --steps"),
        ("```bash\n# needs a GPU\npython train.py --zreo 3\n```", "--zreo"),
        ("```sh\npython -m dtron.data prepare a --uot b\n```", "--out"),
        ("```bash\n# needs 2 GPUs\npython bench/train.py --row 1\n```", "--row"),
        ("```bash\npython bench/fp9.py\n```", "no program bench/fp9.py"),
        ("```bash\ntorchrun --nproc-per-node 4 train.py --mesh dp=2\n```", "dp=2"),
        ("```bash\npython train.py --mesh tp=3 --simulate\n```", "tp=3"),
        ("```bash\npip install -e '.[tset]'\n```", "no extra tset"),
    ],
)
def test_a_mistake_in_a_fence_is_noticed(page, reason, beside):
    with pytest.raises(UserError, match=re.escape(reason)):
        for command in commands(page):
            check(command)


def test_a_mistake_in_prose_is_noticed():
    page = "Use `--data.pth x`, `--zero 3`, `--model.rope.*` or `dtron verify --steps 2`."
    assert unknown_flags(page) == ["--data.pth", "--steps"]


def test_what_a_command_needs_is_read():
    second = "# needs a GPU\npython bench/kernels/fp8.py | tail -1 > f"
    page = f"```bash\npython train.py  # one\n{second}\n```"
    one, two = commands(page)
    assert (one.program, one.args, one.runs) == ("train", (), True)
    assert (two.program, two.args, two.needs, two.runs) == (
        "bench/kernels/fp8.py",
        (),
        "a GPU",
        False,
    )
