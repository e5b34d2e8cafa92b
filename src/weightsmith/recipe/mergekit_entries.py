"""The entries of mergekit's configs: models, their parameters and layers, each checked where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import did_you_mean
from weightsmith.recipe.mergekit_methods import Known
from weightsmith.recipe.mergekit_values import Level
from weightsmith.recipe.reader import Place

__all__ = ["Entries", "Input"]


@dataclass(frozen=True)
class Input:
    """One model of a merge: reference as (model, adapter), own parameters, layers, and its place."""

    model: str
    adapter: str | None
    place: Place
    parameters: Level
    layers: tuple[int, int] | None = None

    @property
    def identity(self) -> tuple[str, str | None]:
        return self.model, self.adapter


@dataclass
class Entries:
    """Reads the entries of one config; what is wrong goes to `problems`.

    base   the base model where an entry stands: the config's, or the slice's own
    """

    method: str
    known: Known
    problems: list[tuple[Place, str]]
    base: Input | None = None

    def say(self, place: Place, text: str) -> None:
        self.problems.append((place, text))

    def reference(self, value: Any, place: Place, parameters: Level) -> Input | None:
        """'path@revision+adapter', or the same as a mapping with model and lora."""
        words: list[Any] = value.split("+") if isinstance(value, str) else [value]
        if isinstance(value, Mapping):
            for key in value.keys() - {"model", "lora"}:
                self.say((*place, key), f"unknown key {key!r} in a model{did_you_mean(str(key), ('model', 'lora'))}")
            words = [value.get("model"), *([value["lora"]] if value.get("lora") is not None else [])]
        paths = [_path(word) for word in words]
        if len(paths) > 2 or any(path is None for path in paths):
            self.say(place, f"{value!r} is no model; write path[@revision][+adapter]")
            return None
        return Input(str(paths[0]), paths[1] if len(paths) == 2 else None, place, parameters)

    def level(self, tree: Mapping[str, Any], place: Place) -> Level:
        """The `parameters` of one level; what the method does not have is an error."""
        values, place = tree.get("parameters") or {}, (*place, "parameters")
        if not isinstance(values, Mapping):
            self.say(place, f"parameters should be a mapping, is {values!r}")
            return Level({}, place)
        known = self.known.settings
        for name in values.keys() - set(known):
            takes = did_you_mean(str(name), known) or "; it takes none"
            self.say((*place, name), f"{self.method} has no parameter {name!r}, mergekit would ignore it{takes}")
        return Level({n: v for n, v in values.items() if n in known}, place)

    def input(self, entry: Any, place: Place, *, sliced: bool) -> Input | None:
        """One entry of models, or of a slice's sources."""
        options = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
        if not isinstance(entry, Mapping) or "model" not in entry:
            self.say(place, f"should be a mapping with {', '.join(options)}; is {entry!r}")
            return None
        for key in entry.keys() - set(options):
            where = f"; {key!r} belongs under parameters" if key in self.known.settings else did_you_mean(key, options)
            self.say((*place, key), f"unknown key {key!r}{where}")
        own = self.level(entry, place)
        found = self.reference(entry["model"], (*place, "model"), own)
        if found is None:
            return None
        is_base = self.base is not None and found.identity == self.base.identity
        for name in own.values:
            scope = self.known.settings[name].scope
            if scope == "shared":
                self.say((*own.place, name), f"{name} is one for all models, mergekit would ignore it here; "
                                             f"move it to the parameters of the whole merge")  # fmt: skip
            elif scope == "model" and is_base:
                self.say((*own.place, name), f"the base model has no {name}, mergekit would ignore it; leave it out")
        layers = entry.get("layer_range")
        if not sliced:
            return found
        numbers = [n for n in layers if type(n) is int] if isinstance(layers, list) and len(layers) == 2 else []
        if len(numbers) < 2 or not 0 <= numbers[0] < numbers[1]:
            self.say(
                (*place, "layer_range"), f"layer_range should be [start, end] with 0 <= start < end, is {layers!r}"
            )
            return None
        return Input(found.model, found.adapter, found.place, own, (numbers[0], numbers[1]))


def _path(word: Any) -> str | None:
    """'path@revision' of a word, or of {path, revision}."""
    if isinstance(word, Mapping) and isinstance(word.get("path"), str):
        revision = word.get("revision")
        return f"{word['path']}@{revision}" if revision is not None else word["path"]
    return word if isinstance(word, str) and word.strip() else None
