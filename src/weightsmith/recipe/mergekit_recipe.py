"""One of mergekit's merges (models, method, settings) as a native recipe in plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.core.method import registry
from weightsmith.recipe.mergekit_entries import Entries, Input
from weightsmith.recipe.mergekit_methods import REQUIRED, Setting
from weightsmith.recipe.mergekit_values import Bad, Level, Window, native_value
from weightsmith.recipe.reader import Place

__all__ = ["RecipeWriter"]


@dataclass
class RecipeWriter:
    """Writes recipes for one config.

    entries   its method, and where problems go
    model     what stands for a model's path, given its entry and its native place (a named merge is a recipe)
    mark      notes that a native place comes from a place of the config
    """

    entries: Entries
    model: Callable[[Input, Place], Any]
    mark: Callable[[Place, Place], None]

    def reference(self, source: Input, native: Place) -> dict[str, Any]:
        """A model as a recipe names it."""
        self.mark((*native, "model"), source.place)
        found: dict[str, Any] = {"model": self.model(source, (*native, "model"))}
        if source.adapter is not None:
            found["adapter"] = source.adapter
        if source.layers is not None:
            found["layers"] = list(source.layers)
        return found

    def recipe(
        self, sources: Sequence[Input], base: Input | None, levels: Sequence[Level], native: Place, window: Window
    ) -> dict[str, Any]:
        """The recipe, whose place is `native`; `window` is where its layers stand in the output."""
        counted = self.entries.known.base == "counted"
        aside = None if base is None or counted else base.identity
        base_entry = next((s for s in sources if s.identity == aside), None)
        inputs = [s for s in sources if s is not base_entry]
        if counted and base is not None:  # the model that lends its config and tokenizer comes first
            inputs.sort(key=lambda s: s.identity != base.identity)
        if not inputs:
            if not self.entries.problems:
                self.entries.say(("merge_method",), "there is no model besides the base")
            return {}
        named: dict[str, Input] = {}
        for source in inputs:
            named[_name(source.adapter or source.model, named)] = source
        tree: dict[str, Any] = {}
        if base_entry is not None:
            tree["base"] = self.reference(base_entry, (*native, "base"))
        tree["models"] = {n: self.reference(s, (*native, "models", n)) for n, s in named.items()}
        self.mark((*native, "models"), inputs[0].place)
        self.mark((*native, "method"), ("merge_method",))
        found = {name: self.values(name, setting, named, levels, window)
                 for name, setting in self.entries.known.settings.items()}  # fmt: skip
        settings = self.entries.known.settings
        written = {settings[name].native: value for name, value in found.items() if value is not None}
        stages = self.entries.known.stages({n: next(iter(v.values()))[0] for n, v in written.items()})
        tree["method"] = stages[0] if len(stages) == 1 else stages
        taken = _parameters(stages)
        for name, values in written.items():
            if name in taken:
                self.put(tree, name, values, native)
        return tree

    def put(self, tree: dict[str, Any], name: str, values: Mapping[str, tuple[Any, Place]], native: Place) -> None:
        """A parameter at its place: once where all models have the same, else with each."""
        (first, place), *others = values.values()
        if all(value == first for value, _ in others):
            tree.setdefault("parameters", {})[name] = first
            self.mark((*native, "parameters", name), place)
            return
        for model, (value, place) in values.items():
            tree["models"][model][name] = value
            self.mark((*native, "models", model, name), place)

    def values(
        self, name: str, setting: Setting, models: Mapping[str, Input], levels: Sequence[Level], window: Window
    ) -> dict[str, tuple[Any, Place]] | None:
        """Model ('' for all) -> what the config says for it, and where; None where there is nothing to write."""
        out: dict[str, tuple[Any, Place]] = {}
        for model, source in [("", None)] if setting.scope == "shared" else models.items():
            asked = levels if source is None else [source.parameters, *levels]
            start = window.start if source is None else source.layers[0] if source.layers else 0
            places = [(*level.place, name) for level in asked if level.values.get(name) is not None]
            place = places[0] if places else ("merge_method",)
            try:
                found = native_value(name, setting, asked, Window(start, window.length))
            except Bad as bad:
                self.entries.say(bad.place, f"{name}: {bad.text}")
                return None
            if found is None and setting.default is REQUIRED:
                if self.entries.problems:  # it may be among them, misspelt or misplaced
                    return None
                whose = f" for {source.model}" if source is not None else ""
                self.entries.say(place, f"{self.entries.method} needs the parameter {name!r}{whose}; it has no default")
                return None
            if found is None and setting.default is not None:
                found = setting.convert(setting.default)
            out[model] = found, place
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
