"""The recipe: a form and its YAML, each of which changes the other, and the plan beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, RecipeError
from weightsmith.plan.plan import Plan
from weightsmith.recipe.reader import Location
from weightsmith.studio import hub
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.drafts import Drafts
from weightsmith.studio.form import form, method_groups, parameters_of, stages_of, with_parameter, with_stages
from weightsmith.studio.recipes import Look, changed, plan, value_of, written
from weightsmith.studio.recipes import look as look_at
from weightsmith.studio.render import address, rendered
from weightsmith.studio.shelf import layers, shelf

__all__ = ["add", "fresh", "model", "out_of", "page", "plan_of", "revert", "rule", "run", "save", "saved",
           "set_value", "stage", "typed", "use"]  # fmt: skip

_MAP: Mapping[str, Any] = {}


def page(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    found = shelf(studio.places)
    there = [*found.recipes, *drafts.unsaved()]
    if not asked("path"):
        return go(address("recipe", path=fresh(studio, there)), asked)
    path = drafts.path(asked("path"))
    text, is_saved = drafts.text(path)
    look = look_at(studio.places, path, text)
    return html(
        "recipe.html", title=asked("path"), page="recipe", name=studio.places.shown(path), look=look, text=text,
        saved=is_saved, out=_default_out(studio, path), recipes=list(map(studio.places.shown, there)),
        **_of_form(studio, look, path, found.models),
    )  # fmt: skip


def fresh(studio: Studio, there: list[Path]) -> str:
    """The name of a recipe that there is not yet."""
    taken = {path.name for path in there if path.parent == studio.places.home}
    names = ("recipe.yaml", *(f"recipe-{i}.yaml" for i in range(2, 10_000)))
    return next(name for name in names if name not in taken and not (studio.places.home / name).exists())


def _default_out(studio: Studio, path: Path) -> str:
    """A folder that is not there yet, called after the recipe."""
    base = path.with_suffix("")
    names = (base.with_name(f"{base.name}-merged{more}") for more in ("", *(f"-{i}" for i in range(2, 10_000))))
    return studio.places.shown(next(name for name in names if not name.exists()))


def _of_form(studio: Studio, look: Look, path: Path, models: Any) -> dict[str, Any]:
    made = form(look.tree) if isinstance(look.tree, Mapping) else None
    models = [*models, *hub.cached(details=False)]
    return {"form": made, "groups": method_groups(), "models": models, "blocks": _blocks(studio, look.tree, path)}


def _blocks(studio: Studio, tree: Any, path: Path) -> int:
    """The number of blocks of the recipe's models, as the first config that tells it; 0 where none does."""
    refs = [tree.get("base"), *_values(tree.get("models"))] if isinstance(tree, Mapping) else []
    for ref in refs:
        named = ref.get("model") if isinstance(ref, Mapping) else ref
        folder = path.parent / named if isinstance(named, str) and "\0" not in named else None
        if folder is not None and studio.places.holds(folder / "config.json") and (found := layers(folder)):
            return found
    return 0


def _values(models: Any) -> list[Any]:
    return list(models.values()) if isinstance(models, Mapping) else []


def plan_of(studio: Studio, asked: Asked) -> Any:
    """The plan beside the form, of what was typed last."""
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    look = look_at(studio.places, path, drafts.text(path)[0])
    if look.recipe is None:
        return html("plan.html", problems=look.problems, plan=None, warnings=())
    out = studio.places.inside(asked("out")) if asked("out") else None
    made = plan(look.recipe, out)
    if not isinstance(made, Plan):
        return html("plan.html", problems=made, plan=None, warnings=())
    shown = None if made.problems and not made.keys else made
    return html("plan.html", problems=made.problems, plan=shown, warnings=tuple(dict.fromkeys(made.warnings)))


# --- changing ------------------------------------------------------------------------------------------


def typed(studio: Studio, asked: Asked) -> Any:
    """The YAML was typed in: keep it, and give the form anew."""
    return _again(studio, asked, asked("yaml"), yaml=False)


