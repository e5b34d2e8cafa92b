"""`weightsmith.tune`: learn numbers of a recipe, and give the recipe that has them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import OutputError, RecipeError, SourceError, did_you_mean
from weightsmith.core.settings import DEFAULT, Settings, cores
from weightsmith.io import system
from weightsmith.io.disk import replace_file
from weightsmith.io.package.card import yaml_text
from weightsmith.io.read.open import open_source
from weightsmith.io.read.small import short
from weightsmith.recipe.load import load
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.table import digest, read_table, write_table
from weightsmith.tune.adapters import ADAPTER, write_adapter
from weightsmith.tune.arguments import refuse_others
from weightsmith.tune.controls import Control, compare
from weightsmith.tune.descent import Descent
from weightsmith.tune.journal import Journal, write_curve
from weightsmith.tune.objective import Objective, labels_of
from weightsmith.tune.objectives.imitate import Imitate
from weightsmith.tune.objectives.pseudo import Pseudo
from weightsmith.tune.registry import make
from weightsmith.tune.resident import Resident
from weightsmith.tune.setting import Found, Preset, Setting
from weightsmith.tune.space import Free, Numbers
from weightsmith.tune.teachers import refuse_other_tokens, taught
from weightsmith.tune.tuner import Data, Function, Tuner
from weightsmith.tune.views import viewed
from weightsmith.tune.work import Work, as_one, prepared

__all__ = ["Tuned", "tune"]

FILE, FIRST = "coefficients.safetensors", "first"


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was learned.

    recipe        as a tree, with the learned values; its coefficients lie in `out` where they are many
    coefficients  parameter -> tensor -> [n] or [n, c] values, models in the recipe's order ([1]: all alike)
    curve         a row per step: step, loss, validation (where it was looked at), the loss of each task; loss and
                  validation are means over the tasks
    best          the loss on the validation data, and the step whose numbers these are; None without such data
    stopped       why it ended before the last step, or ''
    controls      the loss on validation data of this, the untuned recipe, task arithmetic and tuned random changes
    told          whether OUT/adapter.yaml was written, of adapters; else ''
    classes       task -> predicted class -> count over the last steps, for objectives that may collapse
    judged        what validation measures
    """

    recipe: Mapping[str, Any]
    coefficients: Mapping[str, Mapping[str, Tensor]]
    curve: Sequence[Mapping[str, float]]
    best: tuple[float, int] | None = None
    stopped: str = ""
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    controls: Sequence[Control] = ()
    out: Path | None = None
    told: str = ""
    judged: str = "loss"


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    space: str | Preset | Setting | Mapping[str, Free] = "adamerging",
    objective: str | Objective | None = None,
    data: Mapping[str, Sequence[Any]] | None = None,
    *,
    module: nn.Module,
    function: Function | Mapping[str, Function] | None = None,
    validation: Mapping[str, Sequence[Any]] | None = None,
    descent: Descent | None = None,
    models: Mapping[str, Any] | None = None,
    base: Any = None,
    out: str | Path | None = None,
    settings: Settings = DEFAULT,
    every: int = 10,
    controls: bool = True,
    gather: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    **options: Any,
) -> Tuned:
    """Learn numbers of a recipe from data, with a module that holds the merged weights.

    recipe      a recipe, its tree, or its path; with `models` and `base` in memory it may be left out
    space       a preset by name (with its `options`) or as a value, or parameter -> `Free`
    objective   what is minimised, by name or as a value; of a space alone it is needed
    data        task -> batches, a sequence: step s takes batch s, again from the first behind the last
    module      the base model; its weights are overwritten, and hold the result at the end
    function    (module, batch) -> outputs, one or one for each task; default: the module on the batch's inputs
    validation  task -> batches that are not learned from: the numbers with the least loss on them are taken
    models      name -> model (state dict, module, path, source), for a recipe without paths; `base` likewise
    out         a folder for recipe.yaml, coefficients.safetensors, curve.csv and the journal
    settings    threads; resume: go on where a run into `out` was interrupted, to the same result, bit for bit
    every       steps between two looks at the validation data

    gather      see `tune.setting.Setting`: faster where a step has several batches, for more memory
    controls    measure beside the result what it should be better than, see `tune.controls`

    Memory: one module, its largest gradient, the activations, and a few blocks of the inputs.

    Raises RecipeError, PlanError or SourceError for what does not fit, NumericError for a loss that is not finite.
    """
    refuse_others(locals())
    settings, options = settings.taken_from(options)
    if settings.ray is not None:
        raise RecipeError("tune runs on this machine: the model is in its memory; leave --ray out")
    tree, given = _recipe(recipe, models, base)
    names = tuple(tree["models"])
    setting = _setting(space, objective, descent, names, options)
    setting = replace(setting, gather=gather or setting.gather)
    if setting.first:
        tree, given = as_one(tree, given, setting.first)
    batches = _checked(data, validation or {}, setting.objective)
    held = Data(batches, dict(validation or {}), _functions(function, batches))
    folder = None if out is None else Path(out)
    if folder is not None:
        _prepare(folder, settings)
    asked = _Asked(tree, given, module, held, settings, every, progress, folder)
    if setting.then is not None:
        first = replace(setting, then=None)
        setting = setting.then(first, _before(asked, first))
    made = _learned(asked, setting, prepared(tree, given, setting, module), folder, controls)
    if folder is not None:
        Journal(folder, "").done()
    return made


