"""The opened inputs of a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, PlanError, SourceError, WeightsmithError, problems_of
from weightsmith.core.keys import Key
from weightsmith.core.lazy import is_a
from weightsmith.core.method import Factored, Pipeline
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.modules import merged_with_modules
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.io.read.experts import laid_out_like
from weightsmith.io.read.files import File
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.headed import HeadsError, headed
from weightsmith.io.read.open import open_source
from weightsmith.io.read.prefixes import named_like, renamed
from weightsmith.io.read.source import Source
from weightsmith.io.read.stats import open_stats
from weightsmith.io.read.untied import untied
from weightsmith.io.read.views import RenamedSource, SliceSource
from weightsmith.recipe.schema import ModelRef, Modules, Recipe, Slices

__all__ = ["Inputs", "Nested", "earlier_notes", "open_inputs", "product_ranks"]

Keep = Callable[[str], bool]
Nested = Callable[[Recipe, "Inputs", str], Source]
"""(recipe, its opened inputs, label) -> its result as a source."""
_HASHERS = 4  # files hashed at once


@dataclass(frozen=True)
class Inputs:
    """Sources by the names the recipe gives them; `stats` is statistic -> model name -> source."""

    base: Source | None
    experts: Mapping[str, Source]
    stats: Mapping[str, Mapping[str, Source]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    missing: frozenset[str] = frozenset()
    """Models that could not be opened, and 'base': a problem each, and no reason for others."""
    silent: frozenset[str] = frozenset()
    """Models whose statistics could not be opened."""
    partial: bool = False
    """Whether the recipe may speak of tensors, or of models, that are not shown here."""
    full: bool = False
    """Whether fingerprints hold a hash of all bytes of every file; taking it reads all of them once."""
    _hashed: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def models(self) -> tuple[tuple[str, Source], ...]:
        """The base (named 'base') and the experts, in recipe order."""
        return (*((("base", self.base),) if self.base is not None else ()), *self.experts.items())

    @property
    def count(self) -> int:
        """How many experts the recipe names."""
        return len(self.experts) + len(self.missing - {"base"})

    @property
    def has_base(self) -> bool:
        """Whether the recipe names a base."""
        return self.base is not None or "base" in self.missing

    def locations(self) -> tuple[Path, ...]:
        """Every folder and file that is read."""
        read = [source for _, source in self.models]
        read += [source for by_model in self.stats.values() for source in by_model.values()]
        return tuple(dict.fromkeys(location for source in read for location in source.origin.locations))

    def fingerprints(self) -> dict[str, Any]:
        """What identifies every input's data, for resume and provenance.

        Raises SourceError, with the input's name, if one has changed since it was opened.
        """
        named = dict(self.models)
        for stat, by_model in self.stats.items():
            named |= {f"{name}/{stat}": source for name, source in by_model.items()}
        found = {}
        for name, source in named.items():
            try:
                found[name] = {**source.fingerprint(), **({"contents": self._contents(source)} if self.full else {})}
            except SourceError as error:
                raise SourceError(f"input {name!r}: {error}") from error
        return found

    def _contents(self, source: Source) -> dict[str, str]:
        """Path of each file with tensors, from the folder that holds them all -> xxh3 of its bytes."""
        paths = sorted({path.absolute() for path in source.origin.locations if path.is_file()})
        if not paths:
            return {}
        files = [File(path) for path in paths]
        keys = [(file.path, file.size, file.mtime_ns) for file in files]
        new = {key: file for key, file in zip(keys, files, strict=True) if key not in self._hashed}
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(_HASHERS, os.cpu_count() or 1)) as pool:
            self._hashed.update(zip(new, pool.map(File.digest, new.values()), strict=True))
        home = os.path.commonpath([path.parent for path in paths])
        return {path.relative_to(home).as_posix(): self._hashed[key] for path, key in zip(paths, keys, strict=True)}


def open_inputs(
    recipe: Recipe, nested: Nested, given: Mapping[str, Source] | None = None, keep: Keep | None = None
) -> Inputs:
    """Open every input of a recipe, reading headers only; what cannot be opened becomes a problem.

    `nested` makes a source of a recipe that is an input (merging lies above this layer: `jobs.nested` hands it in).
    `given` holds sources that are at hand already (tensors in memory), by model name; 'base' for the base.
    `keep` says by name which tensors of the inputs are there.
    """
    made = _opened(recipe, _Opener(nested, recipe.names), given or {}, keep)
    try:
        whole = headed(dict(made.models))
    except HeadsError as error:
        lost = made.missing.union(error.owners)  # nothing more is to be said of these
        kept = {name: source for name, source in made.experts.items() if name not in lost}
        return replace(made, experts=kept, missing=lost, problems=(*made.problems, *problems_of(error)))
    models: Mapping[str, Source] = untied(whole, lambda name: _matches(name, recipe.exclude))
    problems: list[Problem] = []
    stats = made.stats
    if not made.missing:  # of those that are there alone, the vocabulary would be another
        models = merged_with_modules(models)
    if not made.missing and recipe.tokenizer is not None:
        from weightsmith.inputs.one_vocabulary import in_one_vocabulary, statistics_in

        models, problems = in_one_vocabulary(recipe.tokenizer, models)
        stats = statistics_in(models, made.stats)
    return replace(
        made,
        base=None if made.base is None else models["base"],
        experts={name: models[name] for name in made.experts},
        stats=stats,
        problems=(*made.problems, *problems),
    )


def _opened(recipe: Recipe, opener: _Opener, given: Mapping[str, Source], keep: Keep | None) -> Inputs:
    """The models as they are, and the statistics."""
    problems: list[Problem] = []
    missing, silent = set[str](), set[str]()
    given = {name: opener.named(source) for name, source in given.items()}
    base: Source | None = given.get("base")
    if base is None and recipe.base is not None:
        base = opener.open(recipe.base, None, "base", problems, keep)
        missing |= {"base"} if base is None else set()
    experts: dict[str, Source] = {}
    stats: dict[str, dict[str, Source]] = {}
    for name, ref in recipe.models.items():
        found: list[Problem] = []
        source = given.get(name) or opener.open(ref, base, name, found, keep)
        # Without the base no adapter can be opened: that is no problem of the adapter.
        problems += [one for one in found if one.code is not Code.NO_BASE or "base" not in missing]
        if source is None:
            missing.add(name)
        else:
            experts[name] = source
        try:
            for stat, measured in open_stats(ref.stats).items():
                stats.setdefault(stat, {})[name] = measured
        except WeightsmithError as error:
            silent.add(name)
            problems += [one.of(name) for one in problems_of(error)]
    first = base if base is not None else next(iter(experts.values()), None)
    if first is not None:
        experts = {name: named_like(laid_out_like(source, first), first) for name, source in experts.items()}
    if not missing:
        problems += [Problem(Code.UNMATCHED, "names", text) for text in opener.unused()]
    if not recipe.models:
        text = "the recipe names no models; add at least one under 'models:'"
        problems.append(Problem(Code.NO_MODELS, "models", text))
    return Inputs(
        base, experts, stats, tuple(problems), frozenset(missing), frozenset(silent), partial=keep is not None
    )


def earlier_notes(inputs: Inputs) -> tuple[dict[str, Any], list[Problem]]:
    """What the run that made the first model noted for later ones (stage -> notes), and what there is to say about it.

    Notes hold for the base of that run: without the same base there are none.
    """
    name, first = next(iter(inputs.experts.items()), ("", None))
    whole = isinstance(first, FolderSource) or is_a(first, "io.read.remote_source", "RemoteSource")
    folder = first.origin.folder if first is not None and whole else None
    if folder is None or not (folder / MANIFEST).is_file():
        return {}, []
    try:
        made = read_manifest(folder)
    except OutputError as error:
        return {}, [Problem(Code.EARLIER, name, f"{name}: {error}; it counts as a model like any other")]
    notes: dict[str, Any] = made.get("notes", {})
    now = {} if inputs.base is None else inputs.base.fingerprint()
    if notes and _without_times(made["inputs"].get("base", {})) != _without_times(now):
        text = f"{name} was made by {', '.join(notes)} on another base; it counts as a model like any other"
        return {}, [Problem(Code.EARLIER, name, text)]
    return notes, []


def product_ranks(key: Key, pipeline: Pipeline | None, inputs: Inputs) -> tuple[int, ...]:
    """The ranks of the experts' task vectors where all stay products; () where they, or a later stage, form them."""
    base = inputs.base
    if base is None or pipeline is None or len(pipeline.stages) > 1 or not isinstance(pipeline.stages[0], Factored):
        return ()
    found = [source.factors(key.name, base) for source in inputs.experts.values()]
    return tuple(product.rank for product in found if product is not None) if None not in found else ()


