"""A server for one model on one device, with the HTTP interface of OpenAI's API.

    python examples/serve.py --from my-llama --port 8000
    curl localhost:8000/v1/completions -d '{"prompt": "Once", "max_tokens": 8}'

It shows how the engine serves several connections: one thread runs the engine, and each connection
has a queue for its events. It is for tests on one machine: it has no keys, no limits, and listens
to this machine alone. To serve others, see docs/generation.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from dtron.data.chat_template import template_beside
from dtron.errors import UserError
from dtron.generation.cached_model import pages_in
from dtron.generation.engine import Engine
from dtron.generation.recorded_forward import can_record
from dtron.generation.sampling import Sampling
from dtron.generation.scheduler import KERNEL_PAGE, CacheSize
from dtron.generation.text_engine import TextEngine, TextEvent, encode
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.open_model import OpenModel, open_model

SAMPLING = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty")


class EngineThread(Thread):
    """The thread that runs the engine.

    ``inbox``: what to call on the engine before the next step: a request, or a cancellation."""

    def __init__(self, engine: TextEngine):
        super().__init__(daemon=True)
        self._engine, self.inbox = engine, SimpleQueue()
        self._queues: dict[int, SimpleQueue[TextEvent | UserError]] = {}

    def events(self, *request: Any) -> Iterator[TextEvent]:
        """Yield the events of a request. Raises UserError. A reader that leaves cancels it."""
        queue: SimpleQueue[TextEvent | UserError] = SimpleQueue()
        self.inbox.put(lambda: self._add(queue, request))
        try:
            while True:
                event = queue.get()
                if isinstance(event, UserError):
                    raise event
                yield event
                if event.finished:
                    return
        finally:
            self.inbox.put(lambda: self._cancel(queue))

    def run(self) -> None:
        while True:
            try:
                while True:  # wait if there is nothing to do
                    self.inbox.get(block=not self._engine.busy)()
            except Empty:
                pass
            try:
                for event in self._engine.step():
                    self._queues[event.number].put(event)
            except UserError as error:
                for queue in [*self._queues.values()]:
                    queue.put(error)
                    self._cancel(queue)

    def _add(self, queue: SimpleQueue, request: tuple) -> None:
        try:
            self._queues[self._engine.add(*request)] = queue
        except UserError as error:
            queue.put(error)

    def _cancel(self, queue: SimpleQueue) -> None:
        for number in [n for n, other in self._queues.items() if other is queue]:
            self._engine.cancel(number)
            del self._queues[number]


class Handler(BaseHTTPRequestHandler):
    """One connection. ``server`` has the engine's thread, the model and its chat template."""

    server: Server

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "owned_by": "dtron"}
            self._send(200, {"object": "list", "data": [model]})
        else:
            self._error(404, f"{self.path}: unknown path")

    def do_POST(self) -> None:
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            return self._error(404, f"{self.path}: unknown path")
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            prompt, *rest = self.server.request(body, chat)
            with closing(self.server.thread.events(prompt, *rest)) as events:
                if body.get("stream"):
                    self._stream(events, chat)
                else:
                    self._answer(list(events), len(prompt), chat)
        except ConnectionError:
            pass  # the client has left
        except (UserError, ValueError, TypeError, AttributeError, KeyError) as error:
            self._error(400, str(error) if isinstance(error, UserError) else f"request: {error!r}")

    def _answer(self, events: list[TextEvent], read: int, chat: bool) -> None:
        text = "".join(event.text for event in events)
        body = self._body(text, events[-1].finished, chat, "message")
        usage = {"prompt_tokens": read, "completion_tokens": len(events)}
        self._send(200, body | {"usage": usage | {"total_tokens": read + len(events)}})

    def _stream(self, events: Iterator[TextEvent], chat: bool) -> None:
        """Send server-sent events. The status waits for the first token: it may be an error."""
        for i, event in enumerate(events):
            if i == 0:
                self._head(200, "text/event-stream")
            body = self._body(event.text, event.finished, chat, "delta")
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _body(self, text: str, finished: str | None, chat: bool, key: str) -> dict[str, Any]:
        kind = "text_completion" if not chat else "chat.completion" + ".chunk" * (key == "delta")
        said = {key: {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": finished, "logprobs": None, **said}
        head = {"id": f"dtron-{id(self)}", "object": kind, "created": int(time.time())}
        return {**head, "model": self.server.name, "choices": [choice]}

    def _error(self, status: int, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._send(status, {"error": error})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(body).encode())

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """The server. ``folder``: the model's folder as it was given, which is the model's name."""

    daemon_threads = True

    def __init__(self, port: int, engine: TextEngine, opened: OpenModel, folder: str):
        super().__init__(("127.0.0.1", port), Handler)
        self._opened, self.name, self._chat = opened, folder, template_beside(opened.folder)
        self.thread = EngineThread(engine)
        self.thread.start()

    def request(self, body: dict[str, Any], chat: bool) -> tuple[Any, ...]:
        """Return the arguments of ``TextEngine.add`` for the body of a request."""
        tokenizer, prompt = self._opened.tokenizer, body["messages" if chat else "prompt"]
        if chat and self._chat is None:
            raise UserError(f"{self.name}: has no chat template; use /v1/completions")
        if chat and self._chat is not None:  # the template writes the special tokens
            prompt = encode(tokenizer, self._chat.render(prompt, prompt=True).text, special=False)
        elif isinstance(prompt, str):
            prompt = encode(tokenizer, prompt)
        elif not isinstance(prompt, list) or not all(type(i) is int for i in prompt):
            raise UserError("prompt: must be a text or a list of tokens; send one request for each")
        if body.get("n", 1) != 1:
            raise UserError(f"n={body['n']}: a request has one answer; send several requests")
        room = max(1, self._opened.model.context - len(prompt))
        stops = body.get("stop") or []
        given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        sampling = Sampling(**{"temperature": 1.0, "seed": time.time_ns() % 2**63, **given})
        tokens = body.get("max_completion_tokens") or body.get("max_tokens") or min(room, 256)
        return prompt, int(tokens), sampling, [stops] if isinstance(stops, str) else stops


def main(argv: list[str]) -> int:
    o = arguments(argv)
    opened = open_model(o.folder)
    config = opened.config(device=o.device)
    plan = plan_run(config)
    with start_ranks(config, plan) as pipe:
        weights = opened.load(pipe.spec, pipe.layout, plan.compute, plan.device)
        m, compile = opened.model, plan.device.startswith("cuda")
        page = KERNEL_PAGE if compile else 16
        pages = pages_in(int(o.cache_gib * 2**30), m, pipe, page, plan.compute)
        size = CacheSize(o.batch, pages, page)
        graph = compile and can_record(m, pipe, compile)
        engine = Engine(weights, m, pipe, size, plan.device, graph, compile)
        text_engine = TextEngine(engine, opened.tokenizer, opened.ends)
        try:
            server = Server(o.port, text_engine, opened, str(Path(o.folder)))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {o.port}: cannot be opened ({error}); use another") from error
        with server:
            print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
            server.serve_forever()
    return 0


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="serve.py", description="Serve a model on this machine.")
    parser.add_argument("--from", dest="folder", required=True, metavar="DIR")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port (8000)")
    parser.add_argument("--batch", type=int, default=16, help="most texts at once (16)")
    parser.add_argument("--cache-gib", type=float, default=1.0, help="memory of the KV cache (1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
