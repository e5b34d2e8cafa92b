"""The hub's cache on this machine: which models it holds.  Of them only names, configs and cards are read here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from weightsmith.io import system
from weightsmith.studio.places import Places
from weightsmith.studio.shelf import Model, Shelf, shelve

__all__ = ["cache", "cached", "holds"]

_PREFIX = "models--"


def cache() -> Path:
    """Where downloads lie."""
    home = os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def cached(details: bool = True) -> list[Model]:
    """The models in the cache under their ids, each as its newest snapshot; those without weights are left out."""
    folder = cache()
    try:
        top = folder.resolve()
        names = sorted(path.name for path in system.call(list, top.iterdir()))
    except (OSError, RuntimeError):
        return []
    found = []
    for name in names:
        if name.startswith(_PREFIX) and (snapshot := _snapshot(top / name)) is not None:
            shelf = Shelf()
            try:
                files = sorted(path.name for path in system.call(list, snapshot.iterdir()))
            except OSError:
                continue
            shelve(shelf, snapshot, files, Places((top,)), details)
            found += [replace(one, name=name.removeprefix(_PREFIX).replace("--", "/")) for one in shelf.models[:1]]
    return found


def holds(text: str) -> bool:
    """Whether a text is the id of a model in the cache."""
    return "/" in text and any(one.name == text for one in cached(details=False))


def _snapshot(folder: Path) -> Path | None:
    """That of the branch main, else the one that came last."""
    try:
        snapshots = folder / "snapshots"
        main = folder / "refs/main"
        if main.is_file():
            named = system.read_file(main, 100).decode("ascii", "replace").strip()
            if named.isalnum() and (snapshots / named).is_dir():
                return snapshots / named
        there = [path for path in system.call(list, snapshots.iterdir()) if path.is_dir()]
        return max(there, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None
