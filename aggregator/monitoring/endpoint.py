"""HTTP for an operator's tools: /metrics, /healthz, /readyz. Plain, without login: for loopback or behind a proxy.

In threads of its own, at most ``MAX_CLIENTS`` at once, each cut off after ``CLIENT_S`` seconds whatever it does,
and an answer is kept for ``KEPT_S``: who asks slowly or without end costs the rounds next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, NamedTuple

from aggregator.monitoring.listen import spelt
from aggregator.monitoring.metrics import CONTENT_TYPE
from aggregator.monitoring.monitor import Check, Monitor
from edge_runtime.protocol.errors import Fault, FleetgradError

log = logging.getLogger(__name__)

MAX_CLIENTS = 8
CLIENT_S = 5.0
KEPT_S = 0.5
_JSON = "application/json"


class ListenError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="set [monitoring] listen to a free address of this machine, or remove it",
):
    """Metrics and health cannot be offered at the configured address."""


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


class Endpoint:
    """Answers from ``__enter__`` to ``__exit__``. ``address``: as ``parse_listen`` gives it; port 0: a free one."""

    def __init__(self, monitor: Monitor, address: tuple[str, int]) -> None:
        """Raises ListenError."""
        pages: dict[str, Callable[[], Answer]] = {
            "/metrics": lambda: Answer(200, CONTENT_TYPE, monitor.page()),
            "/healthz": lambda: _checked(monitor.liveness()),
            "/readyz": lambda: _checked(monitor.readiness()),
        }
        kept = {path: _kept(page) for path, page in pages.items()}
        try:
            self._server = _Server(address, kept)
        except OSError as error:
            host, port = address
            raise ListenError(
                f"[monitoring] listen = {spelt(host, port)}: {error.strerror or error}"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="monitoring", daemon=True
        )

    @property
    def url(self) -> str:
        """Of the server: where /metrics is."""
        host, port = self._server.server_address[:2]
        return f"http://{spelt(str(host), int(port))}"

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _checked(checks: dict[str, Check]) -> Answer:
    ok = all(check.ok for check in checks.values())
    document = {"ok": ok, "checks": {name: check._asdict() for name, check in checks.items()}}
    return Answer(200 if ok else 503, _JSON, json.dumps(document).encode() + b"\n")


def _kept(page: Callable[[], Answer]) -> Callable[[], Answer]:
    """The page, made at most every ``KEPT_S`` seconds."""
    lock = threading.Lock()
    last: list[tuple[float, Answer]] = []

    def answer() -> Answer:
        with lock:
            if not last or time.monotonic() - last[0][0] >= KEPT_S:
                last[:] = [(time.monotonic(), page())]
            return last[0][1]

    return answer


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Threads that end with their clients, few, and none that anybody waits for."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], pages: dict[str, Callable[[], Answer]]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        cut = threading.Timer(CLIENT_S, _cut, [request])
        cut.daemon = True
        try:
            cut.start()
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a client does to its connection is its own affair; a mistake of ours is logged."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request to the monitoring endpoint failed")


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One request a connection (HTTP/1.0). Names no version of anything."""

    server: _Server
    timeout = CLIENT_S
    server_version = "fleetgrad"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            listed = "".join(f"{path}\n" for path in self.server.pages)
            answer = Answer(404, "text/plain; charset=utf-8", f"there are:\n{listed}".encode())
        else:
            answer = page()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: a scraper asks every few seconds, a stranger whatever it likes."""
