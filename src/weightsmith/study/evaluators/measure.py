"""One task on one model: which evaluator does it, and what its result depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.io import system
from weightsmith.study.evaluators.found import Found
from weightsmith.study.evaluators.specs import EVALUATORS, Spec
from weightsmith.study.evaluators.subject import Setting, Subject

__all__ = ["HARNESSES", "in_memory", "measure", "version"]

HARNESSES = ("lm_eval", "mteb")
"""Evaluators that live in an environment of their own."""


def measure(subject: Subject, kind: str, spec: Any, task: str, environments: Mapping[str, str]) -> Found:
    """Measure one task.

    Raises RecipeError or SourceError for what is wrong with task or evaluator, NumericError for what is with the model.
    """
    if kind in HARNESSES:
        from weightsmith.study.evaluators import processes

        if kind not in environments:
            raise RecipeError(f"{task}: no environment of {kind} is named")
        return getattr(processes, kind)(subject, spec, environments[kind])  # type: ignore[no-any-return]
    if kind == "program":
        from weightsmith.study.evaluators.processes import program

        return program(subject, spec, task)
    return _built_in(kind)(subject, spec)


def _built_in(kind: str) -> Callable[[Subject, Any], Found]:
    from weightsmith.study.evaluators import code_tasks, embeddings, pictures, svg_tasks, text_tasks

    modules = (text_tasks, code_tasks, embeddings, pictures, svg_tasks)
    return next(getattr(module, kind) for module in modules if kind in module.__all__)  # type: ignore[no-any-return]


def in_memory(kind: str) -> bool:
    """Whether the evaluator takes a model that lies in no folder."""
    return bool(EVALUATORS[kind].KIND)


def version(kind: str, spec: Spec, setting: Setting, environments: Mapping[str, str]) -> list[Any]:
    """All that a score depends on besides the model: the task's text and files, the setting, the evaluator's code."""
    told = spec.model_dump(mode="json", exclude={"file", "corpus", "train", "include", "seconds"})
    files = [[path.name, _digest(path)] for path in spec.files()]
    return [kind, told, files, setting.identity(), environments.get(kind), _code(), _libraries(environments.get(kind))]


def _digest(path: Path) -> str:
    """Of a file, or of all files in a folder."""
    found = hashlib.sha256()
    try:
        inside = system.call(list, path.rglob("*")) if path.is_dir() else [path]
        for file in sorted(p for p in inside if p.is_file()):
            found.update(str(file.relative_to(path)).encode())
            for block in system.read_blocks(file):
                found.update(block)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found.hexdigest()[:32]


_LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval", "mteb", "sentence_transformers", "datasets")


@cache
def _libraries(python: str | None) -> list[str]:
    """The versions that decide a score: of this environment, or of the one that a python lies in."""
    if python is None:
        held = [one for name in _LIBRARIES[:3] for one in metadata.distributions(name=name)]
        return [f"{one.metadata['Name']}-{one.version}" for one in held]
    folder = Path(python).parent.parent
    inside = "lib*/python*/site-packages/{}-*.dist-info"
    found = [path for name in _LIBRARIES for path in system.call(list, folder.glob(inside.format(name)))]
    return sorted(path.name.removesuffix(".dist-info") for path in found)


@cache
def _code() -> str:
    """Of the code that decides a score."""
    root = Path(__file__).parent.parent.parent
    found = hashlib.sha256()
    for part in ("study/evaluators", "study/svg", "observe"):
        for path in sorted(system.call(list, (root / part).rglob("*.py"))):
            found.update(system.read_file(path))
    return found.hexdigest()[:16]
