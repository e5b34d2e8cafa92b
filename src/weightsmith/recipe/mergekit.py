"""mergekit's configs: read as what they mean, and turned into native recipes with the positions of the original."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.problem import Problem
from weightsmith.recipe.grammar import build
from weightsmith.recipe.mergekit_modules import globs_of
from weightsmith.recipe.mergekit_schema import Config, Dialect, Part, Reference, Slice, reference
from weightsmith.recipe.mergekit_values import Level, Window
from weightsmith.recipe.mergekit_writer import Model, Writer
from weightsmith.recipe.override import override
from weightsmith.recipe.reader import Document, Location, Position

__all__ = ["translate"]

_JOINED = "joined"
"""What a model put together of slices or modules is called."""


def translate(documents: Sequence[Document], overrides: Sequence[str] = (), native: Collection[str] = ()) -> Document:
    """The native document of a mergekit file.  Of several merges the one without a name is the result, else the one
    that no other uses.

    overrides   values to set: in the config, or in the translation where only recipes have the key
    native      keys of recipes

    Raises RecipeError with every problem, a line each.
    """
    later = [text for text in overrides if _key(text) in native and _key(text) not in Config.model_fields]
    for text in overrides:
        if text not in later:
            override(documents[-1], text)
    problems: list[Problem] = []
    configs: list[tuple[Document, Config]] = []
    for document in documents:
        if not isinstance(document.tree, Mapping) or "merge_method" not in document.tree:
            raise RecipeError(f"{documents[1].at(())}: a second document begins here; a recipe is one")
        try:
            configs.append((document, build(Config, document, Dialect.of(document.tree, native))))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    named: dict[str, tuple[Document, Config]] = {}
    for document, config in configs:
        if str(config.name) in named:
            raise RecipeError(
                f"{document.at(('name',))}: a second merge is called {config.name!r}; each needs its own name"
            )
        if config.name is not None:
            named[str(config.name)] = document, config
    final = [(document, config) for document, config in configs if config.name is None]
    if not final:
        trees = [{k: v for k, v in document.tree.items() if k != "name"} for document, _ in configs]
        used = {word for tree in trees for word in _mentioned(tree)}
        final = [found for name, found in named.items() if name not in used]
    if len(final) != 1:
        places = ", ".join(str(document.at(())) for document, _ in final) or "none is"
        raise RecipeError(f"{documents[0].where}: one merge must be the result: one without a name, or the only one "
                          f"that no other uses ({places})")  # fmt: skip
    document = _Translation(*final[0], named, ()).document()
    for text in later:
        override(document, text)
    return document


def _key(assignment: str) -> str:
    """The outermost key of 'KEY.KEY=VALUE'."""
    return assignment.partition("=")[0].partition(".")[0].strip()


def _mentioned(value: Any) -> Iterator[str]:
    """Every word of a document that may be a model's name."""
    if isinstance(value, str):
        yield re.split(r"[+@]", value)[0]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mentioned(inner)


