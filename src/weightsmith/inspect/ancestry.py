"""What a model was made from, and that from what: the tree of recipes in the manifests (weightsmith.json)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import WeightsmithError
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.io.read.adapter import CONFIG
from weightsmith.io.read.hub import PREFIX
from weightsmith.io.read.open import expanded, open_source
from weightsmith.jobs.verify import lasting

__all__ = ["Node", "ancestry", "tree_lines"]

_DEEPEST = 100

May = Callable[[Path], bool]


@dataclass(frozen=True)
class Node:
    """A model and what it was made from.

    name      what the recipe above calls it ('base', 'math'); '' at the top
    model     path or hub id, or '' for a nested recipe
    kind      'merge', 'codec', 'moe', ... as its manifest says; 'recipe' (nested), 'adapter', or 'model' (no manifest)
    how       method and parameters in a line, '' for what was not made here
    version   of weightsmith that made it
    notes     what to know of it: not there any more, changed since, a damaged manifest
    """

    name: str
    model: str
    kind: str
    how: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()
    parts: tuple[Node, ...] = ()


def ancestry(out: Path, may: May = lambda path: True) -> Node:
    """The tree behind the folder `out`; OutputError if it has no manifest, or a damaged one.

    Manifests of its inputs are followed where the inputs still are; of those that are gone, what the manifest above has
    taken over from theirs.  Nothing but manifests, configs and headers is
    read, nothing is downloaded.

    may  whether a path may be looked at; what may not counts as elsewhere
    """
    return _made("", str(out), out, read_manifest(out), (), (), may)


def tree_lines(node: Node) -> list[str]:
    """The tree as lines of text."""
    lines = [_line(node)]
    for i, part in enumerate(node.parts):
        last = i == len(node.parts) - 1
        first, *rest = tree_lines(part)
        lines.append(("└─ " if last else "├─ ") + first)
        lines += [("   " if last else "│  ") + line for line in rest]
    return lines


def _line(node: Node) -> str:
    what = {"model": "", "recipe": "nested recipe", "adapter": "adapter"}.get(node.kind, node.kind)
    told = ": ".join(word for word in (what, node.how) if word)
    version = f"weightsmith {node.version}" if node.version else ""
    words = "; ".join(word for word in (told, version, *node.notes) if word)
    return " ".join(part for part in (f"{node.name}:" if node.name else "", node.model, f"({words})" if words else "")
                    if part)  # fmt: skip


def _made(
    name: str,
    model: str,
    folder: Path,
    manifest: Mapping[str, Any],
    notes: tuple[str, ...],
    above: tuple[Path, ...],
    may: May,
) -> Node:
    """The node of a folder with a manifest."""
    recipe = manifest["recipe"]
    return Node(
        name,
        model,
        manifest["kind"],
        _how(recipe),
        str(manifest.get("weightsmith", "")),
        notes,
        tuple(_parts(recipe, manifest["inputs"], (*above, folder.resolve()), manifest.get("made_from"), may)),
    )


def _parts(
    recipe: Mapping[str, Any], inputs: Mapping[str, Any], above: tuple[Path, ...], told: Any, may: May
) -> Iterator[Node]:
    """The models that a recipe names, in its order; `told`: what the manifest says of those that were made here."""
    told = told if isinstance(told, dict) else {}
    if recipe.get("base") is not None:
        yield from _part("base", recipe["base"], inputs.get("base"), above, told.get("base"), may)
    for group in ("models", "experts", "shared"):
        named = recipe.get(group)
        for name, ref in named.items() if isinstance(named, dict) else ():
            yield from _part(name, ref, inputs.get(name), above, told.get(name), may)


def _part(name: str, ref: Any, noted: Any, above: tuple[Path, ...], told: Any, may: May) -> Iterator[Node]:
    if isinstance(ref, str):
        yield _model(name, ref, noted, above, told, may)
        return
    if not isinstance(ref, dict):
        return
    model = ref.get("model", ref)
    if isinstance(model, str):
        yield _model(name, model, noted, above, told, may)
    elif isinstance(model, dict) and "models" in model:
        inner = noted.get("inputs", {}) if isinstance(noted, dict) else {}
        yield Node(name, "", "recipe", _how(model), parts=tuple(_parts(model, inner, above, None, may)))
    elif isinstance(model, dict):  # put together of several models: slices, modules
        named = {f"slice {i}": part for i, part in enumerate(model.get("slices") or ())}
        named |= {name: part.get("model") for name, part in (model.get("modules") or {}).items()}
        found = [node for part, inner in named.items() for node in _part(part, inner, None, above, None, may)]
        yield Node(name, "", "recipe", "slices" if "slices" in model else "modules", parts=tuple(found))
    if isinstance(ref.get("adapter"), str):
        yield _model(f"{name} adapter", ref["adapter"], None, above, None, may)


def _model(name: str, model: str, noted: Any, above: tuple[Path, ...], told: Any, may: May) -> Node:
    """The node of a path or hub id; its own manifest is followed, or if it is gone what is told of that."""
    path = expanded(Path(model))
    try:
        there = path.exists() if may(path) else None
    except (OSError, ValueError):
        there = False
    if not there:
        hub = model.startswith(PREFIX) or (model.count("/") == 1 and not model.startswith((".", "/", "~")))
        gone = () if hub else ("no longer there",) if there is False else ("elsewhere; not looked at",)
        if not isinstance(told, dict) or not isinstance(recipe := told.get("recipe"), dict) or len(above) > _DEEPEST:
            return Node(name, model, "model", notes=gone)
        parts = tuple(_parts(recipe, {}, (*above, path), told.get("made_from"), may))
        return Node(name, model, str(told.get("kind", "")), _how(recipe), str(told.get("weightsmith", "")), gone, parts)
    notes = _changed(path, noted)
    if not (path / MANIFEST).is_file():
        return Node(name, model, "adapter" if (path / CONFIG).is_file() else "model", notes=notes)
    if path.resolve() in above or len(above) > _DEEPEST:
        return Node(name, model, "model", notes=(*notes, "stands above already; not followed"))
    try:
        return _made(name, model, path, read_manifest(path), notes, above, may)
    except WeightsmithError as error:
        return Node(name, model, "model", notes=(*notes, str(error)))


def _changed(path: Path, noted: Any) -> tuple[str, ...]:
    """Whether the files are still those that the manifest above noted (by size and header)."""
    while isinstance(noted, dict) and "files" not in noted and isinstance(noted.get("source"), dict):
        noted = noted["source"]  # a view
    if not isinstance(noted, dict) or "files" not in noted:
        return ()
    try:
        now = open_source(path).fingerprint().get("files")
    except WeightsmithError as error:
        return (f"cannot be opened any more: {error}",)
    same = now is None or lasting(json.loads(json.dumps(now))) == lasting(noted["files"])
    return () if same else ("changed since",)


def _how(recipe: Mapping[str, Any]) -> str:
    """A recipe's method in a line."""
    if "experts" in recipe:
        return f"{len(recipe['experts'])} experts, router {recipe.get('router', 'hidden')}"
    common = recipe.get("parameters") or {}
    stages = recipe.get("method") or ()
    words = []
    for i, stage in enumerate(stages if isinstance(stages, (list, tuple)) else [stages]):
        name = stage.get("name", "?") if isinstance(stage, dict) else str(stage)
        own = {**(stage.get("parameters") or {} if isinstance(stage, dict) else {}), **(common if i == 0 else {})}
        words.append(name + (f"({', '.join(f'{k}={_short(v)}' for k, v in own.items())})" if own else ""))
    return " | ".join(words)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
