"""The recipe: a form and its YAML, each of which changes the other, and the plan beside them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, RecipeError
from weightsmith.core.problem import Code, Problem
from weightsmith.plan.plan import Plan
from weightsmith.recipe.reader import Location
from weightsmith.recipe.text import dumps
from weightsmith.studio import hub
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.drafts import Claim, ClashError, Drafts, State, alike
from weightsmith.studio.form import form, method_groups, parameters_of, stages_of, with_parameter, with_stages
from weightsmith.studio.known import mistyped, nearer
from weightsmith.studio.recipes import Look, changed, plan, renamed, value_of, written
from weightsmith.studio.recipes import look as look_at
from weightsmith.studio.render import address, rendered
from weightsmith.studio.shelf import layers, shelf

__all__ = ["about", "add", "clash", "clashing", "default_out", "fresh", "model", "native", "out_of", "page",
           "plan_of", "revert", "rule", "run", "save", "saved", "set_value", "stage", "typed", "use"]  # fmt: skip

_MAP: Mapping[str, Any] = {}


def page(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    if not asked("path"):
        there = [*shelf(studio.places, details=False).recipes, *drafts.unsaved()]
        return go(address("recipe", path=fresh(studio, there)), asked)
    path = drafts.path(asked("path"))
    now = drafts.state(path)
    return html("recipe.html", **_page(studio, path, now, Claim(now.ground, now.seen, secrets.token_hex(4)), now.text))


def _page(studio: Studio, path: Path, now: State, claim: Claim, text: str) -> dict[str, Any]:
    """What the page of a recipe shows: `text`, which a tab claims to go back to the recipe as it is now."""
    found, name = shelf(studio.places), studio.places.shown(path)
    look = look_at(studio.places, path, text)
    return {
        "title": name, "page": "recipe", "name": name, "look": look, "text": text, "saved": now.saved, "claim": claim,
        "clash": _clash(studio, path, now, claim, text), "out": default_out(studio, path),
        "recipes": list(map(studio.places.shown, [*found.recipes, *Drafts(studio.places).unsaved()])),
        **_of_form(studio, look, path, found.models),
    }  # fmt: skip


def fresh(studio: Studio, there: list[Path]) -> str:
    """The name of a recipe that there is not yet."""
    taken = {path.name for path in there if path.parent == studio.places.home}
    names = ("recipe.yaml", *(f"recipe-{i}.yaml" for i in range(2, 10_000)))
    return next(name for name in names if name not in taken and not (studio.places.home / name).exists())


def default_out(studio: Studio, path: Path, what: str = "merged") -> str:
    """A folder that is not there yet, called after the recipe."""
    base = path.with_suffix("")
    names = (base.with_name(f"{base.name}-{what}{more}") for more in ("", *(f"-{i}" for i in range(2, 10_000))))
    return studio.places.shown(next(name for name in names if not name.exists()))


def _of_form(studio: Studio, look: Look, path: Path, models: Any) -> dict[str, Any]:
    made = form(look.tree) if isinstance(look.tree, Mapping) and not look.foreign else None
    models = [*models, *hub.cached(details=False)]
    return {
        "form": made, "foreign": look.foreign, "groups": method_groups(), "models": models,
        "blocks": _blocks(studio, look.tree, path),
    }  # fmt: skip


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
    now = drafts.state(path)
    if asked("tab") and (clash := _clash(studio, path, now, _claim(asked), None)) and clash.typed:
        return html("plan.html", problems=[Problem(Code.OTHER, "", str(clash))], plan=None, warnings=())
    look = look_at(studio.places, path, now.text)
    if look.recipe is None:
        return html("plan.html", problems=look.problems, plan=None, warnings=())
    out = studio.places.inside(asked("out")) if asked("out") else None
    made = plan(look.recipe, out, bool(asked("overwrite")))
    problems = nearer(
        mistyped(studio.places, look.tree, path.parent), made.problems if isinstance(made, Plan) else made
    )
    if not isinstance(made, Plan):
        return html("plan.html", problems=problems, plan=None, warnings=())
    shown = None if made.problems and not made.keys else made
    return html("plan.html", problems=problems, plan=shown, warnings=tuple(dict.fromkeys(made.warnings)))


# --- changing ------------------------------------------------------------------------------------------


def typed(studio: Studio, asked: Asked) -> Any:
    """The YAML was typed in: keep it, and give the form anew."""
    return _again(studio, asked, _yaml(asked), yaml=False)


def set_value(studio: Studio, asked: Asked) -> Any:
    """One field of the form was changed."""
    key = _key(asked("key"))
    text, tree = _yaml(asked), _tree(studio, asked)
    value = (asked("value") or None) if asked("kind") == "text" else value_of(asked("value"))
    if key[0] == "stage" and len(key) == 3 and isinstance(key[1], int):
        if not 0 <= key[1] < len(stages_of(tree)):
            raise RecipeError("that stage is gone; it was taken out in the YAML")
        key, value = with_parameter(tree, key[1], str(key[2]), value)
    return _again(studio, asked, changed(text, key, value))


def model(studio: Studio, asked: Asked) -> Any:
    """Add, remove or rename a model, or take one as the base."""
    text, tree, path = _yaml(asked), _tree(studio, asked), Drafts(studio.places).path(asked("path"))
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
            text = renamed(text, ("models",), asked("name"), new) if new != asked("name") else text
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
    text = _yaml(asked)
    match asked("do"):
        case "set-stage":
            return _again(studio, asked, _with_method(text, tree, index, asked("value")))
        case "add-stage":
            text, stages = _inside(text, tree, stages, "dare")
            stages = [("dare", {}), *stages] if stages else [("task_arithmetic", {})]
        case "remove-stage":
            stages = [*stages[:index], *stages[index + 1 :]]
        case other:
            raise RecipeError(f"unknown action {other!r}")
    return _again(studio, asked, changed(text, ("method",), with_stages(stages)))


def _inside(
    text: str, tree: Mapping[str, Any], stages: list[tuple[str, dict[str, Any]]], name: str
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Common parameters that a further stage has too go into the stage that they were meant for."""
    given = tree.get("parameters")
    common = given if isinstance(given, Mapping) else _MAP
    for key in _fitting(name, common):
        meant = [i for i, (other, _) in enumerate(stages) if _fitting(other, {key: None})]
        for i in meant:
            stages[i] = (stages[i][0], {key: common[key], **stages[i][1]})
        text = changed(text, ("parameters", key), None) if meant else text
    return text, stages


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
        return _again(studio, asked, changed(_yaml(asked), location, value))
    index = asked.number("index", 0, 10_000)
    if index >= count:
        raise RecipeError("that rule is gone; it was taken out in the YAML")
    return _again(studio, asked, changed(_yaml(asked), ("rules", index), None))


