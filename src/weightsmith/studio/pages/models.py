"""The models in the folders, and what one of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.core.keys import Key
from weightsmith.io import system
from weightsmith.studio import hub
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.drafts import Drafts
from weightsmith.studio.known import near
from weightsmith.studio.shelf import shelf
from weightsmith.studio.tables import Table

__all__ = ["home", "model", "models"]

_CARD = 200_000


def home(studio: Studio, asked: Asked) -> Any:
    return go("/models", asked)


def models(studio: Studio, asked: Asked) -> Any:
    found = shelf(studio.places)
    recipes = [*found.recipes, *Drafts(studio.places).unsaved()]
    return html(
        "models.html", title="Models", page="models", shelf=found, hub=hub.cached(), hub_folder=hub.cache(),
        folders=[str(one) for one in studio.places.folders], recipes=list(map(studio.places.shown, recipes)),
    )  # fmt: skip


def model(studio: Studio, asked: Asked) -> Any:
    """One model: what its headers say.  Nothing of it is loaded."""
    from weightsmith.io.read.open import open_source

    path = studio.places.inside(asked("path"))
    if not path.exists():
        names = [one.name for one in shelf(studio.places, details=False).models]
        raise SourceError(f"{asked('path')}: there is no such model{near(asked('path'), names) or ' any more'}")
    keys: tuple[Key, ...] = ()
    label, problems = "", []
    if outside := list(studio.places.strangers([str(path)], studio.places.home)):
        problems = [f"{one}: leads out of the folders that the studio was started with" for one in outside]
    else:
        try:
            source = open_source(path)
            keys, label = tuple(source.keys.values()), source.origin.label
        except WeightsmithError as error:
            problems = [str(error)]
    rows = [(key.name, "×".join(map(str, key.shape)) or "scalar", key.dtype, key.nbytes) for key in keys]
    table = Table(("tensor", "shape", "dtype", "bytes"), rows, asked, "model")
    if asked.partial:
        return html("tensors.html", table=table)
    dtypes = sorted({key.dtype for key in keys})
    held = [] if problems else [("tensors", f"{len(keys):,}"), ("weights", f"{sum(k.numel for k in keys):,}")]
    facts = [("from", label), *held, ("dtypes", ", ".join(dtypes)), ("folder", str(path))]
    return html("model.html", title=asked("path"), page="models", name=asked("path"), table=table, problems=problems,
                facts=[(name, text) for name, text in facts if text], card=_card(studio, path))  # fmt: skip


def _card(studio: Studio, path: Path) -> str:
    """The model card as text, for people to read; nothing in it is markup here."""
    file = path / "README.md"
    try:
        if path.is_dir() and file.is_file() and studio.places.holds(file):
            return system.read_file(file, _CARD).decode(errors="replace")
    except OSError:
        pass
    return ""
