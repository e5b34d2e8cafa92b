"""From a mixture of experts and statistics of its routing to a folder with fewer experts."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.runner import one_thread_each
from weightsmith.experts.maps import write_map
from weightsmith.experts.smaller import CODED, NAME, Shrinking, Smaller, smaller
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, model_card
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.codec_folder import WEIGHTS
from weightsmith.io.url import Url
from weightsmith.jobs.compress import noted, stored
from weightsmith.jobs.job import Job, Records, Result
from weightsmith.jobs.package import treatments
from weightsmith.jobs.verify import differences
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["KIND", "rerun", "shrink"]

KIND = "shrunk"
_STORED = ", then stored as low-rank products and the rows that those miss most"


def shrink(asked: Shrinking | Smaller, out: Path, settings: Settings = DEFAULT, **options: object) -> Result:
    """Write the mixture with fewer experts into the folder `out`, which appears complete or not at all.

    asked    or what `smaller` has made of it
    options  change single settings

    Tensors are made a block at a time; besides, the orders of hidden units are held (8 bytes for each).
    Raises PlanError with every problem before anything is written.
    """
    settings = settings.but(**options)
    made = asked if isinstance(asked, Smaller) else smaller(asked)
    work = job(made, settings, out)
    result = work.run(out, settings)
    if made.asked.by != CODED:
        return result
    return replace(result, storage=stored(work, read_manifest(result.out)["codec"]))


def rerun(out: Path | Url, settings: Settings = DEFAULT) -> list[str]:
    """Make the mixture in `out` again, without writing, and return what differs, a line each."""
    manifest = read_manifest(out)
    try:
        asked = Shrinking.of(manifest["recipe"])
    except (KeyError, TypeError) as error:
        raise OutputError(f"{out}: the recipe in weightsmith.json is not one of this version ({error})") from error
    try:
        made = smaller(asked)
    except PlanError as error:
        return [f"the recipe cannot be run again: {problem}" for problem in error.problems]
    return differences(job(made, settings), out, manifest, settings)


def job(made: Smaller, settings: Settings, out: Path | None = None) -> Job:
    """Copying the smaller mixture's source, or encoding it: planned and carried out as any merge."""
    coded = made.asked.by == CODED
    recipe = Recipe(models={NAME: ModelRef(model=NAME)}, method=(StageSpec(name="keep"),))
    if coded:
        rule = {"match": _matrices(made), "method": {"losparse": made.asked.codec}}
        recipe = Recipe.model_validate({"models": {NAME: NAME}, "method": "exact", "rules": [rule]})
    settings = settings.but(device="cpu")
    plan = make_plan(recipe, settings, sources=made.inputs, out=out, strict=out is None, encode=coded)
    return Job(
        made.inputs,
        replace(plan, warnings=(*made.warnings, *plan.warnings)),
        partial(_package, made),
        weights=WEIGHTS if coded else "model",
        recipe=made.asked.recipe,
        parents={NAME: made.original},
        identify=made.inputs.fingerprints,
        ready=partial(_ready, made),
    )


def _matrices(made: Smaller) -> list[str]:
    """Globs of the experts' matrices, without their biases."""
    found = [
        layer.stack.of(0, word)
        for layer in made.layers
        for word in layer.stack.parts
        if len(layer.stack.key(made.original, word).shape) == 2
    ]
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in found))


def _ready(made: Smaller) -> list[Problem]:
    """Find the orders of hidden units, layer by layer: two experts of one are held at a time."""
    layers = [layer for layer in made.layers if layer.merges and made.asked.align]
    with one_thread_each():  # the same orders whatever the number of cores
        for layer in layers:
            made.source.align(layer)
    if not layers:
        return []
    moved = len(made.source.orders)
    merged = sum(layer.stack.count - layer.grouping.count for layer in layers)
    return [Problem(Code.FOUND, "align", f"hidden units of {moved} of {merged} experts were put into another order")]


def _package(made: Smaller, job: Job, records: Records, folder: Path) -> None:
    """Write config, companion files, map, model card and weightsmith.json."""
    origin, coded = made.original.origin, made.asked.by == CODED
    assert origin.folder is not None
    copied = copy_companions(origin.folder, folder, origin.files)
    write_file(folder / "config.json", made.config)
    write_map(made, folder)
    was = {before for before, _ in made.counts.values()}
    now = sorted({after for _, after in made.counts.values()})
    words = (
        f"{' to '.join(map(str, dict.fromkeys((now[0], now[-1]))))} of {was.pop()} experts a layer, by {made.asked.by}"
    )
    card = model_card(
        title=folder.name if folder.name != "files" else "Mixture with fewer experts",
        models=[CardModel(NAME)],
        base=None,
        method=f"{words}: {made.asked.way.purpose}{_STORED if coded else ''}.",
        recipe=job.recipe,
        licences=job.licences(),
        version=__version__,
    )
    card = card.replace("weightsmith merge recipe", "weightsmith moe shrink")
    write_file(folder / "README.md", card)
    made_by = {name: made.source.story(name) for name in made.source.keys}
    companions = {"files": copied.files, "modules": copied.modules, "left": copied.left}
    experts = {name: list(counts) for name, counts in made.counts.items()}
    more = {"codec": noted(job, records)} if coded else {}
    made_by = treatments(job.plan) if coded else made_by
    job.manifest(folder, records, "codec" if coded else KIND, made_by, companions=companions, experts=experts, **more)
