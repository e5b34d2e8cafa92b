"""`lock` and `unlock`: write a model in another basis, that computes the same, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.align.bases import Bases, bases
from weightsmith.align.invariance import known
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.protect.key import PARTS, Key, new_secret, read_key, tidy_key, write_key
from weightsmith.protect.locking import change_of, changed, equal_gains, refuse, sample, shapes_of
from weightsmith.protect.package import Locked, Work, written
from weightsmith.protect.refusals import (
    refuse_locked,
    refuse_memory,
    refuse_obstacles,
    refuse_other_lock,
    refuse_other_model,
    refuse_place,
    refuse_words,
)

__all__ = ["key_for", "lock", "unlock"]


def lock(
    model: str | Path | Source,
    out: str | Path,
    key: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    condition: float = 4.0,
    modules: Sequence[str] = ("*",),
    seed: int | None = None,
    compare: bool = True,
    settings: Settings = DEFAULT,
    **options: Any,
) -> Locked:
    """Write a model in a random basis of its attentions and MLPs into the folder `out`; it computes the same.

    key        the file to write the key to, mode 600; one that is there already, of this model, is used again
    parts      see `key.PARTS`;  condition: largest condition number of a matrix, from 1 on
    modules    globs of attentions and MLPs ('model.layers.0.*')
    seed       draw the key from a number: whoever knows it has the key
    compare    run the model before and after, and keep nothing if its outputs moved (`align.agree.TOLERANCES`)
    Raises PlanError or SourceError before anything is written, NotKept with nothing left of it.
    """
    settings = settings.but(**options)
    source, out, path = _opened(model), Path(out), Path(key)
    refuse_words(parts, condition, seed)
    refuse_place(path, out, source)
    refuse_locked(source)
    refuse_obstacles(source, out, settings, [path] if path.exists() else [])
    source.prepare()
    found, new = bases(source), not path.exists()
    own = key_for(source, found, parts, condition, modules, new_secret(seed)) if new else read_key(path)
    if not new:
        tidy_key(path)
        refuse_other_lock(path, own, source, found, parts, condition, modules, seed)
    change = change_of(own, found)
    view, names = changed(source, own, change), change.names
    refuse_memory(source, compare, settings)
    own = replace(own, unlocked=sample(source, names), locked=sample(view, names))
    if new:
        write_key(path, own)
    made = written(Work("lock", source, view, own, found, change.names, compare), out, settings)
    return replace(made, new_key=new)


def unlock(
    model: str | Path | Source,
    out: str | Path,
    key: str | Path,
    *,
    compare: bool = True,
    settings: Settings = DEFAULT,
    **options: Any,
) -> Locked:
    """Write a locked model as it was, up to the rounding of its dtype.

    Raises SourceError for a wrong or damaged key, or a model that it did not lock, before anything is written.
    """
    settings = settings.but(**options)
    source, out, path = _opened(model), Path(out), Path(key)
    own = read_key(path)
    refuse_place(path, out, source)
    refuse_obstacles(source, out, settings, [path])
    source.prepare()
    found = bases(source)
    warnings = refuse_other_model(path, own, source, found)
    change = change_of(own, found, "unlock")
    view = changed(source, own, change)
    refuse_memory(source, compare, settings)
    made = written(Work("unlock", source, view, own, found, change.names, compare), out, settings)
    return replace(made, result=replace(made.result, warnings=(*made.result.warnings, *warnings)))


def key_for(
    source: Source, found: Bases, parts: Sequence[str], condition: float, modules: Sequence[str], secret: str
) -> Key:
    """A key for a model, with what was proved of it; PlanError for layouts that are not known."""
    proved = known(source)
    refuse(source, found, proved, parts, modules)
    chosen = tuple(part for part in PARTS if part in parts)
    equal = equal_gains(source, found, proved) if "qk" in parts else {}
    return Key(secret, chosen, float(condition), tuple(modules), proved, equal, shapes_of(source))


def _opened(model: str | Path | Source) -> Source:
    return model if isinstance(model, Source) else open_source(model)
