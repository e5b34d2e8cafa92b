"""A seal on what the studio itself has queued, so that a folder from elsewhere cannot bring commands along.

The key lies with the user's other state, never in the folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, writing

__all__ = ["sealed", "unbroken"]

_SEAL = "seal"


def sealed(number: str, noted: Mapping[str, Any]) -> bytes:
    """What is noted of a job, as JSON, with a seal over it and its number."""
    plain = {name: value for name, value in noted.items() if name != _SEAL}
    return json.dumps({**plain, _SEAL: _seal(number, plain)}).encode()


def unbroken(number: str, noted: Mapping[str, Any]) -> bool:
    """Whether a note is one of this user's studio."""
    plain = {name: value for name, value in noted.items() if name != _SEAL}
    given = noted.get(_SEAL)
    return isinstance(given, str) and hmac.compare_digest(given.encode(), _seal(number, plain).encode())


def _seal(number: str, plain: Mapping[str, Any]) -> str:
    text = json.dumps([number, plain], sort_keys=True)
    home = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return hmac.new(_key(Path(home) / "weightsmith/studio.key"), text.encode(), hashlib.sha256).hexdigest()


@cache
def _key(file: Path) -> bytes:
    """The user's key, made at first use; where it cannot be kept, one for this process alone."""
    with suppress(OSError):
        if len(found := system.read_file(file, 100)) == 32:
            return found
    made = secrets.token_bytes(32)
    with suppress(OutputError), writing(file):
        system.call(file.parent.mkdir, parents=True, exist_ok=True, mode=0o700)
        replace_file(file, made)
        system.call(file.chmod, 0o600)
    return made
