"""Whether an adapter says that it was trained on another model, or revision, than the base it is put on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io.read.small import read_json, read_small, short
from weightsmith.io.read.source import Origin

__all__ = ["other_base"]

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_QUANTISED = re.compile(r"(?:^|[-_.])(?:[2-8]-?bits?|int[48]|fp[48]|bnb|nf4|gptq|awq|dwq|mxfp[48]|nvfp4)(?:$|[-_.])")
"""A part of a name that says so, as mlx-community and unsloth call their models."""
_LIMIT = 16_000_000  # bytes of config.json


def other_base(config: Mapping[str, Any], base: Origin) -> str | None:
    """What to say where the two differ, as far as names tell; None where they do not, or the adapter says nothing."""
    said, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(said, str) or not said:
        return None
    name, commit = _hub(base)
    if _quantised(said) and not _same_place(said, base):
        return (
            f"says it was trained on {short(said)}, a quantised model, and is put on {base.label}: some of what it "
            "learnt makes up for rounding that is not there"
        )
    if _last(said) != _last(name) and not _same_place(said, base):
        return (
            f"says it was trained on {short(said)}, and is put on {base.label}: make sure that these are the same model"
        )
    if not isinstance(revision, str) or not revision or not commit or _is(revision, commit, base):
        return None
    return f"says it was trained on revision {short(revision)} of {short(said)}, and is put on {commit[:12]}"


def _hub(base: Origin) -> tuple[str, str]:
    """(hub id or path, commit or '') of a base, from where its files lie in the hub's cache."""
    folder = base.folder
    if folder is not None and folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder) if folder is not None else base.label, ""


def _last(name: str) -> str:
    """The last part of a path or hub id, without a revision: what a model is called wherever it lies."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].partition("@")[0].lower()


def _quantised(said: str) -> bool:
    """Whether a base is quantised, by its config.json if it lies here, else by its name."""
    path = Path(said) / "config.json"
    try:
        here = path.is_file()
    except OSError:
        return False
    if not here:
        return _QUANTISED.search(_last(said)) is not None
    try:
        config = read_json(path, _LIMIT)
    except SourceError:
        return False
    return isinstance(config, dict) and any(config.get(field) for field in ("quantization", "quantization_config"))


def _same_place(said: str, base: Origin) -> bool:
    path = Path(said)
    try:
        return base.folder is not None and path.exists() and path.samefile(base.folder)
    except OSError:
        return False


def _is(revision: str, commit: str, base: Origin) -> bool:
    """Whether a branch, tag or commit is this commit, as the cache knows it."""
    if _COMMIT.fullmatch(revision):
        return commit.startswith(revision)
    assert base.folder is not None
    noted = base.folder.parent.parent / "refs" / revision
    return base.label.endswith(f"@{revision}") or (
        noted.is_file() and read_small(noted, 1000).strip() == commit.encode()
    )
