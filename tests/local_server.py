"""A web server of this machine, for tests of what reads from the network."""

from __future__ import annotations

from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["LocalHandler", "LocalServer"]


class LocalServer(ThreadingHTTPServer):
    """Listens on a free port; `address` is where.  `served` counts bytes, `ranges` False: answers are whole files."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.served: Counter[str] = Counter()
        self.ranges = True
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in mid-answer is part of the test."""


class LocalHandler(BaseHTTPRequestHandler):
    """Says nothing; HEAD is answered as GET is."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        """Answer one request for `self.path`."""
        raise NotImplementedError