def native(studio: Studio, asked: Asked) -> Any:
    """Write a config of mergekit as the recipe that does the same."""
    look = look_at(studio.places, Drafts(studio.places).path(asked("path")), _yaml(asked))
    if look.recipe is None:
        raise RecipeError(*look.problems)
    return _again(studio, asked, dumps(look.recipe))


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
    return _own(look_at(studio.places, drafts.path(asked("path")), _yaml(asked)))


def _own(look: Look) -> Mapping[str, Any]:
    """The values of a recipe that can be changed by parts; RecipeError for others."""
    if look.foreign:
        raise RecipeError("this is a config of mergekit; its page has a button that writes it as a recipe")
    if not isinstance(look.tree, Mapping):
        raise RecipeError(*look.problems) if look.problems else RecipeError("the recipe is not a mapping")
    return look.tree


def _yaml(asked: Asked) -> str:
    """The text of the page; forms end its lines as mails do."""
    return alike(asked("yaml"))


def _again(studio: Studio, asked: Asked, text: str, yaml: bool = True) -> Any:
    """The form of a new text, which is kept as a draft; with the text itself where the form has changed it."""
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    now = drafts.keep(path, text, _claim(asked))
    look = look_at(studio.places, path, text)
    parts = rendered("recipe_form.html", **_of_form(studio, look, path, shelf(studio.places, details=False).models))
    if yaml:
        parts += rendered("recipe_yaml.html", text=text, swap=True)
    parts += rendered("recipe_saved.html", saved=now.saved, swap=True)
    return _told(studio, asked, path, now, parts)


def _told(studio: Studio, asked: Asked, path: Path, now: State, parts: str) -> Any:
    """Parts of the page, with what it goes back to from now on."""
    from fastapi.responses import HTMLResponse

    claim = Claim(now.ground, now.seen, asked("tab"))
    clash = _clash(studio, path, now, claim, now.text)
    parts += rendered("recipe_grounds.html", claim=claim, swap=True)
    parts += rendered("recipe_clash.html", clash=clash, claim=claim, name=asked("path"), swap=True)
    return HTMLResponse(parts, headers={"HX-Trigger-After-Swap": "planned"})


# --- what something else has changed ---------------------------------------------------------------------


def _claim(asked: Asked) -> Claim:
    return Claim(asked("ground"), asked("seen"), asked("tab"))