def _without_times(fingerprint: Any) -> Any:
    """What is the same for a copy of the files, and whether or not all bytes were hashed."""
    if isinstance(fingerprint, Mapping):
        return {k: _without_times(v) for k, v in fingerprint.items() if k not in ("mtime_ns", "contents")}
    return fingerprint


@dataclass(frozen=True)
class _Opener:
    """Opens the models of a recipe; `nested`: see `open_inputs`, `names`: see `Recipe.names`."""

    nested: Nested
    names: Mapping[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def named(self, source: Source) -> Source:
        """The source with the names that the recipe gives its tensors."""
        if is_a(source, "io.read.peft", "AdapterSource"):  # it has the names of its base, which were given before
            return source
        self.used.update(prefix for prefix in self.names if any(name.startswith(prefix) for name in source.keys))
        return renamed(source, self.names)

    def unused(self) -> list[str]:
        """A line for every prefix that no tensor's name begins with."""
        return [f"names: no tensor's name begins with {prefix!r}" for prefix in self.names if prefix not in self.used]

    def open(
        self, ref: ModelRef, base: Source | None, name: str, problems: list[Problem], keep: Keep | None
    ) -> Source | None:
        """The model, or None with what is wrong added to `problems`."""
        try:
            return self.model(ref, base, name, keep)
        except WeightsmithError as error:
            problems += [one.of(name) for one in problems_of(error)]
            return None

    def model(self, ref: ModelRef, base: Source | None, name: str, keep: Keep | None) -> Source:
        """One model: what it is made of, then its adapter, then its blocks."""
        source: Source
        if isinstance(ref.model, str):
            source = self.named(_kept(open_source(ref.model, base=base, expert=ref.expert), keep))
        elif isinstance(ref.model, Slices):
            from weightsmith.io.read.stack import stack_slices

            parts = [self.model(part, base, f"{name}[{i}]", keep) for i, part in enumerate(ref.model.slices)]
            source = stack_slices(parts)
        elif isinstance(ref.model, Modules):
            from weightsmith.io.read.stack import join_modules

            source = join_modules(self.modules(ref.model, base, name, keep))
        else:
            inputs = open_inputs(ref.model, self.nested, keep=keep)
            if inputs.problems:
                raise PlanError(inputs.problems)
            source = self.named(self.nested(ref.model, inputs, f"recipe {name!r}"))
        source = renamed(source, ref.names)
        if ref.adapter is not None:
            source = _kept(open_source(ref.adapter, base=source), keep)
        if ref.align is not None:
            from weightsmith.io.read.aligned import aligned, read_alignment

            source = aligned(source, read_alignment(Path(ref.align)))
        return SliceSource(source, *ref.layers, stack=ref.stack) if ref.layers else source

    def modules(self, modules: Modules, base: Source | None, name: str, keep: Keep | None) -> dict[str, Source]:
        """Every module's source, with its tensors only; the first module that matches a tensor has it."""
        found: dict[str, Source] = {}
        before: list[str] = []
        for module, part in modules.modules.items():

            def mine(tensor: str, match: tuple[str, ...] = part.match, taken: tuple[str, ...] = tuple(before)) -> bool:
                outer = keep is None or keep(tensor)
                return outer and _matches(tensor, match) and not _matches(tensor, taken)

            found[module] = made = self.model(part.model, base, f"{name}.{module}", mine)
            # Under a `keep` they may be another module's, and the rest may be nothing.
            if keep is None and part.match != ("*",) and not (made.keys or made.aliases):
                globs = " or ".join(map(repr, part.match))
                text = f"module {module}: no tensor of {made.origin.label} that is left matches {globs}"
                raise SourceError(text + (f" (before it come {', '.join(list(found)[:-1])})" if before else ""))
            before += part.match
        return found


def _kept(source: Source, keep: Keep | None) -> Source:
    names = (*source.keys, *source.aliases)
    if keep is None or all(map(keep, names)):
        return source
    return RenamedSource(source, {n: n for n in names if keep(n)})


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
