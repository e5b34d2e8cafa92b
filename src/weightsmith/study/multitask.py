"""Scores of the tasks of a `weightsmith train multitask` recipe: of its results, of experts, and of their merges.

All of them read the same rendered inputs.  A model without heads of its own (the base, a merge) gets those of each
task's expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.study.schema import Study

if TYPE_CHECKING:
    from weightsmith.train.multitask.data import Task
    from weightsmith.train.multitask.system import System

__all__ = ["TaskScores"]

_PARTS = {"validation": "valid", "test": "test"}


class TaskScores:
    """`(model, split) -> scores` of a study's tasks; what cannot be scored is said when it is made."""

    def __init__(self, study: Study, file: Path, own: Mapping[str, str], device: str) -> None:
        from weightsmith.train.multitask.data import read_tasks
        from weightsmith.train.multitask.metrics import LOWER
        from weightsmith.train.multitask.recipe import load

        self.study, self.file, self.device = study, file, device
        self.recipe = load(file)
        where = f"{study.file}: evaluate.tasks"
        wrong = []
        for name in study.scored:
            spec = self.recipe.tasks.get(name)
            if spec is None:
                wrong.append(f"{where}: {file} has no task {name!r}{did_you_mean(name, list(self.recipe.tasks))}")
            elif spec.test is None:
                wrong.append(f"{where}: task {name!r} has no test data in {file}; coefficients are never chosen on it")
        if wrong:
            raise RecipeError(*wrong)
        self.tasks: Mapping[str, Task] = read_tasks(self.recipe)
        for name in study.scored:
            if (self.tasks[name].metric in LOWER) == study.higher_is_better:
                better = "lower" if study.higher_is_better else "higher"
                raise RecipeError(
                    f"{where}: {self.tasks[name].metric} of {name!r} is better {better}; say so in the study"
                )
        self.own = {name: Path(place) for name, place in own.items()}
        for name, ref in study.recipe.models.items():
            place = Path(str(getattr(ref, "model", None) or ""))
            if name not in self.own and _told(place):
                self.own[name] = place

    def identity(self, digest: Callable[[Path], str]) -> Any:
        """What the scores depend on besides the model."""
        tasks = [self.recipe.tasks[name] for name in self.study.scored]
        files = [Path(place) for task in tasks for place in (task.data, task.valid, task.test) if place]
        from weightsmith.train.multitask.build import INFO, OWN

        parts = [place / name for place in self.own.values() for name in (INFO, OWN) if (place / name).is_file()]
        return ["tasks", [digest(file) for file in (self.file, *files, *parts)]]

    def __call__(self, model: Path, split: str) -> dict[str, float]:
        found = {}
        for name in self.study.scored:
            system = self._system(model, name)
            task = system.body.prepared({name: self.tasks[name]})[name]
            own = replace(system.tasks[name], parts=task.parts, spec=task.spec)
            found[name] = system.score(own, own.parts[_PARTS[split]], self.recipe.batch)
        return found

    def _system(self, model: Path, name: str) -> System:
        """The model with the parts that answer a task: its own, else those of the task's expert."""
        from weightsmith.train.multitask.build import build, open_body, restore

        if name in _told(model):
            return restore(model, self._read(model), device=self.device)
        if name in self.own:
            return restore(self.own[name], self._read(self.own[name]), at=model, device=self.device)
        body = open_body(self.recipe, self.tasks, at=model, device=self.device)
        return build(self.recipe, body, body.prepared(self.tasks), learn=False).eval()

    def _read(self, folder: Path) -> Mapping[str, Task]:
        """The tasks of a result, whose number and classes decide its shapes."""
        from weightsmith.train.multitask.build import read_info
        from weightsmith.train.multitask.data import read_tasks
        from weightsmith.train.multitask.recipe import MultiTaskRecipe

        return read_tasks(MultiTaskRecipe.model_validate(read_info(folder)["recipe"]))


def _told(place: Path) -> Mapping[str, Any]:
    """The tasks of a result of train multitask; empty for anything else."""
    from weightsmith.train.multitask.build import INFO, read_info

    tasks: Mapping[str, Any] = read_info(place)["recipe"]["tasks"] if (place / INFO).is_file() else {}
    return tasks
