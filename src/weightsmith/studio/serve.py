"""The server: one process, this machine only."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from weightsmith.core.errors import MissingExtra, OutputError
from weightsmith.studio.app import build

__all__ = ["serve"]

HOST = "127.0.0.1"


def serve(folders: tuple[Path, ...], port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Serve the studio until Ctrl-C; port 0: any that is free.

    Raises OutputError where the port is taken, MissingExtra without the extra `studio`.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "studio", "the studio") from error
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
        app = build(folders, token, port)
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
        uvicorn.Server(settings).run([taken])
