"""Models by their names on the Hugging Face hub, from the library's cache and from a local
server. There is no network here."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dtron.errors import UserError
from dtron.hf.hub import hub_folder
from dtron.runtime.cli import parse
from tests.helpers.hf_models import folder
from tests.helpers.paths import ROOT
from tests.helpers.texts import words

COMMIT = "a" * 40


def cached(home: Path) -> Path:
    """A model in the cache, as huggingface_hub lays it out."""
    at = home / "hub" / "models--org--tiny"
    snapshot = at / "snapshots" / COMMIT
    shutil.copytree(folder("llama"), snapshot)
    words({f"w{i}": i for i in range(61)}, snapshot / "tokenizer.json")
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(COMMIT)
    return snapshot


def in_process(home: Path, code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own: huggingface_hub reads its settings when it is imported."""
    setting = {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **env}
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env=setting, capture_output=True, text=True, timeout=100)


LOOK = "from dtron.hf.hub import hub_folder; print(hub_folder('--init-from', {!r}))"


def test_a_model_in_the_cache_is_found_without_a_network(tmp_path):
    snapshot = cached(tmp_path)
    done = in_process(tmp_path, LOOK.format("org/tiny"), HF_HUB_OFFLINE="1")
    assert Path(done.stdout.strip()) == snapshot, done.stderr


@pytest.mark.parametrize("name", ["org/other", "org/tiny@v2"])
def test_a_model_that_is_not_in_the_cache(tmp_path, name):
    cached(tmp_path)
    done = in_process(tmp_path, LOOK.format(name), HF_HUB_OFFLINE="1")
    assert "hf download org/" in done.stderr and "there is no such folder" in done.stderr


class Hub(BaseHTTPRequestHandler):
    """A hub with one model of two files."""

    files = {"config.json": b'{"model_type": "llama"}', "weights.bin": b"a pickle"}
    asked: list[str] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        if not path.startswith(("/api/models/org/tiny", "/org/tiny")):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith("/api"):
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in self.files.items()
                ]
                return self.answer(200, json.dumps(entries).encode(), {}, body)
            siblings = [{"rfilename": n} for n in self.files]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), {}, body)
        content = self.files[name]
        tag = hashlib.sha1(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

    def answer(self, status, content, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_download_has_no_pickles_and_is_made_once(hub, tmp_path):
    done = in_process(tmp_path, LOOK.format("org/tiny"), HF_ENDPOINT=hub)
    found = Path(done.stdout.strip())
    assert sorted(f.name for f in found.iterdir()) == ["config.json"], done.stderr
    assert not [path for path in Hub.asked if "weights.bin" in path]
    again = in_process(tmp_path, LOOK.format("org/tiny"), HF_HUB_OFFLINE="1")
    assert Path(again.stdout.strip()) == found


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    done = in_process(tmp_path, LOOK.format("org/none"), HF_ENDPOINT=hub)
    assert "no such model is open to you" in done.stderr


@pytest.mark.parametrize("name", ["model", "./a/b", "a/b/c", "/tmp/x", "a b/c", ""])
def test_other_names_are_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_folder("--init-from", name) == name


def test_a_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_folder("--init-from", "org/tiny") == "org/tiny"
    assert hub_folder("--init-from", "org/other") == "org/other"  # beside it, so it is a typo


def test_a_run_from_a_name(tmp_path):
    """The resolved config has the folder, so the run can be repeated."""
    snapshot = cached(tmp_path)
    code = "import train; train.parse(['--init-from', 'org/tiny', '--print-config'])"
    done = in_process(tmp_path, code, HF_HUB_OFFLINE="1")
    assert f'init_from = "{snapshot}"' in done.stdout, done.stderr


def test_a_name_with_a_typo_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        parse(["--init-from", "none"])
