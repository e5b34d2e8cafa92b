"""What a merging method is: a frozen value with one pure function, and a declaration the engine obeys.

A `Filter` edits task vectors (`apply(site) -> Site`); `a | b` joins filters and one method to a `Pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, final

from weightsmith.core.checks import Case, Check, Level, Verdict
from weightsmith.core.costs import Costs
from weightsmith.core.elsewhere import elsewhere
from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.kernel import Fused, Program
from weightsmith.core.keys import Key, Part
from weightsmith.core.parameter import Each, Parameter, choice, flag, integer, number, plain_number
from weightsmith.core.pass_ import Found, Pass, Rows, Scope
from weightsmith.core.site import Group, Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BASE", "Codec", "Each", "Factored", "Filter", "Found", "Grain", "GroupMethod", "MergedFilter", "Method",
           "Parameter", "Pass", "Pipeline", "Rows", "Scope", "Stage", "StandaloneCodec", "Traits", "Whole", "choice",
           "flag", "integer", "number", "registered", "registry"]  # fmt: skip

BASE = "base"
"""In `needs`: the method works on task vectors and reads nothing of the experts but `site.deltas`."""


class Grain(Enum):
    """How much of the model a method must see at once."""

    ELEMENT = "element"  # any block of rows will do
    TENSOR = "tensor"  # the whole tensor
    GROUP = "group"  # several whole tensors that belong together


@dataclass(frozen=True)
class Traits:
    """What a stage declares in its header, besides its type (`Filter`, `Whole`, `Factored`, ...).

    needs      BASE and names of statistics
    checks     what is asked of the recipe and of every tensor, see `checks`
    otherwise  what becomes of tensors that it does not cover or that lack a statistic: the name of a stage, which gets
               the parameters that both have, or what makes one of this stage
    streams    how often it goes through the task vectors one by one (`site.tasks`); 0: it needs their stack
    apart      it keeps the experts' changes apart, so that its result is to be as long as all of them together, not as
               one: see `ops.length`
    paper      where the maths is from; a stage says it in its body
    costs      of a plug-in: what it takes, see `plan.costs`
    """

    name: str
    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    otherwise: str | Callable[[Any], Stage] = ""
    streams: int = 0
    apart: bool = False
    paper: str = ""
    costs: Costs | None = None


_registered: dict[str, type[Stage]] = {}


@dataclass(frozen=True)
class Stage:
    """Common part of filters and methods.  Subclasses are frozen dataclasses whose fields are parameters."""

    traits: ClassVar[Traits]
    paper: ClassVar[str] = ""
    purpose: ClassVar[str] = ""  # under which heading it is listed, see `inspect.catalogue`
    grain: ClassVar[Grain] = Grain.ELEMENT

    def __init_subclass__(cls, *, name: str = "", **declared: Any) -> None:
        super().__init_subclass__()
        if not name:
            return  # an abstract class: Filter, Method
        if unknown := [word for word in declared if word not in _DECLARED]:
            raise RecipeError(f"{name}: unknown trait {unknown[0]!r}{did_you_mean(unknown[0], _DECLARED)}")
        cls.traits = Traits(name, paper=cls.paper, **declared)
        known = _registered.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RecipeError(f"a method is called {name!r} already ({known.__module__}); give this one another name")
        _registered[name] = cls

    def __post_init__(self) -> None:
        problems = []
        for spec in self.parameters():
            given = getattr(self, spec.field)
            several = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 1
            value = tuple(map(plain_number, given)) if several else plain_number(given)
            if value is not given:
                object.__setattr__(self, spec.field, value)
            if text := spec.check(value):
                problems.append(f"{self.name}: {text}")
        if problems:
            raise RecipeError("; ".join(problems))

    @classmethod
    @functools.cache  # asked many times for each tensor of a model
    def parameters(cls) -> tuple[Parameter, ...]:
        """The fields that a recipe may set."""
        own = (f for f in dataclasses.fields(cls) if "parameter" in f.metadata)
        return tuple(replace(f.metadata["parameter"], field=f.name, name=f.name.rstrip("_")) for f in own)

    @property
    def name(self) -> str:
        return self.traits.name

    def describe(self) -> str:
        """The stage with every parameter, as a recipe would say it: 'ties(density=0.2, lambda=1.0, ...)'."""
        return f"{self.name}({', '.join(f'{p.name}={getattr(self, p.field)}' for p in self.parameters())})"

    @final
    def verdicts(self, case: Case) -> Iterator[Verdict]:
        """What the declared checks and its own find, in this order; nothing more of a tensor that it does not cover."""
        for check in (*self.traits.checks, type(self).check):
            for verdict in check(self, case):
                yield verdict
                if verdict.level is Level.LEAVE:
                    return

    @final
    def refusal(self, case: Case) -> str | None:
        """Why it cannot be used; None: it can."""
        return next((text for level, text, _ in self.verdicts(case) if level is Level.REFUSE), None)

    @final
    def elsewhere(self) -> Stage | None:
        """The stage for tensors that this one does not cover; None: such tensors are an error."""
        other = self.traits.otherwise
        if not isinstance(other, str):
            return other(self)
        if not other:
            return None
        cls, own = registry(other), {p.field for p in self.parameters()}
        return cls(**{p.field: getattr(self, p.field) for p in cls.parameters() if p.field in own})

    # -- what a stage may say besides; nothing by default

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        """What must be measured before `merge` or `apply`, in order; `merge` finds it by `Site.result`."""
        return ()

    def fused(self, count: int) -> Fused | None:
        """How the kernels get the same bytes straight from the stored inputs, if they can."""
        return None

    def check(self, case: Case) -> Iterable[Verdict]:
        """Say what only this stage knows of a case: `refuse`, `remark`; of a tensor `remark_here`, `leave`.

        Asked for the recipe (`case.key` is None), then for every tensor.
        """
        return ()

    def informed(self, key: Key, notes: Mapping[str, Mapping[str, Any]]) -> Stage:
        """The stage for one tensor, given what the statistics' files say about themselves (statistic -> notes).

        Under 'earlier': what the run that made the first model noted (stage -> `notes`); under 'logged': what the
        trainer logged for each expert (kind -> one reader per expert, see `plan.logs`).
        """
        return self

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterable[str]:
        """Lines for the user after a run.  names: the experts.

        told: tensor -> figures, of `Site.tell` in `merge` and of `Pass.tells`
        """
        return ()

    def notes(self, found: Found) -> dict[str, Any]:
        """What a later run may want to know of this one: plain values for weightsmith.json, the same for every tensor.

        A run whose first model is this one's output finds them in `informed` under notes["earlier"][name].
        """
        return {}

    def __or__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline((self,)) | other


_DECLARED = tuple(f.name for f in dataclasses.fields(Traits) if f.name != "paper")


class Whole:
    """Beside a kind of stage: it sees whole tensors."""

    grain: ClassVar[Grain] = Grain.TENSOR


class Factored(Whole):
    """Beside a kind of stage: it takes low-rank experts as `site.factors` where it comes first."""


@dataclass(frozen=True)
class Filter(Stage):
    """Edits task vectors.  Before a method: each expert's; after it: the merged one (n = 1)."""

    def apply(self, site: Site) -> Site:
        """Return the site with other task vectors (`site.with_deltas`)."""
        raise NotImplementedError


@dataclass(frozen=True)
class MergedFilter(Filter):
    """A filter for the merged task vector: it comes after the method."""


@dataclass(frozen=True)
class Method(Stage):
    """Makes one tensor of many."""

    def merge(self, site: Site) -> Tensor:
        """Return the merged block, shaped like `site.base`, in the site's dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class GroupMethod(Method):
    """Merges several whole tensors together.  kind: of group, see `core.symmetry`."""

    grain: ClassVar[Grain] = Grain.GROUP
    kind: ClassVar[str]

    def merge_group(self, group: Group) -> dict[str, Tensor]:
        """Return every tensor of the group, merged."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codec(Stage):
    """Keeps all experts in less space.  Last in a pipeline, after the method whose task vector it stores.

    What the stages before it made is `site.deltas[0]`; the experts' own task vectors are `site.origin.deltas`.
    """

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        """What is stored for one tensor; `key` has the output's dtype."""
        raise NotImplementedError

    def encode(self, site: Site) -> dict[str, Tensor]:
        """Return the rows of every part that stand for this block: stored name -> rows."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        """Rebuild one expert's block, shaped like `base`, whose first element has the flat position `offset`.

        `parts` holds the shared parts and the expert's own, by `Part.name`: the rows that cover the block.
        """
        raise NotImplementedError

    def advice(self) -> str:
        """What to change where more is lost than by storing nothing; '' if only another codec helps."""
        return ""


@dataclass(frozen=True)
class StandaloneCodec(Codec):
    """A codec of the experts' own task vectors, `site.deltas`: no stage comes before it."""