def set_value(studio: Studio, asked: Asked) -> Any:
    """One field of the form was changed."""
    key = _key(asked("key"))
    text, tree = asked("yaml"), _tree(studio, asked)
    value = (asked("value") or None) if asked("kind") == "text" else value_of(asked("value"))
    if key[0] == "stage" and len(key) == 3 and isinstance(key[1], int):
        if not 0 <= key[1] < len(stages_of(tree)):
            raise RecipeError("that stage is gone; it was taken out in the YAML")
        key, value = with_parameter(tree, key[1], str(key[2]), value)
    return _again(studio, asked, changed(text, key, value))


def model(studio: Studio, asked: Asked) -> Any:
    """Add, remove or rename a model, or take one as the base."""
    text, tree, path = asked("yaml"), _tree(studio, asked), Drafts(studio.places).path(asked("path"))
    models = tree.get("models")
    refs = models if isinstance(models, Mapping) else _MAP
    match asked("do"):
        case "add-model":
            text = _with_models(text, refs, [_named(studio, asked("model"), path)])
        case "set-base":
            text = changed(text, ("base",), _named(studio, asked("model"), path)[1])
        case "remove-model":
            text = changed(text, ("models", asked("name")), None)
        case "rename-model":
            new = asked("value").strip()
            if not new or (new in refs and new != asked("name")):
                raise RecipeError(f"a model called {new!r} is there already" if new else "a model needs a name")
            renamed = {new if name == asked("name") else name: ref for name, ref in refs.items()}
            text = changed(text, ("models",), renamed)
        case other:
            raise RecipeError(f"unknown action {other!r}")
    return _again(studio, asked, text)


def _named(studio: Studio, text: str, recipe: Path) -> tuple[str, str]:
    """A word for a model that was chosen, and what the recipe writes: its path, or its id in the hub's cache."""
    if hub.holds(text) and not (studio.places.home / text).exists():
        return text.rpartition("/")[2], text
    path = studio.places.inside(text)
    return path.stem if path.is_file() else path.name, written(path, recipe.parent)


def _with_models(text: str, refs: Mapping[Any, Any], chosen: list[tuple[str, str]]) -> str:
    taken = {*map(str, refs), "base", ""}
    for named, ref in chosen:
        word = re.sub(r"[^\w.-]+", "_", named).strip(".") or "model"
        name = next(n for n in (word, *(f"{word}-{i}" for i in range(2, 10_000))) if n not in taken)
        taken.add(name)
        text = changed(text, ("models", name), ref)
    return text


def stage(studio: Studio, asked: Asked) -> Any:
    """Choose another method for a stage, add a stage, remove one."""
    tree = _tree(studio, asked)
    stages = stages_of(tree)
    index = asked.number("index", 0, 1_000_000)
    if stages and index >= len(stages):
        raise RecipeError("that stage is gone; it was taken out in the YAML")
    text = asked("yaml")
    match asked("do"):
        case "set-stage":
            return _again(studio, asked, _with_method(text, tree, index, asked("value")))
        case "add-stage":
            stages = [("dare", {}), *stages] if stages else [("task_arithmetic", {})]
        case "remove-stage":
            stages = [*stages[:index], *stages[index + 1 :]]
        case other:
            raise RecipeError(f"unknown action {other!r}")
    return _again(studio, asked, changed(text, ("method",), with_stages(stages)))


def _with_method(text: str, tree: Mapping[str, Any], index: int, name: str, alone: bool = False) -> str:
    """The text with another method at a stage (`alone`: as the only one), and with those parameters that it has."""
    stages = stages_of(tree)
    kept = _fitting(name, stages[index][1] if stages else {})
    stages = [(name, kept)] if alone else [*stages[:index], (name, kept), *stages[index + 1 :]]
    common = tree.get("parameters")
    for key in common if isinstance(common, Mapping) and len(stages) == 1 else ():
        if not _fitting(name, {key: None}):
            text = changed(text, ("parameters", str(key)), None)
    return changed(text, ("method",), with_stages(stages))