@dataclass(frozen=True, eq=False)
class _Asked:
    """What all parts of a tuning share; home: the folder of the results."""

    tree: Mapping[str, Any]
    given: dict[str, Any] | None
    module: nn.Module
    data: Data
    settings: Settings
    every: int
    progress: Callable[[int, int, float], None] | None
    home: Path | None


def _before(asked: _Asked, setting: Setting) -> Found:
    """The tuning that comes first, into OUT/first; taken from there where a run that is resumed had got through it."""
    work = prepared(dict(asked.tree), asked.given, setting, asked.module)
    keys = list({key.name: key for one in work.numbers for key in one.keys}.values())
    folder = None if asked.home is None else asked.home / FIRST
    identity = _identity(asked, setting, work)
    if folder is not None and asked.settings.resume and _noted(folder) == identity:
        return Found(read_table(folder / FILE), work.inputs, keys)
    if folder is not None:
        system.call(folder.mkdir, exist_ok=True)
    made = _learned(asked, setting, work, folder, controls=False)
    if folder is not None:
        replace_file(folder / "identity", identity.encode())  # last: all is there
        Journal(folder, "").done()
    return Found(made.coefficients, work.inputs, keys)


def _noted(folder: Path) -> str:
    path = folder / "identity"
    return system.read_file(path).decode() if path.is_file() else ""


def _learned(asked: _Asked, setting: Setting, work: Work, folder: Path | None, controls: bool) -> Tuned:
    """One tuning, and its files."""
    numbers, threads = work.numbers, asked.settings.threads or cores()
    resident = Resident(asked.module, work.places, work.plan, work.inputs, threads)
    journal, held = Journal(folder, _identity(asked, setting, work)), asked.data
    if isinstance(setting.objective, Imitate):
        held = _taught(held, setting.objective, resident, asked.home, keep=asked.settings.resume)
    if isinstance(setting.objective, Pseudo):
        held = _seen_twice(held, setting.objective, resident)
    tuner = Tuner(setting, numbers, resident, held, journal)
    tuner.run(every=asked.every, progress=asked.progress)
    learned = {one.name: one.learned() for one in numbers}
    known = (
        compare(tuner, work, asked.given, threads, asked.every) if controls and any(held.validation.values()) else ()
    )
    many = {one.name: learned[one.name] for one in numbers if one.free.per != "model" or folder != asked.home}
    made = Tuned(
        recipe=_with_values(work.tree, numbers, {*many, *setting.given}, folder),
        coefficients={**setting.given, **learned},
        curve=tuner.state.curve,
        best=tuner.state.best,
        stopped=tuner.stopped,
        classes=tuner.histogram(),
        controls=known,
        out=folder,
        judged=setting.objective.judged,
    )
    if folder is not None and folder == asked.home:
        made = replace(made, told=write_adapter(work.tree, made.coefficients, work.inputs, folder))
    if folder is not None:
        _write(made, {**setting.given, **many}, tuple(work.inputs.experts), folder)
    return made


