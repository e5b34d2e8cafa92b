"""The recipe files in the folders, and drafts of them, which outlive the browser."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from weightsmith.core.errors import OutputError, RecipeError, SourceError, WeightsmithError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, writing
from weightsmith.io.read.small import read_json
from weightsmith.recipe.files import text_of
from weightsmith.studio.places import Places

__all__ = ["NEW", "Claim", "ClashError", "Drafts", "State", "alike", "digest"]

NEW = "models: {}\nmethod: task_arithmetic\n"
_DRAFT = 2_000_000
_WRITES = Lock()
"""Between looking at what is there and writing; the requests of two tabs are threads of one server."""


@dataclass(frozen=True)
class State:
    """A recipe as it stands here.

    text    what was typed last, else what the file holds
    file    digest of the file; '' if there is none
    ground  digest of the file that the text was begun on
    tab     the tab that typed it; '' for what is saved, or was made by another page
    """

    text: str
    saved: bool
    file: str
    ground: str
    tab: str = ""

    @property
    def seen(self) -> str:
        return digest(self.text)


@dataclass(frozen=True)
class Claim:
    """What a tab goes back to: the file (`ground`) and the text (`seen`) that it has shown, and its own name."""

    ground: str = ""
    seen: str = ""
    tab: str = ""


class ClashError(WeightsmithError):
    """Something else has changed a recipe that is open: its file, or (`typed`) what is typed and not saved.

    text  what the tab wished to keep
    """

    def __init__(self, path: Path, now: State, typed: bool, text: str | None = None) -> None:
        if typed:
            said = "was changed in another tab, where it is not saved yet; take that, or go on with what is shown here"
        elif now.file:
            said = "has changed on disk since it was opened here; reload it, or overwrite it with what is shown here"
        else:
            said = "was deleted since it was opened here; let it go, or write it again as it is shown here"
        super().__init__(f"{path.name} {said}")
        self.now, self.typed, self.text = now, typed, text

    @property
    def mark(self) -> str:
        """What a page that has told of it need not be told again."""
        return f"{self.now.file}.{self.now.seen}"


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

    def state(self, path: Path) -> State:
        """The text and where it comes from: a draft goes before the file."""
        held = text_of(path) if path.exists() else None
        saved, file = (None, "") if held is None else (alike(held), digest(held))
        with suppress(SourceError, OSError, KeyError, TypeError):
            noted = read_json(self._draft(path), _DRAFT)
            draft, ground, tab = noted["text"], noted.get("ground", file), noted.get("tab", "")
            if isinstance(draft, str) and draft != saved:
                return State(draft, False, file, str(ground), str(tab))
        return State(NEW, False, file, file) if saved is None else State(saved, True, file, file)

    def found(self, path: Path) -> State:
        """The state of a recipe that was begun; RecipeError with the nearest file if nobody did."""
        state = self.state(path)
        if not state.file and not self._draft(path).exists():
            text_of(path)
        return state

    def keep(self, path: Path, text: str, claim: Claim | None = None) -> State:
        """Keep what was typed, apart from the file; ClashError if that would lose what another tab has typed."""
        with _WRITES:
            now = self.state(path)
            if claim is None:
                claim = Claim(now.ground, now.seen)
            self._unlost(path, now, claim, text)
            if now.file and text == alike(text_of(path)):
                self._forget(path)  # nothing is left to save
                return self.state(path)
            with writing(self._drafts):
                system.call(self._drafts.mkdir, parents=True, exist_ok=True)
            noted = {"path": str(path), "text": text, "ground": claim.ground, "tab": claim.tab}
            replace_file(self._draft(path), json.dumps(noted).encode())
            return self.state(path)

    def save(self, path: Path, text: str, claim: Claim) -> State:
        """Write the file; ClashError if it is not what the tab goes back to, or another tab's draft would be lost."""
        with _WRITES:
            now = self.state(path)
            self.check(path, now, claim, text)
            if not path.parent.is_dir():
                raise OutputError(f"{path.parent}: no such folder; make it first")
            if not now.file or text != alike(text_of(path)):
                replace_file(path, text.encode())
            self._forget(path)
            return self.state(path)

    def check(self, path: Path, now: State, claim: Claim, text: str | None = None) -> None:
        """ClashError where something else has changed what a tab shows, to other than `text`."""
        self._unlost(path, now, claim, text)
        if claim.ground != now.file and (not now.file or text != alike(text_of(path))):
            raise ClashError(path, now, False, text)

    def _unlost(self, path: Path, now: State, claim: Claim, text: str | None = None) -> None:
        drafted = not now.saved and self._draft(path).exists()
        if drafted and now.tab != claim.tab and claim.seen != now.seen and text != now.text:
            raise ClashError(path, now, True, text)

    def forget(self, path: Path, claim: Claim) -> None:
        """Go back to what is saved; ClashError if that would lose what another tab has typed."""
        with _WRITES:
            self._unlost(path, self.state(path), claim)
            self._forget(path)

    def _forget(self, path: Path) -> None:
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


def digest(text: str) -> str:
    """A short mark of a text, as its file would hold it."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def alike(text: str) -> str:
    """A text as browsers show it, and send it but for the ends of its lines."""
    return text.replace("\r\n", "\n")
