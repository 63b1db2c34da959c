"""The example of a server, over real connections to this machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import pytest
import torch

from dtron.generation.engine import Engine
from dtron.generation.scheduler import CacheSize
from dtron.generation.text_engine import TextEngine
from dtron.runtime.open_model import open_model
from dtron.training.pipeline import one_stage
from tests.helpers.paths import ROOT
from tests.helpers.texts import one_line
from tests.helpers.values import ONE
from tests.tools.test_generate import run_directory

SPEC = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
serve = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(serve)


class Watched(TextEngine):
    """Notes the number of texts of each step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts: list[int] = []

    def step(self):
        events = super().step()
        self.counts.append(len(events))
        return events


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    run_directory(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    opened = open_model(str(folder))
    pipe = one_stage(opened.model, 1, ONE)
    weights = opened.load(pipe.spec, ONE, torch.float32, "cpu")
    engine = Engine(weights, opened.model, pipe, CacheSize(rows=4, pages=40, page=8))
    made = serve.Server(0, Watched(engine, opened.tokenizer), opened, str(folder))
    thread = Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def asked(server: Any, path: str, body: Any = None, method: str = "POST") -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    text = body if isinstance(body, (str, type(None))) else json.dumps(body)
    connection.request(method, path, text)
    return connection.getresponse()


def answer(server: Any, path: str, body: Any) -> dict[str, Any]:
    with closing(asked(server, path, body)) as found:
        assert found.status == 200, found.read()
        return json.loads(found.read())


def streamed(server: Any, path: str, body: Any) -> list[dict[str, Any]]:
    with closing(asked(server, path, {**body, "stream": True})) as found:
        assert found.getheader("Content-Type") == "text/event-stream"
        lines = found.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


COMPLETION = {"prompt": "def", "max_tokens": 9, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}


def test_completions(server):
    whole = answer(server, "/v1/completions", COMPLETION)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length" and whole["object"] == "text_completion"
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    pieces = streamed(server, "/v1/completions", COMPLETION)
    assert len(pieces) == 9
    assert "".join(p["choices"][0]["text"] for p in pieces) == choice["text"]
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * 8 + ["length"]
    same = answer(server, "/v1/completions", {**COMPLETION, "prompt": [67, 68, 69]})
    assert same["choices"][0]["text"] == choice["text"]
    stop = choice["text"][4:6]
    stopped = answer(server, "/v1/completions", {**COMPLETION, "stop": stop})["choices"][0]
    assert stopped["text"] == choice["text"].split(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_chat_completions(server):
    """The prompt is the one that the model's template writes."""
    whole = answer(server, "/v1/chat/completions", CHAT)
    message = whole["choices"][0]["message"]
    plain = answer(server, "/v1/completions", {**COMPLETION, "prompt": "user: hi\nassistant: "})
    assert message == {"role": "assistant", "content": plain["choices"][0]["text"]}
    pieces = streamed(server, "/v1/chat/completions", CHAT)
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == message["content"]
    assert {p["object"] for p in pieces} == {"chat.completion.chunk"}


class Counted(SimpleQueue):
    """An inbox that counts what was put into it."""

    arrived = Semaphore(0)

    def put(self, item, *rest):
        super().put(item, *rest)
        self.arrived.release()


def test_connections_share_the_batch(server):
    """Texts of several connections run in the same steps, and none changes another."""
    body = {**COMPLETION, "max_tokens": 9}
    alone = answer(server, "/v1/completions", body)["choices"][0]["text"]
    counts, old = server.thread._engine.counts, server.thread.inbox
    counts.clear()
    inbox = server.thread.inbox = Counted()
    old.put(lambda: [inbox.arrived.acquire(timeout=60) for _ in range(4)])  # then all four begin
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: answer(server, "/v1/completions", body), range(4)))
    assert {each["choices"][0]["text"] for each in found} == {alone}
    assert sum(counts) == 4 * 9 and max(counts) == 4


def test_a_client_that_leaves_is_cancelled(server):
    events = server.thread.events([67] * 3, 50)
    next(events)
    events.close()
    done = SimpleQueue()
    server.thread.inbox.put(lambda: done.put(server.thread._engine.busy))
    assert done.get(timeout=60) is False and not server.thread._queues


def test_a_port_that_cannot_be_opened_is_one_line(server):
    for port in (server.server_port, 10**6):
        argv = ["--from", server.name, "--device", "cpu", "--port", str(port)]
        one_line(lambda argv=argv: serve.main(argv), f"--port {port}", "use another")


def test_models_and_errors(server):
    with closing(asked(server, "/v1/models", method="GET")) as found:
        assert json.loads(found.read())["data"][0]["id"] == server.name
    for path, body, status, *said in [
        ("/v2", {}, 404, "unknown path"),
        ("/v1/completions", "{", 400, "request"),
        ("/v1/completions", [], 400, "request"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"]}, 400, "list of tokens"),
        ("/v1/completions", {**COMPLETION, "prompt": ""}, 400, "no tokens"),
        ("/v1/completions", {**COMPLETION, "max_tokens": 99, "stream": True}, 400, "context"),
        ("/v1/completions", {**COMPLETION, "top_p": 2}, 400, "--top-p 2"),
        ("/v1/completions", {**COMPLETION, "n": 2}, 400, "n=2"),
        ("/v1/chat/completions", {**CHAT, "messages": "hi"}, 400, ""),
    ]:
        with closing(asked(server, path, body)) as found:
            error = json.loads(found.read())["error"]
        assert found.status == status and error["type"] == "invalid_request_error"
        for part in said:
            assert part in error["message"], error
