"""Words of a recipe that no tensor meets: globs, roles, ranges of blocks.  Mostly they are misspelt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import Any

from weightsmith.core.errors import nearest
from weightsmith.core.keys import RULE_ROLES, Key, plays
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.opened import Inputs
from weightsmith.recipe.cases import applies, is_cases
from weightsmith.recipe.fields import OUTSIDE
from weightsmith.recipe.reader import Location, spell
from weightsmith.recipe.schema import Recipe

__all__ = ["Unmatched"]


@dataclass(frozen=True)
class Unmatched:
    """Finds them among the tensors of all models.

    names     every tensor's name, tied ones too
    missing   models that could not be opened: their tensors are not among these
    """

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def among(cls, inputs: Inputs) -> Unmatched:
        found = dict.fromkeys(n for _, source in inputs.models for n in (*source.keys, *source.aliases))
        return cls(tuple(found), tuple(sorted(inputs.missing)))

    def problems(self, recipe: Recipe) -> Iterator[tuple[Problem, bool]]:
        """(problem, whether the recipe says that it may be one of another model)."""
        for glob in recipe.exclude:
            if text := self._glob(glob):
                yield Problem(Code.UNMATCHED, "exclude", f"exclude: {text}"), False
        for i, rule in enumerate(recipe.rules):
            yield from self._selector(rule.model_dump(), ("rules", i))
            yield from self._cases(rule.parameters, ("rules", i, "parameters"))
            for stage in rule.method or ():
                yield from self._cases(stage.parameters, ("rules", i, "method", stage.name))
        for stage in recipe.method:
            yield from self._cases(stage.parameters, ("method", stage.name))
        yield from self._cases(recipe.parameters, ("parameters",))
        for name, ref in recipe.models.items():
            yield from self._cases(ref.parameters, ("models", name))

    def _cases(self, value: Any, location: Location) -> Iterator[tuple[Problem, bool]]:
        """The lists of cases in a parameter's value, or in values by name; a list over blocks where there are none."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield from self._cases(inner, (*location, name))
        elif is_cases(value):
            for i, case in enumerate(value):
                if isinstance(case, Mapping):
                    yield from self._selector(case, (*location, i))
                    yield from self._cases(case.get("value"), (*location, i, "value"))
        elif isinstance(value, (list, tuple)) and len(set(map(str, value))) > 1 and self.names and not self._blocks:
            where = spell(location)
            text = (f"{where}: a list of numbers goes from the first block to the last, and no tensor's name holds a "
                    "block number: embeddings have its first value, all others its last")  # fmt: skip
            yield Problem(Code.UNMATCHED, where, text), True

    def _selector(self, given: Mapping[str, Any], location: Location) -> Iterator[tuple[Problem, bool]]:
        """What no tensor meets of one selector: each of its globs, its roles, its blocks, else all of it together."""
        match, role, layers = _words(given.get("match", "*")), _words(given.get("role")), given.get("layers")
        texts = [text for glob in match or () if (text := self._glob(glob))]
        if role is not None and not self._any(["*"], role, None):
            texts.append(self._no_role(role))
        if layers is not None and not self._any(["*"], None, layers):
            texts.append(self._no_layers(layers))
        if not texts and location[0] == "rules" and not self._any(match or ["*"], role, layers):
            texts.append(f"no tensor{self._of_those} meets all of its conditions")
        for text in texts:
            where = spell(location)
            yield Problem(Code.UNMATCHED, where, f"{where}: {text}"), bool(given.get("optional"))

    @cached_property
    def _blocks(self) -> bool:
        return any(Key(name, (), "float32").layer is not None for name in self.names)

    def _any(self, match: Sequence[str], role: Sequence[str] | None, layers: Any) -> bool:
        return any(applies(Key(name, (), "float32"), match, role, layers) for name in self.names)

    def _glob(self, glob: str) -> str:
        """What to say of a glob that no name matches; '' where one does."""
        if any(fnmatchcase(name, glob) for name in self.names):
            return ""
        return f"no tensor{self._of_those} matches {glob!r}{self._near(glob)}"

    @property
    def _of_those(self) -> str:
        """What was looked at, where a model is missing."""
        return f" (of the models that are there, without {', '.join(self.missing)})" if self.missing else ""

    def _near(self, glob: str) -> str:
        """The nearest name for one without wildcards, else for its words the nearest components of names."""
        if glob in RULE_ROLES and self._any(["*"], [glob], None):
            return f"; a rule with role: {glob} means the tensors of that role"
        for wider in (f"*{glob}", f"{glob}*", f"*{glob}*"):  # names are met as a whole
            if any(fnmatchcase(name, wider) for name in self.names):
                return f"; did you mean {wider!r}?"
        if not re.search(r"[*?\[]", glob):
            return nearest(glob, self.names)
        known = dict.fromkeys(part for name in self.names for part in name.split("."))
        known |= dict.fromkeys(".".join(pair) for name in self.names for pair in pairwise(name.split(".")))
        words = [word.strip(".") for word in re.split(r"[*?]|\[[^]]*\]", glob)]
        for word in words:
            if word and not any(word in name for name in self.names):
                return nearest(word, known)
        for word in words:  # 'model.layer.' is the beginning of a name, but ends within a component
            for part in word.split("."):
                if part and part not in known:
                    return nearest(part, known)
        return ""

    def _no_role(self, role: Sequence[str]) -> str:
        there = [one for one in RULE_ROLES if one != "other" and any(plays(name, one) for name in self.names)]
        known = f"; there are {', '.join(there)}" if there else ""
        return f"no tensor{self._of_those} plays the role {' or '.join(map(repr, role))}{known}"

    def _no_layers(self, layers: Any) -> str:
        if layers == OUTSIDE:
            return "no tensor lies outside the blocks"
        last = max((n for name in self.names if (n := Key(name, (), "float32").layer) is not None), default=None)
        counted = "no tensor's name holds a block number" if last is None else f"the last block is {last}"
        return f"no tensor lies in the blocks {list(layers)}; {counted}"


def _words(value: Any) -> Sequence[str] | None:
    return (value,) if isinstance(value, str) else value
