"""``dtron hf push`` against a local server that speaks the hub's protocol of uploads: small files
in the commit, safetensors as LFS files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from dtron.hf import Source
from dtron.hf.__main__ import main as hf
from dtron.hf.push import check_push
from tests.helpers.hf_models import folder
from tests.helpers.texts import one_line
from tests.hf.test_families import as_run


class Hub(BaseHTTPRequestHandler):
    """A hub in memory.

    ``repos``: whether each repository is private, by name. ``blobs``: LFS files by hash.
    ``commits``: the lines of each commit."""

    repos: dict[str, bool]
    blobs: dict[str, bytes]
    commits: list[list[dict]]
    refuses: dict[str, int]  # a status for each part of a path

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if self.refused():
            return
        if name not in self.repos:
            return self.answer({}, 404, **{"X-Error-Code": "RepoNotFound"})
        self.answer({"id": name, "private": self.repos[name], "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://{self.headers['Host']}"
        if self.refused():
            return
        if self.path == "/api/validate-yaml":  # of the model card
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[f"{asked['organization']}/{asked['name']}"] = bool(private)
            self.answer({"url": f"{base}/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = lambda x: {"upload": {"href": f"{base}/lfs/{x['oid']}"}}
            wanted = json.loads(body)["objects"]
            objects = [{**x, "actions": upload(x)} for x in wanted]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            assert "/commit/main" in self.path, self.path
            self.commits.append([json.loads(line) for line in body.splitlines()])
            name, oid = self.path.split("/commit/")[0].removeprefix("/api/models/"), "1" * 40
            url = f"{base}/{name}/commit/{oid}"
            self.answer({"commitUrl": url, "commitOid": oid, "success": True})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.refused():
            self.blobs[self.path.rpartition("/")[2]] = body
            self.answer({})

    def refused(self) -> bool:
        for part, status in self.refuses.items():
            if part in self.path:
                self.answer({"error": "said by the server"}, status)
                return True
        return False

    def answer(self, content, status=200, **headers):
        data = json.dumps(content).encode()
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server. huggingface_hub reads its settings when it is imported, so they are set there."""
    kind = type("OneHub", (Hub,), {"repos": {}, "blobs": {}, "commits": [], "refuses": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def uploaded(hub) -> dict[str, bytes]:
    """The files of the last commit."""
    found = {}
    for line in hub.commits[-1]:
        value = line["value"]
        if line["key"] == "file":
            found[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            found[value["path"]] = hub.blobs[value["oid"]]
            assert hashlib.sha256(found[value["path"]]).hexdigest() == value["oid"]
    return found


def test_a_folder_is_uploaded_as_it_is(hub, tmp_path, capsys):
    at = tmp_path / "model"
    at.mkdir()
    for file in folder("llama").iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    want = {file.name: file.read_bytes() for file in at.iterdir()}
    (at / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (at / "notes.txt").write_text("private")
    (at / "optimizer.pt").write_bytes(b"a pickle")
    assert hf(["push", str(at), "org/tiny"]) == 0
    assert hub.repos == {"org/tiny": True}
    got = uploaded(hub)
    assert got.pop("README.md") == (at / "README.md").read_bytes() and got == want
    assert "org/tiny: http" in capsys.readouterr().out


def test_a_run_is_exported_first(hub, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    as_run(Source(folder("llama")), run_dir)
    assert hf(["push", str(run_dir), "org/run", "--public", "--dtype", "float32"]) == 0
    assert hf(["export", str(run_dir), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert uploaded(hub) == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert hub.repos == {"org/run": False}


def test_visibility_is_never_changed_by_the_way(hub):
    at = str(folder("llama"))
    hub.repos |= {"org/open": False, "org/closed": True}
    one_line(lambda: hf(["push", at, "org/open"]), "org/open: is public", "add --public")
    one_line(lambda: hf(["push", at, "org/closed", "--public"]), "is private", "leave --public out")
    assert not hub.commits
    assert hf(["push", at, "org/open", "--public"]) == hf(["push", at, "org/closed"]) == 0


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/models", 401, "does not accept the token"),
        ("/api/repos/create", 403, "the token may not write there (said by the server)"),
        ("/preupload/", 400, "the upload failed"),
        ("/commit/", 409, "the upload failed"),
    ],
)
def test_what_the_hub_refuses(hub, part, status, said):
    hub.refuses[part] = status
    one_line(lambda: hf(["push", str(folder("llama")), "org/tiny"]), "org/tiny: ", said)


def test_what_is_refused_before_any_work(hub, monkeypatch, tmp_path):
    for name in (
        "tiny",
        "org/a/b",
        "org/ü",
        "org/-a",
        "org/a..b",
        "org/" + "a" * 100,
        "",
        "org/a b",
    ):
        one_line(lambda name=name: check_push(name), "no name of the Hugging Face hub")
    one_line(lambda: hf(["push", str(tmp_path), "org/tiny"]), str(tmp_path), "has no safetensors")
    at = str(folder("llama"))
    one_line(lambda: hf(["push", at, "org/tiny", "--ema"]), "--ema: is for a run")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        one_line(lambda: hf(["push", at, "org/tiny"]), "HF_HUB_OFFLINE forbids the network")
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        one_line(lambda: hf(["push", at, "org/tiny"]), "there is no token", "HF_TOKEN")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        one_line(lambda: hf(["push", at, "org/tiny"]), "the hub cannot be reached", "refused")
    assert not hub.commits and not hub.repos
