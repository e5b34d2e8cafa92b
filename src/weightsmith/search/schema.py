"""SEARCH.yaml: a recipe, what is searched of it, how candidates are scored, and by which sampler.

The same grammar as recipes; mergekit-evolve's files are read too (`search.evolve`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from weightsmith.core.errors import did_you_mean
from weightsmith.recipe.check import stages_written
from weightsmith.recipe.fields import Located, Selector, Words, named
from weightsmith.recipe.grammar import Fault, Grammar, Reading, inside, kind_of, mapping
from weightsmith.recipe.load import read_file, read_text
from weightsmith.recipe.reader import Location
from weightsmith.recipe.schema import Recipe, missing_inputs
from weightsmith.search.evolve import Genome, translated
from weightsmith.search.samplers.known import SAMPLERS
from weightsmith.search.space import check_where
from weightsmith.tune.schema import Chosen, TaskData, recipe_or_path

__all__ = ["Genes", "Halving", "MembersSpec", "ScoreSpec", "SearchFile", "SlicesSpec", "Splits", "load", "loads"]

KINDS = ("command", "file", "accuracy", "bits_per_byte", "lm_eval")
"""How candidates are scored: exactly one of these."""
BUILT_IN = {"accuracy": "max", "bits_per_byte": "min"}
FRONTS = ("nsga2", "nsga3", "map")
"""Samplers that look for a front where there are several goals."""
PER = ("model", "layers", "part")


def _per(value: Any) -> Any:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not words:
        raise ValueError(f"should be some of {', '.join(PER)}, is {value!r}")
    for word in words:
        if word not in PER:
            raise ValueError(f"unknown word {word!r}{did_you_mean(str(word), PER)}; it takes {', '.join(PER)}")
    return tuple(words)


def _parts(value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"should be a mapping from labels to selectors, as {{mlp: {{match: '*mlp*'}}}}; is {kind_of(value)}"
        )
    made: dict[str, Any] = {}
    for label, one in value.items():
        told = {"match": one} if isinstance(one, str) else dict(mapping(one))
        Selector.model_validate(told)
        made[str(label)] = told
    return made


class Genes(Grammar):
    """What is searched of one value.

    Short: [low, high], or {values: [...]} for words.
    """

    low: float | None = None
    high: float | None = None
    values: tuple[Any, ...] | None = None
    log: bool = Field(default=False, description="even on the scale of logarithms")
    integer: bool = Field(default=False, description="whole numbers")
    start: Any = Field(default=None, description="where the search begins, or model -> that; default: the middle")
    per: Annotated[tuple[str, ...], BeforeValidator(_per)] | None = Field(
        default=None, description="a gene for each model, for each group of `group` blocks, for each part"
    )
    group: int = Field(default=1, ge=1, description="blocks in a group, for per: layers")
    smooth: bool = Field(default=False, description="groups are points of a ramp over depth")
    parts: Annotated[dict[str, Any], BeforeValidator(_parts)] | None = Field(
        default=None, description="label -> glob or {match, role} of the tensors, for per: part; the rest is one more"
    )
    link: Literal["identity", "abs", "share"] = "identity"

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, (list, tuple)):
            if len(given) != 2 or not all(type(v) in (int, float) for v in given):
                raise ValueError("should be two numbers [low, high], or {values: [...]}")
            return {"low": float(given[0]), "high": float(given[1])}, {"low": (0,), "high": (1,)}
        if isinstance(given, Mapping):
            found = dict(given)
            for name in ("low", "high"):
                if type(found.get(name)) is int:
                    found[name] = float(found[name])
            if isinstance(found.get("values"), list):
                found["values"] = tuple(found["values"])
            return found, {}
        raise ValueError(f"should be [low, high] or a mapping, is {kind_of(given)}")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        low, high, values = tree.get("low"), tree.get("high"), tree.get("values")
        if values is not None:
            if low is not None or high is not None:
                yield Fault(("values",), "stand beside low or high; keep one of them", "value")
            if isinstance(values, (list, tuple)) and len(values) < 2:
                yield Fault(("values",), "should be at least two, else there is nothing to choose", "value")
            if isinstance(values, (list, tuple)) and len({repr(v) for v in values}) < len(values):
                yield Fault(("values",), "holds a value twice", "value")
        elif not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
            yield Fault((), "has no bounds; write [low, high], or {values: [...]}", "lacking")
        elif not low < high or abs(low) == float("inf") or abs(high) == float("inf"):
            yield Fault((), f"low {low:g} should be below high {high:g}, both finite", "value")
        elif tree.get("log") and low <= 0:
            yield Fault(("log",), f"needs bounds above 0, low is {low:g}", "value")
        elif tree.get("integer") and (low != int(low) or high != int(high)):
            yield Fault(("integer",), f"needs whole bounds, got {low:g} and {high:g}", "value")
        per = tree.get("per")
        if tree.get("parts") is not None and "part" not in (per or ()):
            yield Fault(("parts",), "are for per: part", "value")
        if "part" in (per or ()) and not tree.get("parts"):
            yield Fault(("per",), "part needs parts: {mlp: '*mlp*'}", "value")


class MembersSpec(Grammar):
    """Which models take part: at least `least`."""

    SHORT: ClassVar[str] = "least"
    least: int = Field(default=1, ge=1)


class SlicesSpec(Grammar):
    """Slices of layers as genes; see `search.space.Slots`."""

    SHORT: ClassVar[str] = "group"
    group: int = Field(default=1, ge=1, description="blocks of a slice")
    repeats: int = Field(default=1, ge=1, le=8, description="how often a model's blocks may be gone through")
    skip: bool = Field(default=False, description="a place may stay empty")
    models: Words = Field(default=(), description="those that lend blocks; default: all")


class Splits(Grammar):
    """Data to search by, and other data to report on."""

    search: Located = Field(description="what candidates are compared by", examples=["FILE"])
    report: Located = Field(description="other data, for the final figures", examples=["FILE"])

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        paths = [reading.located(str(tree.get(split))) for split in ("search", "report")]
        if "search" in tree and "report" in tree and same_data(*paths):
            yield Fault(
                ("report",), "is the data that is searched by, so its scores would flatter; give other data", "value"
            )


def same_data(one: str, other: str) -> bool:
    """Whether two paths, or names of tasks, are the same, or hold the same bytes."""
    first, second = Path(one), Path(other)
    if one == other or (first.exists() and second.exists() and first.samefile(second)):
        return True
    if not (first.is_file() and second.is_file()) or first.stat().st_size != second.stat().st_size:
        return False
    from weightsmith.recipe.table import digest

    return digest(first) == digest(second)


class LmEval(Grammar):
    """Tasks of lm-evaluation-harness, in a process of its own, without a network."""

    tasks: dict[str, Splits] = Field(description="name of the score -> {search: TASK, report: TASK}")
    include: Located | None = Field(default=None, description="folder with the tasks' YAML files")
    metric: str | dict[str, str] = Field(default="acc,none", description="of all tasks, or score -> metric")
    shots: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1, description="items of each task")
    python: str | None = Field(default=None, description="python that has lm_eval; default: this one")
    arguments: str = Field(default="dtype=float32", description="model_args beside the path")
    batch: int = Field(default=8, ge=1)


class ScoreSpec(Grammar):
    """How a candidate is scored."""

    command: str | None = Field(default=None, description="program; {model}, {data}, {items} stand for what it gets")
    file: Located | None = Field(default=None, description="python file with scores(model, data), run in this process")
    accuracy: dict[str, Splits] | None = None
    bits_per_byte: dict[str, Splits] | None = None
    lm_eval: LmEval | None = None
    data: Splits | None = Field(default=None, description="of a program or file")
    arguments: dict[str, Any] = Field(default_factory=dict, description="further keywords of the file's function")
    timeout: float = Field(default=3600.0, gt=0, description="seconds that a program may take")
    retries: int = Field(default=0, ge=0, le=20, description="how often a failed program is run again")

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, Mapping) and type(given.get("timeout")) is int:
            return {**given, "timeout": float(given["timeout"])}, {}
        return super().long_form(given, reading)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        given = [kind for kind in KINDS if tree.get(kind) is not None]
        if len(given) != 1:
            yield Fault((), f"takes exactly one of {', '.join(KINDS)}, has {', '.join(given) or 'none'}", "value")
        needs = given[:1] in (["command"], ["file"])
        if needs and tree.get("data") is None:
            yield Fault((), "has no 'data'; write data: {search: FILE, report: FILE}, two different files", "lacking")
        if given and not needs and tree.get("data") is not None:
            yield Fault(("data",), f"stands with the tasks of {given[0]}", "value")
        where = {"": tree.get("data")} if needs else mapping(tree.get(given[0])) if given else {}
        for name, splits in where.items() if given != ["lm_eval"] else ():
            for split, path in mapping(splits).items():
                if isinstance(path, str) and not Path(reading.located(path)).exists():
                    here = ("data",) if needs else (given[0], name)
                    yield Fault((*here, split), f"no file or folder {path!r}")
        if tree.get("arguments") and given != ["file"]:
            yield Fault(("arguments",), "are for the function of a file", "value")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def tasks(self) -> dict[str, Splits]:
        """Name of a score -> its data; of a program or file, one entry ''."""
        found: Any = self.lm_eval.tasks if self.lm_eval is not None else self.accuracy or self.bits_per_byte
        if found is None:
            assert self.data is not None
            return {"": self.data}
        return dict(found)


class PoolSpec(Grammar):
    """What sampler frank_wolfe follows: the loss of data that it may learn from."""

    data: Annotated[dict[str, TaskData], named("data", ", as math: math.jsonl")] = Field(
        description="task -> data", examples=["{math: math.jsonl}"]
    )
    objective: Chosen = Field(default_factory=lambda: Chosen.model_validate("labels"))
    kind: str = "auto"
    batch: int = Field(default=16, ge=1)
    examples: int = Field(default=100, ge=1, description="examples of each task")
    length: int = Field(default=256, ge=2)


class Halving(Grammar):
    """Successive halving: all candidates of a generation on few items, the better ones on more, the best on all."""

    SHORT: ClassVar[str] = "items"
    items: tuple[int, ...] = Field(description="items of the rounds before the last, which has all", examples=["[16]"])
    keep: float = Field(default=1 / 3, gt=0, lt=1, description="share that goes on to the next round")

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        found = dict(given) if isinstance(given, Mapping) else {"items": given}
        if isinstance(found.get("items"), list):
            found["items"] = tuple(found["items"])
        elif type(found.get("items")) is int:
            found["items"] = (found["items"],)
        return found, {}

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        items = tree.get("items")
        if isinstance(items, tuple) and (
            not items or any(type(i) is not int or i < 1 for i in items) or list(items) != sorted(set(items))
        ):
            yield Fault(("items",), "should be rising whole numbers from 1 on", "value")


class SearchFile(Grammar):
    """A recipe, and what is searched of it."""

    ROOT: ClassVar[str] = "the search"

    recipe: Annotated[Recipe, BeforeValidator(recipe_or_path)] = Field(
        description="a recipe or its path", examples=["recipe.yaml"]
    )
    genome: Genome | None = Field(default=None, description="mergekit-evolve's, in place of recipe and space")
    space: dict[str, Genes] = Field(default_factory=dict, description="parameter or path -> what is searched of it")
    members: MembersSpec | None = Field(default=None, description="search which models take part: {least: 2}")
    slices: SlicesSpec | None = Field(default=None, description="search a stack of the models' layers: {group: 4}")
    score: ScoreSpec = Field(
        examples=["{command: 'python score.py {model} {data}', data: {search: FILE, report: FILE}}"]
    )
    goals: Annotated[dict[str, Literal["max", "min"]], named("scores", ", as math: max")] | None = Field(
        default=None, description="score -> max or min; default: those of the evaluator, or one number, higher better"
    )
    weights: dict[str, float] | None = Field(
        default=None, description="one number of several scores: their sum, each times its weight"
    )
    sampler: Chosen = Field(
        default_factory=lambda: Chosen.model_validate("tpe"),
        description="random, grid, tpe, gp, nsga2, nsga3, cmaes, ...",
    )
    evaluations: int = Field(default=100, ge=1, description="candidates that are scored, as far as they differ")
    batch: int | None = Field(default=None, ge=1, description="candidates of a generation; default: the sampler's")
    together: int = Field(default=4, ge=1, description="candidates that are built in one pass over the models")
    halving: Halving | None = None
    pool: PoolSpec | None = Field(default=None, description="of sampler frank_wolfe: the data whose loss it follows")
    rescore: int = Field(default=3, ge=0, description="how often the incumbent is scored again")
    controls: bool = Field(default=True, description="search at random too, with an equal budget, for comparison")
    seed: int = 0

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, Mapping) and "genome" in given and "recipe" not in given:
            given = translated(given)
        if isinstance(given, Mapping) and isinstance(given.get("weights"), Mapping):
            weights = {k: float(v) if type(v) is int else v for k, v in given["weights"].items()}
            return {**given, "weights": weights}, {}
        return given, {}

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        recipe, sampler = tree.get("recipe"), tree.get("sampler")
        name = next(iter(sampler), None) if isinstance(sampler, Mapping) else sampler
        if isinstance(name, str) and name not in SAMPLERS:
            yield Fault(("sampler",), f"unknown sampler {name!r}{did_you_mean(name, SAMPLERS)}; "
                                      f"known are {', '.join(SAMPLERS)}", "value")  # fmt: skip
        elif isinstance(name, str) and isinstance(sampler, Mapping) and len(sampler) == 1:
            yield from (Fault(("sampler", name), text) for text in SAMPLERS[name].wrong(mapping(sampler[name])))
        # Of a recipe in a file of its own it is checked with the models.
        stages = stages_written(mapping(recipe).get("method"))
        for where, genes in mapping(tree.get("space")).items() if stages else ():
            per = mapping(genes).get("per") or ()
            if (text := check_where(str(where), stages, "model" in per)) is not None:
                yield Fault(("space", where), f"space: {text}")
        goals = mapping(tree.get("goals"))
        for name in mapping(tree.get("weights")):
            if goals and name not in goals:
                yield Fault(("weights", name), f"unknown score {name!r}", "unknown", did_you_mean(str(name), goals))
        if goals and tree.get("weights") and not any(mapping(tree["weights"]).values()):
            yield Fault(("weights",), "are all 0; give one of them a weight", "value")

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from inside("recipe", missing_inputs(tree.get("recipe"), reading))

    # -- what it comes to

    @property
    def aims(self) -> dict[str, str]:
        """Score -> max or min."""
        if self.goals:
            return dict(self.goals)
        kind = self.score.kind
        if kind in ("command", "file"):
            return dict.fromkeys(self.weights, "max") if self.weights else {"score": "max"}
        return dict.fromkeys(self.score.tasks, BUILT_IN.get(kind, "max"))

    @property
    def front(self) -> bool:
        """Whether several scores are searched at once, for a front."""
        return self.weights is None and len(self.aims) > 1 and self.sampler.name in FRONTS


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> SearchFile:
    """Read a search; see `weightsmith.recipe.load.read_file`."""
    return read_file(SearchFile, path, overrides, files)


def loads(text: str, where: str = "search", folder: Path | None = None) -> SearchFile:
    """Read a search from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(SearchFile, text, where, (), folder)
