"""The server: one process, this machine only."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from weightsmith.core.errors import MissingExtra, OutputError
from weightsmith.studio.app import build

__all__ = ["serve"]

HOST = "127.0.0.1"


def serve(
    folders: tuple[Path, ...], port: int, browser: bool, say: Callable[[str], None], evaluator: str | None = None
) -> None:
    """Serve the studio until Ctrl-C; port 0: any that is free.  `evaluator`: what may score models.

    Raises OutputError where the port is taken, MissingExtra without the extra `studio`.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "studio", "the studio") from error
    if evaluator is not None:
        from weightsmith.search.judge import absolute

        evaluator = absolute(evaluator)
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
    except OSError as error:
        raise OutputError(
            f"--port {port}: {error.strerror}; is a studio running there already? --port 0 takes any that is free"
        ) from error
    with taken:
        port = taken.getsockname()[1]
        token = secrets.token_urlsafe(32)
        app = build(folders, token, port, evaluator or "")
        address = f"http://{HOST}:{port}/?token={token}"
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none", server_header=False,
            limit_concurrency=100,
        )  # fmt: skip
        taken.listen(64)
        say(f"studio: {address}")
        say("Ctrl-C ends it; a running job is stopped, and can go on later.")
        if browser:
            webbrowser.open(address)
        _server(settings, app.app.state.studio.ending).run([taken])


def _server(settings: Any, ending: Event) -> Any:
    """A server that lets its pages' streams end when it is asked to, and says nothing of those that it cuts off."""
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = signal.getsignal(signal.SIGHUP)  # which uvicorn leaves alone: a closed terminal
            with super().capture_signals():
                if before is not signal.SIG_IGN:
                    signal.signal(signal.SIGHUP, self.handle_exit)
                try:
                    yield
                finally:
                    signal.signal(signal.SIGHUP, before)

        def handle_exit(self, sig: int, frame: Any) -> None:
            ending.set()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            super().handle_exit(sig, frame)

    return Server(settings)
