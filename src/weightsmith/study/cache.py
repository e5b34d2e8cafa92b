"""What was measured, kept line by line, so that a repeated or interrupted study measures nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io.disk import write_all, writing

__all__ = ["Ledger", "engine", "fingerprint"]


def fingerprint(*parts: Any) -> str:
    """16 hex digits over anything JSON can hold; the order of mappings counts, as that of models does."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@cache
def engine() -> str:
    """Fingerprint of the code that decides a merge: scores of another version are measured again."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in ("core", "engine", "inputs", "io", "jobs", "kernels", "methods", "ops", "plan", "recipe"):
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Ledger:
    """Records by key in a file of JSON lines.  Lines are written whole; torn ones are left out."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Mapping[str, Any]] = {}
        self.fresh = 0  # measured by this process
        try:
            text = file.read_text("utf-8") if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"{file}: the scores of earlier runs cannot be read ({error}); delete the file") from None
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue  # the run that wrote it was killed in the middle of it

    def get(self, key: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The record under `key`; measured and written down if there is none."""
        if key not in self.known:
            self.put(key, measure())
        return self.known[key]

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Write down a record that was just measured."""
        self._append({"key": key, "value": value})
        self.known[key] = value
        self.fresh += 1

    def _append(self, record: Mapping[str, Any]) -> None:
        line = ("\n" if self._torn else "") + json.dumps(record) + "\n"
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                write_all(descriptor, line.encode())
            finally:
                os.close(descriptor)
        self._torn = False
