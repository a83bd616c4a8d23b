"""An OpenAI-compatible server that answers as a test tells it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@contextmanager
def _server(answer):
    """A server that answers as ``answer(request content, number of requests so far) -> (status, content)`` says."""
    seen: list[dict] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            assert self.path == "/v1/models"
            self._send(200, {"data": [{"id": "served"}]})

        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(content)
                number = len(seen)
            self._send(*answer(content, number))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", seen
        finally:
            http.shutdown()
            thread.join()


def _said(text, reason="stop"):
    return 200, {
        "choices": [{"message": {"content": text}, "finish_reason": reason}],
        "usage": {"completion_tokens": 7},
    }


@pytest.fixture(scope="session")
def server():
    """``with server(answer) as (url, seen)``; ``seen`` gathers the contents of the requests."""
    return _server


@pytest.fixture(scope="session")
def said():
    """``said(text, finish_reason)``: what such a server answers."""
    return _said
