"""A proxy that stands before a server and does what networks do: 503, dropped connections, minutes of silence."""

import http.client
import random
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SECONDS = 60


class FaultyProxy:
    """Passes requests on to `target`.

    Args:
        target: URL of the server.
        refused: share of the requests that are answered by 503.
        dropped: share of the requests whose connection is closed, before or after the server has worked on them.
    """

    def __init__(self, target: str, refused: float = 0.0, dropped: float = 0.0) -> None:
        self.address = urllib.parse.urlsplit(target).netloc
        self.refused, self.dropped = refused, dropped
        self.down = False  # every connection is closed
        self.requests = self.faults = 0
        self._rng, self._lock = random.Random(0), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fate(self) -> str:
        """Returns what becomes of a request: "", "refuse", "drop" or "drop answer"."""
        with self._lock:
            self.requests += 1
            chance = self._rng.random()
            if self.down or chance < self.refused + self.dropped:
                self.faults += 1
            if self.down:
                return "drop"
            if chance < self.refused:
                return "refuse"
            return self._rng.choice(["drop", "drop answer"]) if chance < self.refused + self.dropped else ""

    def close(self) -> None:
        """Takes no more requests."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _pass_on(self) -> None:
        body, fate = self._read_body(), self.proxy.fate()
        if fate == "drop":
            self.close_connection = True
            return
        if fate == "refuse":
            self._answer(503, [], b"try again")
            return
        connection = http.client.HTTPConnection(self.proxy.address, timeout=_SECONDS)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        try:
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fate == "drop answer":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def faulty_proxy(target: str, refused: float = 0.0, dropped: float = 0.0) -> Iterator[FaultyProxy]:
    """Starts a proxy before `target`, see `FaultyProxy`."""
    proxy = FaultyProxy(target, refused, dropped)
    try:
        yield proxy
    finally:
        proxy.close()
