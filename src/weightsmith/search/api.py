"""`weightsmith.search`: find values of a recipe by scoring candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.read.open import open_source
from weightsmith.search.pages import write
from weightsmith.search.result import Found, found
from weightsmith.search.run import Search, begin_anew, prepared
from weightsmith.search.schema import SearchFile, load
from weightsmith.search.score import Scorer

__all__ = ["carry_out", "load", "prepared", "search"]


def search(
    file: SearchFile | Mapping[str, Any] | str | Path,
    out: str | Path,
    score: Callable[[Any, str], Any] | None = None,
    *,
    models: Mapping[str, Any] | None = None,
    base: Any = None,
    in_memory: bool = True,
    settings: Settings = DEFAULT,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Found:
    """Search a recipe's values; see docs/howto/search.md for the file.

    file       a search, its tree, or its path
    out        folder for the history, recipes and pages; the same call goes on where an interrupted one stopped
    score      in place of the file's evaluator: (tensors by name, or with in_memory=False a folder; 'search' or
               'report') -> a number, or score -> number, or score -> number of every item
    models     name -> model in place of the paths, as `merge` takes them; base: likewise
    options    change single settings; `progress` takes (done, total) candidates

    Raises RecipeError or PlanError before anything is scored.
    """
    settings = settings.but(**options)
    if isinstance(file, (str, Path)):
        file = load(file)
    elif not isinstance(file, SearchFile):
        file = SearchFile.model_validate(file)
    inputs = None
    if models is not None or base is not None:
        origin = None if base is None else open_source(base)
        inputs = {name: open_source(model, base=origin) for name, model in (models or {}).items()}
        inputs |= {} if origin is None else {"base": origin}
    scorer = None
    if score is not None:
        function = score
        scorer = Scorer(
            list(file.aims),
            lambda model, split, items, messages: function(model, split),
            ["function", getattr(function, "__qualname__", "")],
            "score",
            in_memory,
            halves=False,
        )
    return carry_out(prepared(file, Path(out), settings, score=scorer, inputs=inputs), settings, say)


def carry_out(work: Search, settings: Settings = DEFAULT, say: Callable[[str], None] = lambda text: None) -> Found:
    """Run a search that fits to its end, and write its folder."""
    total, done = work.sampler.most, 0

    def step() -> None:
        nonlocal done
        done += 1
        if settings.progress is not None:
            settings.progress(min(done, total), total)

    work.evaluations.step = step
    with work.alone():
        if settings.overwrite:
            begin_anew(work.out)
        work.run(say)
        made = found(work, say)
        write(made)
    return made
