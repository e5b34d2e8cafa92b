"""One of mergekit's merges (models, method, settings) as a native recipe in plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.method import registry
from weightsmith.recipe.mergekit_methods import METHODS, REQUIRED, Setting
from weightsmith.recipe.mergekit_schema import Reference
from weightsmith.recipe.mergekit_values import Bad, Level, Window, native_value
from weightsmith.recipe.reader import Location

__all__ = ["Model", "Writer"]


@dataclass(frozen=True)
class Model:
    """One model of a merge: its location, own parameters and layers."""

    reference: Reference
    location: Location
    parameters: Level
    layers: tuple[int, int] | None = None


@dataclass
class Writer:
    """Writes recipes for one config.

    model     what stands for a model's path, given its entry and its native location (a named merge is a recipe)
    mark      notes that a native location comes from a location of the config
    refused   a problem's line, given its location in the config and its text
    """

    method: str
    model: Callable[[Model, Location], Any]
    mark: Callable[[Location, Location], None]
    refused: Callable[[Location, str], str]
    problems: list[str] = field(default_factory=list)

    def finish(self) -> None:
        if self.problems:
            raise RecipeError(*dict.fromkeys(self.problems))

    def reference(self, source: Model, native: Location) -> dict[str, Any]:
        """A model as a recipe names it."""
        self.mark((*native, "model"), source.location)
        found: dict[str, Any] = {"model": self.model(source, (*native, "model"))}
        if source.reference.adapter is not None:
            found["adapter"] = source.reference.adapter
        if source.layers is not None:
            found["layers"] = list(source.layers)
        return found

    def recipe(
        self, models: Sequence[Model], base: Reference | None, levels: Sequence[Level], native: Location, window: Window
    ) -> dict[str, Any]:
        """The recipe, whose location is `native`; `window` is where its layers stand in the output."""
        known = METHODS[self.method]
        counted = known.base == "counted"  # the model that lends its config and tokenizer comes first
        aside = None if counted else next((m for m in models if m.reference == base), None)
        inputs = [m for m in models if m is not aside]
        if counted and base is not None:
            inputs.sort(key=lambda m: m.reference != base)
        if not inputs:
            raise RecipeError(self.refused(("merge_method",), "there is no model besides the base"))
        named: dict[str, Model] = {}
        for source in inputs:
            named[_name(source.reference.adapter or source.reference.model, named)] = source
        tree: dict[str, Any] = {}
        if aside is not None:
            tree["base"] = self.reference(aside, (*native, "base"))
        tree["models"] = {n: self.reference(s, (*native, "models", n)) for n, s in named.items()}
        self.mark((*native, "models"), inputs[0].location)
        self.mark((*native, "method"), ("merge_method",))
        found = {name: self.values(name, setting, named, levels, window) for name, setting in known.settings.items()}
        written = {known.settings[name].native: value for name, value in found.items() if value is not None}
        stages = known.stages({name: next(iter(values.values()))[0] for name, values in written.items()})
        tree["method"] = stages[0] if len(stages) == 1 else stages
        taken = _parameters(stages)
        for name, values in written.items():
            if name in taken:
                self.put(tree, name, values, native)
        return tree

    def put(
        self, tree: dict[str, Any], name: str, values: Mapping[str, tuple[Any, Location]], native: Location
    ) -> None:
        """A parameter at its place: once where all models have the same, else with each."""
        (first, location), *others = values.values()
        if all(value == first for value, _ in others):
            tree.setdefault("parameters", {})[name] = first
            self.mark((*native, "parameters", name), location)
            return
        for model, (value, location) in values.items():
            tree["models"][model][name] = value
            self.mark((*native, "models", model, name), location)

    def values(
        self, name: str, setting: Setting, models: Mapping[str, Model], levels: Sequence[Level], window: Window
    ) -> dict[str, tuple[Any, Location]] | None:
        """Model ('' for all) -> what the config says for it, and where; None where there is nothing to write."""
        out: dict[str, tuple[Any, Location]] = {}
        for model, source in [("", None)] if setting.scope == "shared" else models.items():
            asked = levels if source is None else [source.parameters, *levels]
            start = window.start if source is None else source.layers[0] if source.layers else 0
            places = [(*level.location, name) for level in asked if level.values.get(name) is not None]
            location = places[0] if places else ("merge_method",)
            try:
                found = native_value(name, setting, asked, Window(start, window.length))
            except Bad as bad:
                self.problems.append(self.refused(bad.location, f"{name}: {bad.text}"))
                return None
            if found is None and setting.default is REQUIRED:
                whose = f" for {source.reference.model}" if source is not None else ""
                text = f"{self.method} needs the parameter {name!r}{whose}; it has no default"
                self.problems.append(self.refused(location, text))
                return None
            if found is None and setting.default is not None:
                found = setting.convert(setting.default)
            out[model] = found, location
        return out if setting.native and any(value is not None for value, _ in out.values()) else None


def _name(path: str, taken: Mapping[str, Any]) -> str:
    """A short name for a model: the last part of its path, with a number if that is taken."""
    word = re.split(r"[/\\]", path.rstrip("/\\"))[-1].split("@")[0]
    word = re.sub(r"\.(safetensors|bin|pt|pth|ckpt)$", "", word)
    word = word if word not in ("", ".", "..", "base") else "model"
    names = [word, *(f"{word}-{i}" for i in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _parameters(stages: Sequence[Any]) -> set[str]:
    """Every parameter that the stages have."""
    names = [stage if isinstance(stage, str) else next(iter(stage)) for stage in stages]
    return {p.name for name in names for p in registry(name).parameters()}
