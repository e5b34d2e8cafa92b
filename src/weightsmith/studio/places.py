"""The folders that the studio was started with: nothing outside them is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.io import system

__all__ = ["OutsideError", "Places", "strings"]

STATE = ".weightsmith-studio"
_LONGEST, _PATH = 230, 3000
"""Bytes of a name, with room for the endings that results and half-written files get; letters of a path."""


class OutsideError(WeightsmithError):
    """A path that leads out of the folders."""


@dataclass(frozen=True)
class Places:
    """The folders, as real paths; the first is where commands run and where the studio keeps its state."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, folders: tuple[Path, ...]) -> Places:
        """Raises SourceError for what is not a folder."""
        for folder in folders:
            if not folder.expanduser().is_dir():
                raise SourceError(f"{folder}: expected a folder with models and recipes; make it, or name another")
        return cls(tuple(dict.fromkeys(folder.expanduser().resolve() for folder in folders)))

    @property
    def home(self) -> Path:
        return self.folders[0]

    @property
    def state(self) -> Path:
        return self.home / STATE

    def holds(self, path: Path) -> bool:
        """Whether a path, symbolic links followed, is inside one of the folders."""
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        return any(real == folder or folder in real.parents for folder in self.folders)

    def inside(self, text: str, folder: Path | None = None) -> Path:
        """The path that a text means, from the first folder (or another) on; OutsideError if it leads out of them."""
        path = (folder or self.home) / text
        if "\0" in text or not self.holds(path):
            raise OutsideError(f"{text!r} is outside the folders that the studio was started with")
        if Path(text).parts[:1] and Path(text).parts[0].startswith("~"):
            raise OutsideError(f"{text!r}: commands take ~ for a home folder; write the path from the first folder on")
        real = path.resolve()
        if real == self.state or self.state in real.parents:
            raise OutsideError(f"{text!r}: the studio keeps its own jobs and drafts there; name another place")
        if any(len(part.encode(errors="replace")) > _LONGEST for part in path.parts) or len(text) > _PATH:
            raise SourceError(f"{text[:40]}…: the name is too long for a file")
        return path

    def shown(self, path: Path) -> str:
        """A path as short as it can be typed from the first folder; never one that a command takes for an option."""
        real = path if path.is_absolute() else self.home / path
        text = os.path.relpath(real, self.home) if self.home in real.parents or real == self.home else str(real)
        return f"./{text}" if text.startswith("-") else text

    def strangers(self, tree: Any, folder: Path) -> Iterator[str]:
        """The words of a parsed file that lead out of the folders: paths, links, addresses.

        A folder counts with what lies in it: a link to a weight file elsewhere is a way out as well.
        """
        for text in filter(None, strings(tree)):
            if "://" in text:
                yield text
                continue
            try:
                path = folder / Path(text).expanduser()
                entries = [path, *(system.call(list, path.iterdir()) if path.is_dir() else ())]
            except (OSError, ValueError, RuntimeError):
                continue  # no path at all
            if not all(self.holds(entry) for entry in entries):
                yield text


def strings(tree: Any) -> Iterator[str]:
    """Every text among the values of a parsed file that may be a path; templates of chats are not."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key != "chat_template":
                yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree
