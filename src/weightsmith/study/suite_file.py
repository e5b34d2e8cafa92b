"""What a suite is run on: models, and where the data of its tasks are.  From a YAML or JSON file.

    suite: mergebench
    base: models/base
    models: {math: models/math, coding: models/code}          # an expert is called as its domain is
    tasks:
      gsm8k_cot: {generate: {file: gsm8k.jsonl, rule: gsm8k}}  # one of the suite's
      my_proxy: {domain: math, role: proxy, choices: FILE}     # one of your own
    template: plain

The suite of the scale study takes `bases` instead of `base` and `models`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from weightsmith.core.errors import RecipeError, did_you_mean, nearest
from weightsmith.recipe.fields import Located, listed, named
from weightsmith.recipe.grammar import Fault, Grammar, Reading, inside, mapping
from weightsmith.recipe.load import read_file
from weightsmith.recipe.reader import Location
from weightsmith.recipe.schema import Recipe, missing_inputs
from weightsmith.study.evaluators.specs import EVALUATORS, Spec
from weightsmith.study.evaluators.subject import Setting
from weightsmith.study.schema import Grid, Text, grid_faults
from weightsmith.study.suite import LOWER, PER_UNIT, Direction, Suite, Task
from weightsmith.study.suite_data import chosen_on_tests
from weightsmith.study.suites import suite, suites

__all__ = ["EXAMPLE", "Bound", "Rung", "SuiteRun", "bound_tasks", "load_run"]

EXAMPLE = ("{suite: mergebench, base: base, models: {math: math, coding: coding}, "
           "tasks: {gsm8k_cot: {generate: {file: gsm8k.jsonl, rule: gsm8k}}}}")  # fmt: skip

_OF_THE_RECIPE = Recipe.model_fields.keys() - {"method", "parameters"}

_DIRECTIONS: Mapping[str, Direction] = {
    "perplexity": PER_UNIT, "bits_per_byte": PER_UNIT, "mse": LOWER, "unchanged": LOWER, "bytes": PER_UNIT,
    "attack_success": LOWER, "over_refusal": LOWER,
}  # fmt: skip
"""Metrics of which lower is better, where nothing else is said."""


def _exists(value: str) -> str:
    if not Path(value).exists():
        raise ValueError(f"no file or folder {value!r} beside the run's file")
    return value


class Entry(Grammar):
    """One task: how it is measured, and, for one that the suite does not have, what it stands for."""

    evaluator: str
    spec: Any
    metric: str | None = None
    domain: str | None = None
    role: Literal["test", "proxy", "guard", "held-out"] | None = None
    direction: Literal["higher", "lower", "per unit"] | None = None
    chance: float | None = Field(default=None, ge=0, lt=1)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping):
            raise ValueError(
                f"should name an evaluator, as {{choices: FILE.jsonl}}; is {json.dumps(given, default=repr)[:60]}"
            )
        kinds = [key for key in given if key in EVALUATORS]
        if len(kinds) != 1:
            strange = [key for key in given if key not in cls.model_fields and key not in EVALUATORS]
            hint = did_you_mean(str(strange[0]), EVALUATORS) if strange and not kinds else ""
            raise ValueError(f"needs one evaluator of {', '.join(EVALUATORS)}; has {', '.join(kinds) or 'none'}{hint}")
        own = {key: value for key, value in given.items() if key != kinds[0]}
        return own | {"evaluator": kinds[0], "spec": given[kinds[0]] or {}}, {
            "spec": (kinds[0],),
            "evaluator": (kinds[0],),
        }

    @field_validator("spec", mode="before")
    @classmethod
    def _told(cls, value: Any, info: ValidationInfo) -> Spec:
        return EVALUATORS[info.data["evaluator"]].model_validate(value, context=info.context)

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        return did_you_mean(key, [*(cls.model_fields.keys() - {"evaluator", "spec"}), *EVALUATORS])


class Rung(Grammar):
    """A base with its experts: one of several in the scale study.

    size  in any unit, to order the bases by;  kind: weak (pre-trained) or strong (instruction-tuned)
    """

    recipe: Recipe
    joint: Located | None = None
    size: float = Field(default=0.0, ge=0)
    kind: Literal["", "weak", "strong"] = ""

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping) or "recipe" in given:
            return given, {}
        own = {key: value for key, value in given.items() if key not in _OF_THE_RECIPE}
        recipe = {key: value for key, value in given.items() if key in _OF_THE_RECIPE}
        return own | {"recipe": {**recipe, "method": "linear"}}, {"recipe": ()}

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        return did_you_mean(key, [*_OF_THE_RECIPE, "joint", "size", "kind"])


class SuiteRun(Grammar):
    """The file of a run."""

    ROOT: ClassVar[str] = "the run"

    suite: str = Field(examples=["mergebench"])
    bases: Annotated[dict[str, Rung], named("bases")]
    title: Text = ""
    homes: dict[str, str] = Field(default_factory=dict)
    checkpoints: dict[str, Located] = Field(default_factory=dict)
    tasks: Annotated[dict[str, Entry], named("tasks", ", as gsm8k: {generate: FILE.jsonl}")]
    methods: Annotated[dict[str, Grid], named("methods")] | None = None
    template: str = "plain"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: Annotated[int, Field(ge=1)] = 16
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    tune: Literal["grid", "none"] = "grid"
    budget: Annotated[int, Field(ge=1)] = 10
    counts: Annotated[tuple[int, ...], listed("whole numbers")] = ()
    subsets: Annotated[int, Field(ge=1)] | None = None
    environments: dict[str, Located] = Field(default_factory=dict)
    _file: Path = PrivateAttr(default=Path())

    @property
    def file(self) -> Path:
        return self._file

    def setting(self, device: str, limit: int | None = None) -> Setting:
        """What all tasks have in common; `limit` of the command line comes first."""
        return Setting(self.template, self.dtype, self.batch, limit or self.limit, self.seed, device)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping):
            return given, {}
        if "bases" in given:
            return given, {}
        own = {key: value for key, value in given.items() if key not in _OF_THE_RECIPE - {"seed"} and key != "joint"}
        rung = {key: value for key, value in given.items() if key in _OF_THE_RECIPE or key == "joint"}
        return own | {"bases": {"": rung}}, {}

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        return did_you_mean(key, [*_OF_THE_RECIPE, *cls.model_fields])

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        name = tree.get("suite")
        if isinstance(name, str) and name not in suites():
            yield Fault(
                ("suite",), f"unknown suite {name!r}{did_you_mean(name, suites())}; known: {', '.join(suites())}"
            )
        for label, rung in mapping(tree.get("bases")).items():
            if isinstance(rung, Mapping) and rung.get("base") is None:
                yield Fault(
                    ("bases", label) if label else (),
                    "a suite needs a base: what experts gained is measured against it",
                )
        yield from grid_faults(tree.get("methods"), ())
        for task, entry in mapping(tree.get("tasks")).items():
            told = mapping(entry).get("domain") if mapping(entry).get("role", "test") == "test" else None
            if isinstance(told, str) and (text := _no_domain(told, suites().get(str(name)))):
                yield Fault(("tasks", task, "domain"), f"tasks.{task}: {text}")
        template = tree.get("template", "plain")
        if template not in ("plain", "chat") and "{prompt}" not in str(template):
            yield Fault(
                ("template",), f"should be plain, chat or a text with {{prompt}}, is {str(template)[:40]!r}", "value"
            )
        if (counts := tree.get("counts")) and (
            not isinstance(counts, list) or not all(type(c) is int and c >= 1 for c in counts)
        ):
            yield Fault(
                ("counts",),
                f"should be a list of whole numbers from 1, is {json.dumps(counts, default=repr)[:40]}",
                "value",
            )

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from missing_inputs(tree, reading)
        for label, rung in mapping(tree.get("bases")).items():
            found = missing_inputs(mapping(rung).get("recipe", rung), reading)
            yield from inside("bases", inside(label, found))


class Bound(Grammar):
    """A task with its evaluator, checked."""

    model_config = Grammar.model_config | {"arbitrary_types_allowed": True}

    task: Any
    kind: str
    spec: Any

    @property
    def name(self) -> str:
        return str(self.task.name)


def bound_tasks(run: SuiteRun, chosen: Suite) -> dict[str, Bound]:
    """Task -> what it is and how it is measured; RecipeError with everything that does not go together."""
    found, faults = {}, []
    for name, entry in run.tasks.items():
        try:
            found[name] = _bound(name, entry, chosen)
        except RecipeError as error:
            faults += [f"{run.file}: tasks.{name}: {problem.text}" for problem in error.problems]
    faults += [
        f"{run.file}: tasks.{proxy}: has the data of {test}, which is tested; coefficients are never chosen on test "
        "data: give it a split of its own"
        for proxy, test in chosen_on_tests(found)
    ]
    tests = [one for one in found.values() if one.task.role == "test"]
    if not tests and not faults:
        faults.append(f"{run.file}: no task of role test among tasks: nothing would be scored")
    if faults:
        raise RecipeError(*faults)
    return found


def _no_domain(domain: str, chosen: Suite | None) -> str:
    """The problem that a suite has no such domain; '' where it has."""
    if chosen is None or not chosen.domains or domain in chosen.domains:
        return ""
    return (
        f"unknown domain {domain!r}{did_you_mean(domain, chosen.domains)}; "
        f"{chosen.name} has {', '.join(chosen.domains)}"
    )


def _bound(name: str, entry: Entry, chosen: Suite) -> Bound:
    known = chosen.task(name)
    kind = EVALUATORS[entry.evaluator]
    metric = entry.metric or (known.metric if known is not None else next(iter(kind.METRICS), kind.MAIN))
    if entry.evaluator == "code" and entry.metric is None:
        metric = f"pass@{entry.spec.k}" if known is None else metric
    if kind.METRICS and metric.partition(",")[0] not in kind.METRICS:
        if known is not None and entry.metric is None:
            metric = kind.METRICS[0]  # the suite's key is another harness's
        else:
            raise RecipeError(
                f"unknown metric {metric!r}{did_you_mean(metric, kind.METRICS)}; {entry.evaluator} gives "
                f"{', '.join(kind.METRICS)}"
            )
    if known is None:
        if entry.domain is None:
            names = [task.name for task in chosen.tasks]
            near = nearest(name, names)
            raise RecipeError(f"is none of the suite's tasks{near}; give it a domain to make it one of your own")
        known = Task(name, metric, entry.domain)
    changes: dict[str, Any] = {"metric": metric, "domain": entry.domain, "role": entry.role, "chance": entry.chance,
               "direction": entry.direction or _DIRECTIONS.get(metric.partition(",")[0])}  # fmt: skip
    task = replace(known, **{key: value for key, value in changes.items() if value is not None})
    if task.role == "test" and (text := _no_domain(task.domain, chosen)):
        raise RecipeError(text)
    return Bound(task=task, kind=entry.evaluator, spec=entry.spec)


def load_run(path: str | Path, name: str | None = None) -> tuple[SuiteRun, Suite]:
    """Read a run's file; `name` is the suite, where the file does not say so.

    Raises RecipeError with every problem: file, line, column, what is wrong and the nearest valid word.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"{file}: no such file; write one, as {EXAMPLE}; weightsmith bench --list: the suites")
    if name is not None:
        suite(name)
    run = read_file(SuiteRun, file, [f"suite={name}"] if name is not None else [])
    run._file = file
    return run, suite(run.suite)
