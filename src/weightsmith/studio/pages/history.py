"""What was made in the folders: every result with its manifest, and what it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, WeightsmithError
from weightsmith.inspect.ancestry import Node, ancestry
from weightsmith.io.package.card import yaml_text
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.recipe.text import dumps
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.drafts import Drafts
from weightsmith.studio.pages.recipe import fresh
from weightsmith.studio.recipes import look
from weightsmith.studio.render import address
from weightsmith.studio.shelf import shelf

__all__ = ["again", "every", "one"]

_LONGEST = 200_000


def every(studio: Studio, asked: Asked) -> Any:
    found: list[dict[str, Any]] = []
    for folder in shelf(studio.places, details=False).results:
        try:
            node = ancestry(folder, studio.places.holds)
            row = {"kind": node.kind, "how": node.how, "version": node.version, "parts": len(node.parts), "bad": ""}
        except WeightsmithError as error:
            row = {"kind": "–", "how": "", "version": "", "parts": 0, "bad": str(error)}
        found.append({"name": studio.places.shown(folder), "when": (folder / MANIFEST).stat().st_mtime, **row})
    found.sort(key=lambda row: -row["when"])
    return html("history.html", title="History", page="history", results=found)


def one(studio: Studio, asked: Asked) -> Any:
    """One result: its recipe, the tree behind it, its files."""
    folder = studio.places.inside(asked("path"))
    manifest = read_manifest(folder)
    output = manifest.get("output", {})
    files = output.get("files", {}) if isinstance(output, Mapping) else {}
    tensors = output.get("tensors", {}) if isinstance(output, Mapping) else {}
    facts = [
        ("kind", str(manifest["kind"])), ("weightsmith", str(manifest.get("weightsmith", ""))),
        ("tensors", f"{len(tensors):,}"), ("files", f"{len(files):,}"),
    ]  # fmt: skip
    recipe = _short(studio, manifest["recipe"]) if manifest["kind"] == "merge" else yaml_text(manifest["recipe"])
    return html(
        "result.html", title=asked("path"), page="history", name=studio.places.shown(folder), facts=facts,
        tree=_leaf(studio, ancestry(folder, studio.places.holds)), recipe=recipe, manifest=_manifest(manifest),
        merged=manifest["kind"] in ("merge", "codec"),
        jobs=[job for job in studio.jobs.all() if job.about.get("out") == studio.places.shown(folder)],
    )  # fmt: skip


def _short(studio: Studio, recipe: Mapping[str, Any]) -> str:
    """A recipe of a manifest as one would write it; as it stands there where it cannot be read any more."""
    text = yaml_text(recipe)
    found = look(studio.places, studio.places.home / "recipe.yaml", text).recipe
    text = text if found is None else dumps(found)
    return re.sub(rf"(?<![\w/.-]){re.escape(str(studio.places.home))}/", "./", text)  # as it is typed there


def _leaf(studio: Studio, node: Node) -> dict[str, Any]:
    """A node of the graph with the page about it."""
    label, href = node.model or node.kind, ""
    path = Path(node.model) if node.model else None
    if path is not None and path.is_absolute() and studio.places.holds(path):
        label = studio.places.shown(path)
        if path.exists():
            href = address("history/of" if (path / MANIFEST).exists() else "model", path=label)
    return {
        "name": node.name, "label": label, "href": href, "how": node.how, "kind": node.kind, "notes": node.notes,
        "parts": [_leaf(studio, part) for part in node.parts],
    }  # fmt: skip


def _manifest(manifest: Mapping[str, Any]) -> str:
    """A manifest as it stands in the folder, but for the lists of tensors, which may be long."""
    shown = {
        name: {key: f"{len(one)} of them" if key == "tensors" and isinstance(one, Mapping) else one
               for key, one in value.items()} if isinstance(value, Mapping) else value
        for name, value in manifest.items()
    }  # fmt: skip
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\n… see {MANIFEST}"


def again(studio: Studio, asked: Asked) -> Any:
    """Take the recipe of a result as a new one, to change it and run it."""
    manifest = read_manifest(studio.places.inside(asked("path")))
    recipe = manifest["recipe"]
    if not isinstance(recipe, Mapping) or "models" not in recipe:
        raise RecipeError(f"this was made by weightsmith {manifest['kind']}, whose recipes have no form here")
    drafts = Drafts(studio.places)
    name = fresh(studio, [*shelf(studio.places, details=False).recipes, *drafts.unsaved()])
    drafts.keep(drafts.path(name), _short(studio, recipe))
    return go(address("recipe", path=name), asked)
