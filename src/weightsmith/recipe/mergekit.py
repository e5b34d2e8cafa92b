"""mergekit's configs: read as what they mean, and turned into native recipes line by line.

A document of mergekit becomes a document of ours (plain values, with the lines of the original), which is then
checked and built like any other.  What mergekit would ignore in silence is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.recipe.mergekit_entries import Entries, Input
from weightsmith.recipe.mergekit_methods import METHODS
from weightsmith.recipe.mergekit_modules import globs_of
from weightsmith.recipe.mergekit_recipe import RecipeWriter
from weightsmith.recipe.mergekit_values import Level, Window
from weightsmith.recipe.reader import Document, Place

__all__ = ["is_mergekit", "translate"]

_TOP = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "chat_template", "name")  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_JOINED = "joined"
"""What a model put together of slices or modules is called."""
_NOTHING = Level({}, ())


def is_mergekit(tree: Any) -> bool:
    """Whether a parsed document is one of mergekit's configs."""
    return isinstance(tree, Mapping) and "merge_method" in tree


def translate(documents: Sequence[Document]) -> Document:
    """The native document of a mergekit file.  Of several merges the one without a name is the result, else the one
    that no other uses.

    Raises RecipeError with every problem, a line each.
    """
    for document in documents:
        if not is_mergekit(document.tree):
            raise RecipeError(f"{documents[1].at(())}: a second document begins here; a recipe is one")
    named: dict[str, Document] = {}
    final: list[Document] = []
    for document in documents:
        name = document.tree.get("name")
        if name is None:
            final.append(document)
        elif str(name) in named:
            raise RecipeError(f"{document.at(('name',))}: a second merge is called {name!r}; each needs its own name")
        else:
            named[str(name)] = document
    if not final:
        used = {word for d in named.values() for word in _mentioned({k: v for k, v in d.tree.items() if k != "name"})}
        final = [d for n, d in named.items() if n not in used]
    if len(final) != 1:
        places = ", ".join(d.at(()) for d in final) or "none is"
        raise RecipeError(f"{documents[0].where}: one merge must be the result: one without a name, or the only one "
                          f"that no other uses ({places})")  # fmt: skip
    return _Translator(final[0], named, ()).document()


def _mentioned(value: Any) -> Iterator[str]:
    """Every word of a document that may be a model's name."""
    if isinstance(value, str):
        yield re.split(r"[+@]", value)[0]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mentioned(inner)