def _clash(studio: Studio, path: Path, now: State, claim: Claim, text: str | None) -> ClashError | None:
    try:
        Drafts(studio.places).check(path, now, claim, text)
    except ClashError as found:
        return found
    return None


def clash(studio: Studio, asked: Asked) -> Any:
    """Whether something else has changed what a tab shows: asked now and then; no content where it was told."""
    from fastapi.responses import Response

    drafts = Drafts(studio.places)
    path, claim = drafts.path(asked("path")), _claim(asked)
    found = _clash(studio, path, drafts.state(path), claim, None)
    if asked("told") == (found.mark if found else ""):
        return Response(status_code=204)
    return html("recipe_clash.html", clash=found, claim=claim, name=asked("path"))


def clashing(studio: Studio, asked: Asked, found: ClashError) -> Any:
    """The answer to what would have lost a change: the page keeps what it shows, and offers both ways."""
    from fastapi.responses import HTMLResponse

    path, claim = Drafts(studio.places).path(asked("path")), _claim(asked)
    mine = found.now.text if found.text is None else found.text
    if not asked.partial:
        claim = claim if claim.tab else Claim(found.now.ground, found.now.seen, secrets.token_hex(4))
        values = {**_page(studio, path, found.now, claim, mine), "saved": False, "clash": found}
        return HTMLResponse(rendered("recipe.html", **values), 409)
    parts = rendered("recipe_clash.html", clash=found, claim=claim, name=asked("path"))
    if mine != _yaml(asked) and "yaml" in asked.form:
        parts += rendered("recipe_yaml.html", text=mine, swap=True)
    return HTMLResponse(parts, 409)


# --- keeping and running ---------------------------------------------------------------------------------


def save(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    now = drafts.save(path, _yaml(asked), _claim(asked))
    return _told(studio, asked, path, now, rendered("recipe_saved.html", saved=True))


def revert(studio: Studio, asked: Asked) -> Any:
    drafts = Drafts(studio.places)
    drafts.forget(drafts.path(asked("path")), _claim(asked))
    return go(address("recipe", path=asked("path")), asked)


def add(studio: Studio, asked: Asked) -> Any:
    """Models that were chosen on another page go into a recipe, or make a new one."""
    drafts = Drafts(studio.places)
    name = asked("recipe")
    if not name:
        name = fresh(studio, [*shelf(studio.places, details=False).recipes, *drafts.unsaved()])
    path = drafts.path(name)
    chosen = [_named(studio, one, path) for one in asked.form.get("path", ())]
    text = drafts.state(path).text
    refs = _own(look_at(studio.places, path, text)).get("models")
    drafts.keep(path, _with_models(text, refs if isinstance(refs, Mapping) else _MAP, chosen))
    return go(address("recipe", path=name), asked)


def saved(studio: Studio, asked: Asked) -> Path:
    """The file of a recipe without problems, with what the page shows in it, or what was typed last."""
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    if "yaml" in asked.form:
        now = drafts.keep(path, _yaml(asked), _claim(asked))
    else:
        now = drafts.found(path)
    look = look_at(studio.places, path, now.text)
    problems = look.problems or mistyped(studio.places, look.tree, path.parent, local=True)
    if problems:
        raise RecipeError(*problems)
    if not now.saved:
        drafts.save(path, now.text, Claim(now.ground, now.seen, now.tab))
    return path


def out_of(studio: Studio, asked: Asked) -> str:
    """The folder to write, as the command names it."""
    if not asked("out").strip():
        raise OutputError("name the folder to write")
    return studio.places.shown(studio.places.inside(asked("out").strip()))


def about(studio: Studio, path: Path) -> dict[str, Any]:
    """What the queue notes of a recipe: its name, and what its file holds, so that another text is another job."""
    return {"recipe": studio.places.shown(path), "file": Drafts(studio.places).state(path).file}


def run(studio: Studio, asked: Asked) -> Any:
    """Save, and queue the merge."""
    out, path = out_of(studio, asked), saved(studio, asked)
    more = ["--overwrite"] if asked("overwrite") else []
    words = ["merge", studio.places.shown(path), out, *more]
    job = studio.jobs.add(words, f"merge into {out}", {**about(studio, path), "out": out})
    return go(f"/run/{job.id}", asked)


def use(studio: Studio, asked: Asked) -> Any:
    """Take a method that an inspection speaks for."""
    drafts = Drafts(studio.places)
    path = drafts.path(asked("path"))
    text = drafts.state(path).text
    tree = _own(look_at(studio.places, path, text))
    drafts.keep(path, _with_method(text, tree, 0, asked("method"), alone=True))
    return go(address("recipe", path=asked("path")), asked)