@dataclass(frozen=True)
class Pipeline:
    """Filters around one method, applied in order; itself used as a method is.

    Filters before the method see every expert's task vector, filters after it the merged one.
    """

    stages: tuple[Stage, ...]

    def __or__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline(self.stages + (other.stages if isinstance(other, Pipeline) else (other,)))

    @property
    def name(self) -> str:
        return " | ".join(s.name for s in self.stages)

    @property
    def method(self) -> Method:
        """The one stage that is not a filter."""
        found = [s for s in self.stages if isinstance(s, Method)]
        if len(found) != 1:
            raise RecipeError(
                f"a pipeline needs exactly one merging method besides its filters; {self.name!r} has {len(found)}"
                + ("" if found else "; end it with task_arithmetic")
            )
        for stage in self.stages[: self.stages.index(found[0])]:
            if isinstance(stage, MergedFilter):
                raise RecipeError(f"{stage.name} works on the merged task vector; put it behind {found[0].name}")
        for stage in self.stages[:-1]:
            if isinstance(stage, Codec):
                raise RecipeError(f"{stage.name} is a codec; put it last")
        return found[0]

    def fused(self, count: int) -> Program | None:
        """How the kernels get the same bytes, if they can."""
        return Program.of([stage.fused(count) for stage in self.stages])

    @property
    def codec(self) -> Codec | None:
        """The last stage, if it is a codec: the result is then its parts, not one merged tensor."""
        last = self.stages[-1] if self.stages else None
        return last if isinstance(last, Codec) else None

    @property
    def used(self) -> tuple[Stage, ...]:
        """The stages that count: none before a `StandaloneCodec` does."""
        return self.stages[-1:] if isinstance(self.stages[-1], StandaloneCodec) else self.stages

    @property
    def needs(self) -> tuple[str, ...]:
        wanted = [n for s in self.used for n in s.traits.needs]
        if len(self.used) > 1:
            wanted.append(BASE)  # filters edit task vectors
        return tuple(dict.fromkeys(wanted))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Those of `needs` that are read from files."""
        return tuple(name for name in self.needs if name != BASE)

    @property
    def grain(self) -> Grain:
        order = [Grain.ELEMENT, Grain.TENSOR, Grain.GROUP]
        return max((s.grain for s in self.stages), key=order.index)

    def passes(self, count: int) -> tuple[tuple[int, Pass[Any]], ...]:
        """(stage index, pass) of all that is measured, in order; filters after the method see one task vector."""
        found: list[tuple[int, Pass[Any]]] = []
        for i, stage in enumerate(self.stages):
            found += [(i, one) for one in stage.passes(count)]
            count = 1 if isinstance(stage, Method) else count
        return tuple(found)

    def rounds(self, count: int) -> int:
        """How often these passes look at the inputs, at most."""
        return sum(one.rounds for _, one in self.passes(count))

    def site_for(self, index: int, site: Site, found: Mapping[int, Found]) -> Site:
        """The site as stage `index` sees it: the stages before have done their work."""
        if isinstance(self.stages[index], StandaloneCodec):
            return replace(site, origin=site, found=found.get(index, {}))
        for i, stage in enumerate(self.stages[:index]):
            here = site.with_found(found.get(i, {}))
            site = stage.apply(here) if isinstance(stage, Filter) else _merged_delta(stage, here)
        return site.with_found(found.get(index, {}))

    def merge(self, site: Site, found: Mapping[int, Found] | None = None) -> Tensor:
        """Run all stages on a block.  found: stage index -> results of its passes."""
        last = len(self.stages) - 1
        here = self.site_for(last, site, found or {})
        final = self.stages[last]
        if isinstance(final, Method):
            return final.merge(here)
        assert isinstance(final, Filter)
        return final.apply(here).experts[0]

    def encode(self, site: Site, found: Mapping[int, Found] | None = None) -> dict[str, Tensor]:
        """Run all stages on a block, the last of which is a codec: stored name -> rows."""
        assert self.codec is not None
        return self.codec.encode(self.site_for(len(self.stages) - 1, site, found or {}))


def _merged_delta(stage: Stage, site: Site) -> Site:
    """The site whose only task vector is what `stage` makes of `site`'s."""
    assert isinstance(stage, Method)
    if BASE in stage.traits.needs:
        delta = stage.merge(site.at_zero())
    else:
        delta = stage.merge(site) if site.base is None else stage.merge(site) - site.base
    return replace(site.with_deltas(delta[None]), names=("merged",))


# --- registry --------------------------------------------------------------------------------------

_PACKAGES = ("weightsmith.methods", "weightsmith.codecs")


def registered() -> Mapping[str, type[Stage]]:
    """Every method, filter and codec by name: built-in ones first, then installed plug-ins."""
    from importlib.metadata import entry_points

    for package in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    for entry in entry_points(group="weightsmith.methods"):
        entry.load()
    return dict(sorted(_registered.items()))


def registry(name: str, others: Iterable[str] = ()) -> type[Stage]:
    """Return the stage called `name`; an unknown name is an error with the nearest one, `others` among them."""
    if name not in _registered and name.isidentifier():
        for package in _PACKAGES:  # a method's file is called what the method is called
            try:
                importlib.import_module(f"{package}.{name}")
                break
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":
                    raise
    if name in _registered:
        return _registered[name]
    known = registered()
    for stage in known.values():
        if name in stage.traits.aliases:
            return stage
    if name in known:
        return known[name]
    words = [*known, *(alias for stage in known.values() for alias in stage.traits.aliases), *others]
    raise RecipeError(elsewhere(name) or f"unknown method {name!r}{did_you_mean(name, words)}")
