"""A chat server on localhost that answers from a script, for tests of what talks to one."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request.

    Attributes:
        status: HTTP status.
        body: JSON object, or bytes sent as they are.
        headers: More headers.
        drop: Close the connection after this many bytes of the body, while its full length was announced.
        wait: Seconds before anything is sent.
        events: Send these as server-sent events instead of a body; bytes are sent as they are.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    wait: float = 0.0
    events: list[Any] | None = None


def message(text: str, prompt_tokens: int = 7, completion_tokens: int = 3, model: str = "tiny") -> dict[str, Any]:
    """A complete chat reply."""
    return {
        "id": "1",
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def streamed(pieces: list[str]) -> list[Any]:
    """The same as events, as vLLM sends them: a first one with the role alone, the usage last."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
    events = [{"model": "tiny", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events[-1]["choices"][0]["finish_reason"] = "stop"
    return [*events, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces)}}, b"[DONE]"]


class FakeEndpoint:
    """The server; a context manager.

    Args:
        answer: Called with the body of a chat request (in the server's threads); returns the reply.

    Attributes:
        requests: (path, headers, body) of every request so far.
        busiest: Largest number of chat requests under way at a time.
        url: Its base URL.
        models: What /v1/models lists.
        extra: Further paths, and the JSON they answer with.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.busiest = 0
        self.extra: dict[str, Any] = {}
        self.models = [{"id": "tiny", "max_model_len": 1024}]
        self._answer, self._busy, self._lock = answer, 0, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer_with(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        """Answer differently from now on."""
        self._answer = answer

    def chats(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests."""
        return [body for path, _, body in self.requests if path.endswith("/chat/completions")]

    def __enter__(self) -> "FakeEndpoint":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.requests.append((self.path, dict(self.headers), None))
                known = {"/v1/models": {"data": fake.models}} | fake.extra
                found = self.path in known
                self._send(Reply(body=known[self.path]) if found else Reply(404, {"detail": "Not Found"}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append((self.path, dict(self.headers), body))
                    fake._busy += 1
                    fake.busiest = max(fake.busiest, fake._busy)
                try:
                    reply = fake._answer(body)
                    time.sleep(reply.wait)
                finally:
                    with fake._lock:
                        fake._busy -= 1
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.events is not None:
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    for event in reply.events:
                        data = event if isinstance(event, bytes) else json.dumps(event).encode()
                        self.wfile.write(b"data: " + data + b"\n\n")
                        self.wfile.flush()
                        time.sleep(0.01)
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if reply.drop is None else data[: reply.drop])

        return Handler
