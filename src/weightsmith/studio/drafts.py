"""The recipe files in the folders, and drafts of them, which outlive the browser."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from weightsmith.core.errors import OutputError, RecipeError, SourceError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, writing
from weightsmith.io.read.small import read_json
from weightsmith.recipe.files import text_of
from weightsmith.studio.places import Places

__all__ = ["NEW", "Drafts"]

NEW = "models: {}\nmethod: task_arithmetic\n"
_DRAFT = 2_000_000


class Drafts:
    """The recipe files in the folders, and what is typed and not saved yet."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._drafts = places.state / "drafts"

    def path(self, name: str) -> Path:
        """The file of a recipe by the name that it is shown under."""
        path = self.places.inside(name)
        if path.suffix not in (".yaml", ".yml"):
            raise RecipeError(f"{name!r}: a recipe's file ends in .yaml")
        return path

    def text(self, path: Path) -> tuple[str, bool]:
        """The text, and whether it is saved: a draft goes before the file."""
        saved = text_of(path) if path.exists() else None
        with suppress(SourceError, OSError, KeyError, TypeError):
            draft = read_json(self._draft(path), _DRAFT)["text"]
            if isinstance(draft, str) and draft != saved:
                return draft, False
        return (NEW, False) if saved is None else (saved, True)

    def keep(self, path: Path, text: str) -> None:
        """Keep what was typed, apart from the file."""
        with writing(self._drafts):
            system.call(self._drafts.mkdir, parents=True, exist_ok=True)
        replace_file(self._draft(path), json.dumps({"path": str(path), "text": text}).encode())

    def save(self, path: Path, text: str) -> None:
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder; make it first")
        replace_file(path, text.encode())
        self.forget(path)

    def forget(self, path: Path) -> None:
        """Go back to what is saved."""
        with suppress(OSError):
            system.call(self._draft(path).unlink)

    def unsaved(self) -> list[Path]:
        """Recipes that were begun and never saved."""
        found = []
        with suppress(OSError):
            for file in sorted(system.call(list, self._drafts.glob("*.json"))):
                with suppress(SourceError, KeyError, TypeError):
                    path = Path(read_json(file, _DRAFT)["path"])
                    found += [path] if self.places.holds(path) and not path.exists() else []
        return found

    def _draft(self, path: Path) -> Path:
        return self._drafts / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