def _prepare(folder: Path, settings: Settings) -> None:
    """The folder, there and without an earlier run's journal; OutputError if it holds other things."""
    if folder.is_dir() and any(system.call(list, folder.iterdir())) and not (settings.resume or settings.overwrite):
        raise OutputError(f"{folder} is not empty; choose another folder, or use --overwrite (--resume to go on)")
    try:
        system.call(folder.mkdir, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from None
    if not settings.resume:
        for name in ("recipe.yaml", FILE, "curve.csv", "report.html", *ADAPTER):  # none may pass for this run's
            system.call((folder / name).unlink, missing_ok=True)
        system.call(shutil.rmtree, folder / FIRST, ignore_errors=True)
        Journal(folder, "").done()


# --- what is asked -------------------------------------------------------------------------------


def _recipe(recipe: Any, models: Mapping[str, Any] | None, base: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The recipe's tree, and sources that are at hand."""
    if isinstance(recipe, (str, Path)):
        recipe = load(recipe)
    given = None
    if models is not None:
        origin = None if base is None else open_source(base)
        given = {name: open_source(model, base=origin) for name, model in models.items()}
        tree = {"models": {name: name for name in models}, "method": "task_arithmetic"}
        if origin is not None:
            given, tree = {"base": origin, **given}, {"base": "base", **tree}
        if isinstance(recipe, Mapping):
            tree |= recipe
        return tree, given
    if recipe is None:
        raise RecipeError("tune needs a recipe, or models and a base")
    if isinstance(recipe, Recipe):
        return recipe.model_dump(mode="json", exclude_defaults=True), None
    return dict(recipe), None


def _setting(space: Any, objective: Any, descent: Any, names: tuple[str, ...], options: Mapping[str, Any]) -> Setting:
    if isinstance(objective, str):
        objective = make(Objective, "objective", objective, {})  # type: ignore[type-abstract]
    if objective is not None and not isinstance(objective, Objective):
        raise RecipeError(f"objective should be a name or an Objective, as Entropy(), is {short(objective)}")
    if isinstance(space, str):
        space = make(Preset, "preset", space, options)  # type: ignore[type-abstract]
    elif options:
        raise RecipeError(f"unknown option {next(iter(options))!r}; options are those of a preset by name")
    if isinstance(space, Preset):
        space = space.setting(names)
    if not isinstance(space, Setting):
        if objective is None:
            raise RecipeError("tune needs an objective beside a space; for example objective=Entropy()")
        space = Setting(dict(space), objective)
    made: Setting = space
    changes: dict[str, Any] = {"objective": objective, "descent": descent}
    return replace(made, **{name: value for name, value in changes.items() if value is not None})


def _checked(data: Any, validation: Mapping[str, Any], objective: Objective) -> dict[str, Sequence[Any]]:
    if not data:
        raise SourceError("tune needs data: task -> batches")
    target = getattr(objective, "target", "")
    if target and target not in data:
        raise SourceError(f"{objective.name}: target {target!r} is not among the tasks{did_you_mean(target, data)}")
    for what, batches in (("data", data), ("validation", validation)):
        for task, found in batches.items():
            if not len(found):
                raise SourceError(f"{what} of {task}: no batch in it")
            if objective.labelled:
                labels_of(found[0])
            if task not in data:
                raise SourceError(f"validation of {task}, which is not among the tasks{did_you_mean(task, data)}")
            if what == "validation" and found is data[task]:
                raise SourceError(f"validation of {task} is the data that is learned from; give other batches")
    return dict(data)


def _functions(function: Any, data: Mapping[str, Any]) -> dict[str, Function]:
    if isinstance(function, Mapping):
        if missing := [task for task in data if task not in function]:
            raise SourceError(f"no function for the tasks {', '.join(missing)}")
        return {task: function[task] for task in data}
    return dict.fromkeys(data, function or _outputs)


def _outputs(module: nn.Module, batch: Any) -> Any:
    """The module on a batch: its `inputs`, the first of a pair, keyword arguments, or the batch itself."""
    if isinstance(batch, Mapping):
        return module(**{name: value for name, value in batch.items() if name != "labels"})
    inputs = batch[0] if isinstance(batch, (tuple, list)) else getattr(batch, "inputs", batch)
    return module(inputs)


def _seen_twice(data: Data, objective: Pseudo, resident: Resident) -> Data:
    """The images beside views of them, and the base's answers where they are trusted."""
    base, given = resident.inputs.base, {"trusted": objective.trusted, "seed": objective.seed}
    with torch.no_grad():
        for name, place in resident.places.items():
            if base is not None:
                place.copy_(base.read(name))
    train = {t: viewed(b, resident.module, data.function[t], **given) for t, b in data.train.items()}
    validation = {t: viewed(b, resident.module, data.function[t], **given, times=1) if len(b) else b
                  for t, b in data.validation.items()}  # fmt: skip
    resident.begin()
    return Data(train, validation, data.function)


def _taught(data: Data, objective: Imitate, resident: Resident, folder: Path | None, keep: bool) -> Data:
    """The same batches with the experts' answers; the module then holds the merged weights again.

    Answers are kept under a hash of what they depend on; of models in memory, which have none, for this run only.
    """
    inputs = resident.inputs
    refuse_other_tokens(inputs.base, inputs.experts, data.train)
    given: dict[str, Any] = {"top": objective.top, "layers": objective.layers}
    seen = hashlib.sha256(json.dumps([inputs.fingerprints(), str(given)], default=str).encode())
    for batches in (*data.train.values(), *data.validation.values()):
        _add(seen, batches)
    room = None if folder is None else folder / "teachers" / seen.hexdigest()[:16]
    if room is not None and not keep and not all(model.fingerprint() for model in inputs.experts.values()):
        system.call(shutil.rmtree, room, ignore_errors=True)
    train, validation = (
        taught(batches, inputs.experts, resident.module, resident.places, data.function, where, **given)
        for batches, where in ((data.train, room), (data.validation, None if room is None else room / "validation"))
    )
    resident.begin()

    def over(function: Function) -> Function:
        return lambda module, lesson: function(module, lesson.batch)

    return Data(train, validation, {task: over(function) for task, function in data.function.items()})


# --- results -------------------------------------------------------------------------------------


def _with_values(
    tree: Mapping[str, Any], numbers: Sequence[Numbers], many: Collection[str], folder: Path | None
) -> dict[str, Any]:
    """The recipe with what was learned: plainly where there is one number per model, else through the file."""
    values: dict[str, Any] = {name: {"file": FILE if folder is not None else f"(in memory) {FILE}"} for name in many}
    for one in numbers:
        if one.name not in many:
            row = next(iter(one.learned().values())).tolist()
            values[one.name] = row[0] if one.models == ("",) else dict(zip(one.models, row, strict=True))
    made = {**tree, "parameters": {**tree.get("parameters", {}), **values}}
    return {key: value for key, value in made.items() if value not in ({}, [], ())}


def _write(made: Tuned, many: Mapping[str, Mapping[str, Tensor]], names: tuple[str, ...], folder: Path) -> None:
    if many:
        write_table(folder / FILE, names, many)
    write_curve(folder / "curve.csv", made.curve)
    values = {name: value | {"sha256": digest(folder / FILE)} if name in many else value
              for name, value in made.recipe["parameters"].items()}  # fmt: skip
    text = yaml_text({**made.recipe, "parameters": values})
    replace_file(folder / "recipe.yaml", text.encode())  # last: all is there


def _identity(asked: _Asked, setting: Setting, work: Work) -> str:
    """Hash of what the numbers depend on."""
    seen = hashlib.sha256()
    told = {name: fields for name, fields in vars(setting).items() if name not in ("objective", "given")}
    seen.update(repr((sorted(told.items()), setting.objective, asked.every)).encode())
    _add(seen, [values for table in setting.given.values() for values in table.values()])
    inputs = replace(work.inputs, full=asked.settings.fingerprint == "full")
    seen.update(json.dumps([work.tree, inputs.fingerprints()], default=str).encode())
    for task, batches in asked.data.train.items():
        seen.update(task.encode())
        _add(seen, batches)
    return seen.hexdigest()


def _add(seen: Any, batches: Sequence[Any]) -> None:
    """Add batches to a hash."""
    seen.update(str(len(batches)).encode())
    for tensor in _tensors(list(batches)):
        seen.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for one in value.values() for t in _tensors(one)]
    if isinstance(value, (list, tuple)):
        return [t for one in value for t in _tensors(one)]
    return [t for one in vars(value).values() for t in _tensors(one)] if hasattr(value, "__dict__") else []