class _Translation:
    """One config's native tree.  `trail`: the named merges that are being translated, to find loops."""

    def __init__(
        self,
        source: Document,
        config: Config,
        named: Mapping[str, tuple[Document, Config]],
        trail: tuple[str, ...],
    ) -> None:
        self.source, self.config, self.named, self.trail = source, config, named, trail
        self.base: Reference | None = config.base_model
        self.positions: dict[Location, Position] = {(): source.at(())}
        self.writer = Writer(config.merge_method, self.model, self.mark, self.refused)

    def document(self) -> Document:
        config = self.config
        levels = [Level(config.parameters, ("parameters",))]
        native = self.modules(levels) if config.modules else self.part(config, (), levels, ())
        self.writer.finish()
        if config.chat_template is not None:
            native["chat_template"] = config.chat_template
            self.mark(("chat_template",), ("chat_template",))
        native |= self.tokenizer(native) | self.output(())
        return Document(self.source.where, native, self.positions)

    def refused(self, location: Location, text: str) -> str:
        return f"{self.source.at(location)}: {text}"

    def mark(self, native: Location, location: Location) -> None:
        self.positions[native] = self.source.at(location)

    def model(self, source: Model, native: Location) -> Any:
        """A model's path; for a named merge its recipe."""
        name = source.reference.model
        if name not in self.named:
            return name
        if name in self.trail:
            chain = " -> ".join([*self.trail[self.trail.index(name) :], name])
            raise RecipeError(self.refused(source.location, f"circular reference between merges: {chain}"))
        inner = _Translation(*self.named[name], self.named, (*self.trail, name)).document()
        self.positions |= {(*native, *location): position for location, position in inner.positions.items()}
        return inner.tree

    # -- models, slices, modules

    def part(self, part: Part, location: Location, levels: list[Level], native: Location) -> dict[str, Any]:
        """The models or slices of a document or module, as a recipe whose location is `native`."""
        if part.models:
            models = [
                Model(
                    one.model, (*location, "models", i), Level(one.parameters, (*location, "models", i, "parameters"))
                )
                for i, one in enumerate(part.models)
            ]
            if self.base is not None and self.base not in [model.reference for model in models]:
                models.append(self.whole_base())
            return self.writer.recipe(models, self.base, levels, native, Window()) | self.output(native)
        if len(part.slices) == 1:
            return self.slice(part.slices[0], (*location, "slices", 0), levels, native, 0)
        slices, offset = [], 0
        for i, one in enumerate(part.slices):
            inside = (*native, "models", _JOINED, "slices", i)
            slices.append(self.slice(one, (*location, "slices", i), levels, inside, offset, joined=True))
            offset += one.length
        return {"models": {_JOINED: {"slices": slices}}, "method": "passthrough", **self.output(native)}

    def whole_base(self) -> Model:
        assert self.base is not None
        return Model(self.base, ("base_model",), Level({}, ()))

    def slice(
        self, part: Slice, location: Location, levels: list[Level], native: Location, offset: int, joined: bool = False
    ) -> dict[str, Any]:
        """One slice of the result, as a recipe, or where it is one model's as it is, as a cut model."""
        models = [
            Model(one.model, (*location, "sources", i), Level(one.parameters, (*location, "sources", i, "parameters")),
                  one.layer_range)
            for i, one in enumerate(part.sources)
        ]  # fmt: skip
        levels = [Level(part.parameters, (*location, "parameters")), *levels]
        scaled = any("scale" in level.values for level in (models[0].parameters, *levels))
        if self.config.merge_method == "passthrough" and len(models) == 1 and not scaled and joined:
            self.mark(native, models[0].location)
            return self.writer.reference(models[0], native)
        window = Window(offset, part.length)
        return self.writer.recipe(models, part.base_model or self.base, levels, native, window) | self.output(native)

    def modules(self, levels: list[Level]) -> dict[str, Any]:
        """Each module a recipe of its own over its tensors; whatever no module names comes from the base, or from
        the first model."""
        found: dict[str, Any] = {}
        globs = globs_of(self.config.modules)
        for name, match in globs.items():
            part = self.config.modules[name]
            native: Location = ("models", _JOINED, "modules", name, "model")
            inner = [Level(part.parameters, ("modules", name, "parameters")), *levels]
            made = self.part(part, ("modules", name), inner, native)
            found[name] = {**({} if match == ["*"] else {"match": match}), "model": made}
        if all("match" in module for module in found.values()):
            first = self.config.modules[next(iter(globs))]
            donor = first.models[0].model if first.models else first.slices[0].sources[0].model
            rest = Model(
                self.base or donor, ("base_model",) if self.base else ("modules", next(iter(globs))), Level({}, ())
            )
            found["rest"] = {"model": self.writer.reference(rest, ("models", _JOINED, "modules", "rest", "model"))}
        return {"models": {_JOINED: {"modules": found}}, "method": "passthrough"}

    # -- what belongs to the result as a whole

    def output(self, native: Location) -> dict[str, Any]:
        """The dtype; parts of a model have it too, so that nothing is rounded twice."""
        for key in ("out_dtype", "dtype"):
            if (dtype := getattr(self.config, key)) is not None:
                self.mark((*native, "output"), (key,))
                return {"output": {"dtype": dtype}}
        return {}

    def tokenizer(self, native: Mapping[str, Any]) -> dict[str, Any]:
        block, location = self.config.tokenizer, ("tokenizer",)
        if block is None and self.config.tokenizer_source is None:
            return {}
        if block is None:
            location = ("tokenizer_source",)
            self.mark(("tokenizer",), location)
            return {"tokenizer": {"source": self.tokenizer_source(self.config.tokenizer_source, location, native)}}
        self.mark(("tokenizer",), location)
        found: dict[str, Any] = {"source": self.tokenizer_source(block.source, location, native)}
        if block.tokens:
            found["tokens"] = {t: self.token(v, (*location, "tokens", t), native) for t, v in block.tokens.items()}
        if block.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = block.pad_to_multiple_of
        return {"tokenizer": found}

    def token(self, given: Any, location: Location, native: Mapping[str, Any]) -> Any:
        """The entry of one token, with its model under the name that the native recipe gives it."""
        source = given.get("source") if isinstance(given, Mapping) else None
        if isinstance(source, Mapping) and source.get("kind") == "model_token" and source.get("model") is not None:
            named = {**source, "model": self.tokenizer_source(source["model"], location, native)}
            return {**given, "source": {k: v for k, v in named.items() if v is not None}}
        if isinstance(source, str) or (isinstance(source, Mapping) and "kind" not in source):
            return {**given, "source": self.tokenizer_source(source, location, native)}
        return given

    def tokenizer_source(self, wanted: Any, location: Location, native: Mapping[str, Any]) -> str:
        """'union', the name of a model of the native recipe, or a path."""
        if wanted in (None, "union"):
            return "union"
        if wanted == "base" and self.base is None:
            raise RecipeError(self.refused(location, "the tokenizer is to be the base's, but there is no base_model"))
        try:
            found = self.base if wanted == "base" else reference(wanted)
        except ValueError as error:
            raise RecipeError(self.refused(location, str(error))) from None
        assert found is not None
        named = {"base": native.get("base", {}), **native["models"]}
        alike = (name for name, ref in named.items() if ref.get("model") == found.model and "adapter" not in ref)
        return next(alike, found.model)
