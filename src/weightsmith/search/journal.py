"""The history of a search: one line for each generation, written whole when it is over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, sync_file, write_all, writing

__all__ = ["FILE", "History"]

FILE = "history.jsonl"


class History:
    """Generations as JSON lines behind a head that says whose they are.  A torn last line is as if never written."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path, self.identity = folder / FILE, identity
        self.generations: list[dict[str, Any]] = []

    def read(self) -> None:
        """Take up what an earlier run has written; OutputError if it was another search."""
        try:
            data = system.read_file(self.path) if self.path.exists() else b""
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        try:
            found = [json.loads(line) for line in lines]
            identity = found[0]["identity"] if found else self.identity
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.path}: not the history of a search; take it away, or choose another folder"
            ) from None
        if identity != self.identity:
            raise OutputError(
                f"{self.path} belongs to another search (other recipe, space, data or sampler); choose "
                "another folder, or pass --overwrite"
            )
        self.generations = found[1:]
        if not found:
            replace_file(self.path, json.dumps({"identity": self.identity}).encode() + b"\n")
        elif len(whole) < len(data):
            with writing(self.path):
                system.call(os.truncate, self.path, len(whole))

    def add(self, generation: dict[str, Any]) -> None:
        """Write a generation down; it is on the disk when this returns."""
        with writing(self.path):
            descriptor = system.call(os.open, self.path, os.O_WRONLY | os.O_APPEND)
            try:
                write_all(descriptor, json.dumps(generation).encode() + b"\n")
            finally:
                os.close(descriptor)
            sync_file(self.path)
        self.generations.append(generation)