class _Translator:
    """One config.  `trail`: the named merges that are being translated, to find loops."""

    def __init__(self, source: Document, named: Mapping[str, Document], trail: tuple[str, ...]) -> None:
        self.source, self.named, self.trail = source, named, trail
        self.tree: Mapping[str, Any] = source.tree
        self.inner: list[str] = []  # problems of merges that this one uses, with their own places
        self.lines: dict[Place, str] = {}
        self.problems: list[tuple[Place, str]] = []

    def document(self) -> Document:
        native = self.build()
        if self.problems or self.inner:
            lines = [f"{self.source.at(place)}: {text}" for place, text in self.problems]
            lines = list(dict.fromkeys([*lines, *self.inner]))
            shown = "".join(f"\n  - {line}" for line in lines)
            raise RecipeError(lines[0] if len(lines) == 1 else f"{len(lines)} problems:{shown}")
        return Document(self.source.where, native, {(): self.source.at(()), **self.lines})

    def say(self, place: Place, text: str) -> None:
        self.problems.append((place, text))

    def mark(self, native: Place, place: Place) -> None:
        self.lines[native] = self.source.at(place)

    def unknown(self, tree: Mapping[Any, Any], options: Sequence[str], place: Place) -> None:
        for key in tree.keys() - set(options):
            self.say((*place, key), f"unknown key {key!r}{did_you_mean(str(key), options)}")

    def build(self) -> dict[str, Any]:
        tree = self.tree
        self.unknown(tree, _TOP, ())
        name = tree["merge_method"]
        if not isinstance(name, str) or name not in METHODS:
            self.say(("merge_method",), f"unknown merge_method {name!r}{did_you_mean(str(name), METHODS)}")
            return {}
        self.entries = Entries(name, METHODS[name], self.problems)
        self.writer = RecipeWriter(self.entries, self.model, self.mark)
        if tree.get("base_model") is not None:
            self.entries.base = self.entries.reference(tree["base_model"], ("base_model",), _NOTHING)
        if METHODS[name].base == "required" and tree.get("base_model") is None:
            self.say(("merge_method",), f"{name} needs base_model: PATH")
        given = [part for part in ("models", "slices", "modules") if tree.get(part)]
        if len(given) != 1:
            place = given[1] if given else "merge_method"
            self.say((place,), "there must be exactly one of models, slices and modules")
            return {}
        top = [self.entries.level(tree, ())]
        native = self.modules(tree["modules"], top) if given == ["modules"] else self.part(tree, (), top, ())
        return native if self.problems or self.inner else native | self.whole(native)

    def model(self, source: Input, native: Place) -> Any:
        """A model's path; for a named merge its recipe."""
        if source.model not in self.named:
            return source.model
        if source.model in self.trail:
            chain = " -> ".join([*self.trail[self.trail.index(source.model) :], source.model])
            self.say(source.place, f"the merge is made of itself: {chain}")
            return "?"
        try:
            inner = _Translator(self.named[source.model], self.named, (*self.trail, source.model)).document()
        except RecipeError as error:
            lines = [line for line in str(error).splitlines() if not line.endswith("problems:")]
            self.inner += [line.removeprefix("  - ") for line in lines]
            return "?"
        self.lines |= {(*native, *place): line for place, line in inner.lines.items()}
        return inner.tree

    # -- models, slices, modules

    def part(self, tree: Mapping[str, Any], place: Place, levels: list[Level], native: Place) -> dict[str, Any]:
        """A document's or a module's `models` or `slices`, as a recipe; `native`: its place there."""
        word = "models" if tree.get("models") else "slices"
        listed = tree[word]
        if not isinstance(listed, list):
            self.say((*place, word), f"{word} should be a list, each with a dash; is {listed!r}")
            return {}
        if word == "models":
            found = [self.entries.input(e, (*place, word, i), sliced=False) for i, e in enumerate(listed)]
            return self.merge([s for s in found if s is not None], levels, native)
        if len(listed) == 1:
            return self.slice(listed[0], (*place, word, 0), levels, native, 0, alone=True)[0]
        slices, offset = [], 0
        for i, entry in enumerate(listed):
            here = (*native, "models", _JOINED, "slices", i)
            made, length = self.slice(entry, (*place, word, i), levels, here, offset, alone=False)
            slices.append(made)
            offset += length
        return {"models": {_JOINED: {"slices": slices}}, "method": "passthrough", **self.output(native)}

    def merge(self, sources: list[Input], levels: list[Level], native: Place) -> dict[str, Any]:
        """Whole models; a base that is not listed is one more, the last."""
        base = self.entries.base
        listed = [s.identity for s in sources]
        if base is not None and base.identity not in listed:
            sources = [*sources, base]
        return self.writer.recipe(sources, base, levels, native, Window()) | self.output(native)

    def slice(
        self, entry: Any, place: Place, levels: list[Level], native: Place, offset: int, *, alone: bool
    ) -> tuple[dict[str, Any], int]:
        """One output slice, as a recipe or (not `alone`) a cut model, and how many layers it has."""
        if not isinstance(entry, Mapping) or not isinstance(entry.get("sources"), list) or not entry["sources"]:
            self.say(place, f"a slice should be a mapping with sources, a list; is {entry!r}")
            return {}, 0
        self.unknown(entry, ("sources", "base_model", "parameters"), place)
        entries = Entries(self.entries.method, self.entries.known, self.problems, self.entries.base)
        if entry.get("base_model") is not None:
            entries.base = entries.reference(entry["base_model"], (*place, "base_model"), _NOTHING)
        found = [entries.input(s, (*place, "sources", i), sliced=True) for i, s in enumerate(entry["sources"])]
        sources = [s for s in found if s is not None]
        lengths = [s.layers[1] - s.layers[0] for s in sources if s.layers is not None]
        base = entries.base
        if len(set(lengths)) > 1:
            self.say(place, f"the sources of a slice must have equally many layers; these have {lengths}")
        if base is not None and entries.known.base != "counted" and base.identity not in [s.identity for s in sources]:
            self.say((*place, "sources"), f"base_model {base.model} is not among the sources of this slice; list it, "
                                          f"with the layers to compare with")  # fmt: skip
        if len(sources) < len(found) or self.problems:
            return {}, 0
        levels = [entries.level(entry, place), *levels]
        scaled = any("scale" in level.values for level in (sources[0].parameters, *levels))
        if entries.method == "passthrough" and len(sources) == 1 and not scaled and not alone:
            self.mark(native, sources[0].place)
            return self.writer.reference(sources[0], native), lengths[0]
        made = self.writer.recipe(sources, base, levels, native, Window(offset, lengths[0]))
        return made | self.output(native), lengths[0]

    def modules(self, tree: Any, levels: list[Level]) -> dict[str, Any]:
        """Each module a recipe of its own over its tensors; whatever no module names comes from the base, or from
        the first model."""
        if not isinstance(tree, Mapping):
            self.say(("modules",), f"modules should be a mapping from names to models or slices; is {tree!r}")
            return {}
        found: dict[str, Any] = {}
        donor = self.entries.base
        for name, globs in globs_of(map(str, tree)).items():
            entry, place = tree[name], ("modules", name)
            given = [w for w in ("models", "slices") if isinstance(entry, Mapping) and entry.get(w)]
            if len(given) != 1:
                self.say(place, "a module has either models or slices")
                continue
            self.unknown(entry, ("models", "slices", "parameters"), place)
            native: Place = ("models", _JOINED, "modules", name, "model")
            made = self.part(entry, place, [self.entries.level(entry, place), *levels], native)
            found[name] = {**({} if globs == ["*"] else {"match": globs}), "model": made}
            donor = donor or self.first(entry, place)
        if all("match" in module for module in found.values()) and donor is not None:
            found["rest"] = {"model": self.writer.reference(donor, ("models", _JOINED, "modules", "rest", "model"))}
        return {"models": {_JOINED: {"modules": found}}, "method": "passthrough"}

    def first(self, module: Mapping[str, Any], place: Place) -> Input | None:
        """The model that a module names first, whole."""
        parts = module.get("models") or [s for part in module["slices"] for s in part["sources"]]
        return self.entries.reference(parts[0]["model"], place, _NOTHING) if not self.problems else None

    # -- what belongs to the result as a whole

    def whole(self, native: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.tree.get("chat_template") is not None:
            found["chat_template"] = self.tree["chat_template"]
            self.mark(("chat_template",), ("chat_template",))
        return found | self.tokenizer(native) | self.output(())

    def output(self, native: Place) -> dict[str, Any]:
        """The dtype; parts of a model have it too, so that nothing is rounded twice."""
        for key in ("out_dtype", "dtype"):
            dtype = self.tree.get(key)
            if dtype is not None:
                word = str(dtype).removeprefix("torch.")
                if word not in _DTYPES:
                    self.say((key,), f"{key}: unknown dtype {dtype!r}{did_you_mean(word, _DTYPES)}")
                self.mark((*native, "output"), (key,))
                return {"output": {"dtype": word}}
        return {}

    def tokenizer(self, native: Mapping[str, Any]) -> dict[str, Any]:
        given = [key for key in ("tokenizer", "tokenizer_source") if self.tree.get(key) is not None]
        if not given:
            return {}
        place: Place = (given[0],)
        block = self.tree[given[0]] if given[0] == "tokenizer" else {"source": self.tree["tokenizer_source"]}
        if len(given) > 1:
            self.say(("tokenizer_source",), "tokenizer and tokenizer_source cannot both be there; keep tokenizer")
        if not isinstance(block, Mapping):
            self.say(place, f"tokenizer should be a mapping with source, tokens, pad_to_multiple_of; is {block!r}")
            return {}
        self.unknown(block, ("source", "tokens", "pad_to_multiple_of"), place)
        self.mark(("tokenizer",), place)
        rest = {key: block[key] for key in ("tokens", "pad_to_multiple_of") if block.get(key) is not None}
        if isinstance(rest.get("tokens"), Mapping):
            rest["tokens"] = {t: self.token(v, (*place, "tokens", t), native) for t, v in rest["tokens"].items()}
        return {"tokenizer": {"source": self.tokenizer_source(block.get("source"), place, native), **rest}}

    def token(self, given: Any, place: Place, native: Mapping[str, Any]) -> Any:
        """The entry of one token, with its model under the name that the native recipe gives it."""
        source = given.get("source") if isinstance(given, Mapping) else None
        if isinstance(source, Mapping) and source.get("kind") == "model_token" and source.get("model") is not None:
            named = {**source, "model": self.tokenizer_source(source["model"], place, native)}
            return {**given, "source": {k: v for k, v in named.items() if v is not None}}
        if isinstance(source, str) or (isinstance(source, Mapping) and "kind" not in source):
            return {**given, "source": self.tokenizer_source(source, place, native)}
        return given

    def tokenizer_source(self, wanted: Any, place: Place, native: Mapping[str, Any]) -> str:
        """'union', the name of a model of the native recipe, or a path."""
        if wanted in (None, "union"):
            return "union"
        base = self.entries.base
        found = base if wanted == "base" else self.entries.reference(wanted, place, _NOTHING)
        if found is None:
            if wanted == "base":
                self.say(place, "the tokenizer is to be the base's, but there is no base_model")
            return "?"
        named = {"base": native.get("base", {}), **native["models"]}
        alike = (name for name, ref in named.items() if ref.get("model") == found.model and "adapter" not in ref)
        return next(alike, found.model)
