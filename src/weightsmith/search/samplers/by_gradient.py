"""Frank-Wolfe as a sampler: each candidate is the next iterate of a walk through a pool (`search.pool`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.errors import OutputError, RecipeError, did_you_mean
from weightsmith.core.settings import Settings, cores
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.table import digest, read_table, write_table
from weightsmith.search.frank_wolfe import INITIAL
from weightsmith.search.genes import Gene, Point
from weightsmith.search.samplers.base import Sampler, Values
from weightsmith.search.space import Space

if TYPE_CHECKING:
    from weightsmith.search.local import Steps
    from weightsmith.search.pool import Options, Walk
    from weightsmith.search.schema import SearchFile

__all__ = ["FrankWolfe", "PoolSpace"]

FOLDER = "iterates"


class PoolSpace(Space):
    """Iterates of a walk: number -> the recipe with its coefficients."""

    drawn = False

    def __init__(self, file: SearchFile, folder: Path) -> None:
        tree = file.recipe.model_dump(mode="json", exclude_defaults=True)
        self.tree = {key: value for key, value in tree.items() if key not in ("parameters", "rules")}
        fields = type(next(iter(file.recipe.models.values()))).model_fields
        refs = self.tree["models"].items()
        self.tree["models"] = {name: {k: v for k, v in ref.items() if k in fields} for name, ref in refs}
        self.plain = {key: value for key, value in self.tree.items() if key != "method"}
        self.tree["method"] = [{"name": "task_arithmetic"}]
        self.trimmed: Options | None = None
        """Options of a walk whose iterates are no sums of the pool."""
        self.folder = folder / FOLDER
        self.first = 0.3
        self.genes = (Gene("iteration", 0, max(file.evaluations, 1), integer=True, start=0),)

    def file(self, number: int) -> Path:
        """Where the coefficients of an iterate lie."""
        return self.folder / f"{number:04d}.safetensors"

    def recipe(self, point: Point) -> Recipe:
        number = int(point["iteration"])
        if self.trimmed is not None:
            from weightsmith.search.local import iterate

            return Recipe.model_validate(iterate(self.plain, number, self.trimmed, self.file))
        weight: Any = {"file": str(self.file(number))} if number else self.first
        return Recipe.model_validate({**self.tree, "parameters": {"lambda": 1.0, "weight": weight}})


class FrankWolfe(Sampler):
    """Step towards the checkpoint that the loss gradient points away from; needs `pool` with data and an objective."""

    name = "frank_wolfe"
    batch = 1
    fronts = False

    @classmethod
    def of(cls, file: SearchFile, space: Space, goals: Sequence[str], folder: Path, settings: Settings) -> FrankWolfe:
        made = cls.__new__(cls)
        made.file, made.settings = file, settings
        made.__init__(space, goals, file.seed, file.sampler.options, folder, file.evaluations)  # type: ignore[misc]
        return made

    file: SearchFile
    settings: Settings
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, space: Any, goals: Sequence[str], seed: int, given: Any, folder: Path, budget: int) -> None:
        from weightsmith.search.pool import Options

        if wrong := self.wrong(given):
            raise RecipeError(*wrong)
        self.chosen = Options(**given)
        super().__init__(space, goals, seed, {}, folder, budget)

    @classmethod
    def wrong(cls, given: Mapping[str, Any]) -> list[str]:
        from weightsmith.search.pool import Options

        known = [field.name for field in dataclasses.fields(Options)]
        found = [f"sampler frank_wolfe: unknown option {name!r}{did_you_mean(str(name), known)}" for name in given
                 if name not in known]  # fmt: skip
        try:
            Options(**{name: value for name, value in given.items() if name in known})
        except RecipeError as error:
            found += [f"sampler {problem.text}" for problem in error.problems]
        return found

    def begin(self) -> None:
        from weightsmith.search.local import LONGEST, Steps
        from weightsmith.search.pool import TRIMMED, Walk
        from weightsmith.tune.job import job
        from weightsmith.tune.schema import TuneFile

        spec = self.file.pool
        if spec is None:
            raise RecipeError("sampler frank_wolfe follows a loss: add pool: {data: {math: math.jsonl}}")
        assert isinstance(self.space, PoolSpace)
        if INITIAL in self.space.plain["models"]:
            raise RecipeError(
                f"sampler frank_wolfe: {INITIAL!r} is what the start is called; give that model another name"
            )
        self.space.first = self.chosen.scaling if self.chosen.start == "all" else 0.0
        asked = {
            **spec.model_dump(exclude_none=True),
            "recipe": self.file.recipe,
            "free": {"weight": "tensor"},
            "objective": spec.objective,
        }
        work = job(TuneFile.model_validate({**asked, "controls": False}), self.settings)
        rest = (None, work.loaded.module, work.data, work.function, work.setting.objective)
        threads = self.settings.threads or cores()
        self.walk: Walk | Steps
        if self.chosen.local in TRIMMED:
            if self.file.evaluations > LONGEST:
                raise RecipeError(
                    f"sampler frank_wolfe: with local: {self.chosen.local} an iterate is a recipe on the one before; "
                    f"take at most {LONGEST} evaluations, not {self.file.evaluations}"
                )
            self.space.trimmed = self.chosen
            self.walk = Steps(
                self.space.plain, self.chosen, self.space.file,
                lambda tree: Walk(tree, *rest, self.chosen, threads, leave=True),
            )  # fmt: skip
        else:
            self.walk = Walk(self.space.tree, *rest, self.chosen, threads)
        files = {task: digest(data.train) for task, data in spec.data.items() if Path(data.train).is_file()}
        self.identity = [files, spec.model_dump(mode="json")]
        self.done, self.ended = 0, False

    def ask(self, count: int) -> list[dict[str, Any]]:
        if self.ended:
            return []
        stride = self.walk.step(self.done)
        number = self.done + 1
        assert isinstance(self.space, PoolSpace)
        path = self.space.file(number)
        with writing(path):
            system.call(path.parent.mkdir, parents=True, exist_ok=True)
        staged = path.with_suffix(".partial")
        write_table(staged, tuple(self.walk.models), {"weight": self.walk.table()})
        with writing(path):
            system.call(staged.replace, path)
        self.ended = stride.gap < self.chosen.tolerance
        counts = Counter(str(name) for name in stride.chosen.values())
        chosen: Any = next(iter(counts)) if len(counts) == 1 else dict(counts.most_common())
        return [{"iteration": number, "chosen": chosen, "gap": stride.gap, "share": _finite(stride.size),
                 "loss before": stride.loss}]  # fmt: skip

    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        self.done += len(points)

    def state(self) -> Any:
        return {"iteration": self.done, "ended": self.ended}

    def restore(self, state: Any) -> None:
        import torch

        from weightsmith.search.pool import Walk

        self.done, self.ended = int(state["iteration"]), bool(state["ended"])
        assert isinstance(self.space, PoolSpace)
        path = self.space.file(self.done)
        if not path.is_file():
            raise OutputError(f"{path} is missing; take the folder's history.jsonl away too to begin anew")
        if not isinstance(self.walk, Walk):
            return  # the recipe says it all
        table = read_table(path)["weight"]
        self.walk.coefficients = torch.stack([table[name].double() for name in self.walk.names])


def _finite(value: float) -> float | None:
    return value if value == value else None