def _fitting(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters that another method has as well."""
    known = {p.name for p in parameters_of(name)}
    return {key: value for key, value in own.items() if key in known}


def rule(studio: Studio, asked: Asked) -> Any:
    """Add a rule, or remove one."""
    rules = _tree(studio, asked).get("rules")
    count = len(rules) if isinstance(rules, list) else 0
    if asked("do") == "add-rule":
        first: Any = {"match": "*norm*", "method": "keep"}
        location, value = (("rules", count), first) if count else (("rules",), [first])
        return _again(studio, asked, changed(asked("yaml"), location, value))
    index = asked.number("index", 0, 10_000)
    if index >= count:
        raise RecipeError("that rule is gone; it was taken out in the YAML")
    return _again(studio, asked, changed(asked("yaml"), ("rules", index), None))


def _key(text: str) -> Location:
    try:
        key = json.loads(text) if len(text) < 10_000 else None
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, list) or not key or not all(type(step) in (str, int) for step in key) or len(key) > 10:
        raise RecipeError("the form names a field that does not exist; reload the page")
    return tuple(key)


def _tree(studio: Studio, asked: Asked) -> Mapping[str, Any]:
    drafts = Drafts(studio.places)
    look = look_at(studio.places, drafts.path(asked("path")), asked("yaml"))
    if not isinstance(look.tree, Mapping):
        raise RecipeError(*look.problems) if look.problems else RecipeError("the recipe is not a mapping")
    return look.tree


def _again(studio: Studio, asked: Asked, text: str, yaml: bool = True) -> Any:
    """The form of a new text, which is kept as a draft; with the text itself where the form has changed it."""
    from fastapi.responses import HTMLResponse

    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    drafts.keep(path, text)
    look = look_at(studio.places, path, text)
    parts = rendered("recipe_form.html", **_of_form(studio, look, path, shelf(studio.places, details=False).models))
    if yaml:
        parts += rendered("recipe_yaml.html", text=text, swap=True)
    state = rendered("recipe_saved.html", saved=drafts.text(path)[1])
    parts += state.replace("<span", '<span hx-swap-oob="true"', 1)
    return HTMLResponse(parts, headers={"HX-Trigger": "planned"})


# --- keeping and running ---------------------------------------------------------------------------------


def save(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    drafts.save(drafts.path(asked("path")), asked("yaml"))
    return html("recipe_saved.html", saved=True)


def revert(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    drafts.forget(drafts.path(asked("path")))
    return go(address("recipe", path=asked("path")), asked)


def add(studio: Studio, asked: Asked) -> Any:
    """Models that were chosen on another page go into a recipe, or make a new one."""
    drafts = Drafts(studio.places)
    name = asked("recipe")
    if not name:
        name = fresh(studio, [*shelf(studio.places, details=False).recipes, *drafts.unsaved()])
    path = drafts.path(name)
    chosen = [_named(studio, one, path) for one in asked.form.get("path", ())]
    text, _ = drafts.text(path)
    tree = look_at(studio.places, path, text).tree
    refs = tree.get("models") if isinstance(tree, Mapping) else None
    drafts.keep(path, _with_models(text, refs if isinstance(refs, Mapping) else _MAP, chosen))
    return go(address("recipe", path=name), asked)


def saved(studio: Studio, name: str) -> Path:
    """The file of a recipe without problems, with what was typed last in it."""
    drafts = Drafts(studio.places)
    path = drafts.path(name)
    text, is_saved = drafts.text(path)
    look = look_at(studio.places, path, text)
    if look.recipe is None:
        raise RecipeError(*look.problems)
    if not is_saved:
        drafts.save(path, text)
    return path


def out_of(studio: Studio, asked: Asked) -> str:
    """The folder to write, as the command names it."""
    if not asked("out").strip():
        raise OutputError("name the folder to write")
    return studio.places.shown(studio.places.inside(asked("out").strip()))


def run(studio: Studio, asked: Asked) -> Any:
    """Save, and queue the merge."""
    out, path = out_of(studio, asked), saved(studio, asked("path"))
    more = ["--overwrite"] if asked("overwrite") else []
    words = ["merge", studio.places.shown(path), out, *more]
    job = studio.jobs.add(words, f"merge into {out}", {"recipe": words[1], "out": out})
    return go(f"/run/{job.id}", asked)


def use(studio: Studio, asked: Asked) -> Any:
    """Take a method that an inspection speaks for."""
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    text, _ = drafts.text(path)
    tree = look_at(studio.places, path, text).tree
    if not isinstance(tree, Mapping):
        raise RecipeError("the recipe cannot be read; mend its YAML first")
    drafts.keep(path, _with_method(text, tree, 0, asked("method"), alone=True))
    return go(address("recipe", path=asked("path")), asked)
