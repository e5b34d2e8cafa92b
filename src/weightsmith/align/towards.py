"""`align --bases`: write a model in the basis of a reference, which takes more than an order of its units.

What a permutation cannot undo, changes of basis inside heads and scales of hidden units, is estimated by least squares
and taken back (`align.canonical`).  The result is a model of its own: it computes what it did, and is run to see that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.align.agree import Agreement, agreement
from weightsmith.align.canonical import canonical
from weightsmith.align.invariance import known
from weightsmith.core.errors import NotKept, SourceError
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.compare import compare_tensors, gathered
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, about, model_card
from weightsmith.io.package.companions import Copied, copy_companions
from weightsmith.io.read.experts import packed_like_memory, stored_as
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.jobs.job import Job, Records, Result
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["KIND", "Towards", "towards"]

KIND = "basis"
"""What a manifest says that such a folder is."""
_UNRELATED = 0.7  # residual from which on least squares have not found one basis in the other


@dataclass(frozen=True)
class Towards:
    """What was done.

    moved      module -> how many of its heads, or hidden units, stood elsewhere, of how many
    residuals  module -> branch -> share of the weights that the best change of basis does not explain
    distance   |model - reference| / |reference| over all that may be changed, before and after
    """

    result: Result
    moved: Mapping[str, tuple[int, int]]
    residuals: Mapping[str, Mapping[str, float]]
    distance: tuple[float, float]
    agreement: Agreement | None

    @property
    def residual(self) -> float:
        """The largest of `residuals`."""
        return max((value for own in self.residuals.values() for value in own.values()), default=0.0)


def towards(
    moving: str | Path | Source,
    reference: str | Path | Source,
    out: str | Path,
    *,
    compare: bool = True,
    settings: Settings = DEFAULT,
) -> Towards:
    """Write `moving` in the basis of `reference` into the folder `out`, which appears complete or not at all.

    compare  run the model before and after, and keep nothing if its outputs moved
    Raises SourceError for models that have no attention and no MLP in common whose layout is known, NotKept.
    """
    source, other = (one if isinstance(one, Source) else open_source(one) for one in (moving, reference))
    for one in (source, other):
        one.prepare()
    found = canonical(source, other, known(source))
    if not found.names:
        raise SourceError(f"{source} and {other} have no attention and no MLP in common whose layout is known")
    there, here, now = (packed_like_memory(one) for one in (other, source, found.source))
    distance = [gathered(compare_tensors(there, one, found.names)).relative for one in (here, now)]
    where = {name: str(one.origin.folder.resolve() if one.origin.folder else one)
             for name, one in (("model", source), ("reference", other))}  # fmt: skip
    recipe = Recipe(models={"model": ModelRef(model=str(source))}, method=(StageSpec(name="keep"),))
    seen: list[Agreement] = []
    pack = partial(_package, source, found.source, found.names, compare, where, seen)
    job = Job.planned(recipe, settings, pack, out=Path(out), sources=Inputs(None, {"model": found.source}))
    told = {"models": {"model": {"model": where["model"]}}, "basis": {"of": where["reference"]}}
    result = replace(job, recipe=told).run(Path(out), settings)
    made = Towards(result, found.moved, found.residuals, (distance[0], distance[1]), seen[0] if seen else None)
    if made.residual > _UNRELATED:
        text = (
            f"least squares explain little of some weights (residual {made.residual:.2g}): the models hardly come from "
            "one, and what was found of their bases means little; the model computes the same all the same"
        )
        made = replace(made, result=replace(result, warnings=(*result.warnings, Problem(Code.FOUND, "basis", text))))
    return made


def _package(
    source: Source,
    view: Source,
    names: tuple[str, ...],
    compare: bool,
    where: Mapping[str, str],
    seen: list[Agreement],
    job: Job,
    records: Records,
    folder: Path,
) -> None:
    """Companion files, the comparison of outputs, the card and the manifest."""
    origin, copied = source.origin, Copied()
    if origin.folder is not None:
        copied = copy_companions(origin.folder, folder, origin.files, config=origin.config)
    if compare:
        seen.append(agreement(source, view, folder, names))
        if not seen[0].holds:
            raise NotKept(
                f"nothing is kept: outputs {seen[0].words}; the bases of these models lie so that rounding matters: "
                "align float32 weights, or without --bases"
            )
    said = f"Its outputs {seen[0].words}." if seen else "Its outputs were not compared with those before."
    card = model_card(
        title=folder.name if folder.name != "files" else "Model in another basis",
        models=[CardModel("model")],
        method=f"The model below in the basis of {Path(where['reference']).name}: it computes the same.\n\n{said}",
        recipe=job.recipe,
        licences=job.licences(),
        about=about(origin.folder, folder),
        version=__version__,
        command="",
    )
    write_file(folder / "README.md", card)
    noted: dict[str, Any] = {"of": where["reference"]}
    if seen:
        noted["logits"] = seen[0].plain
    changed = stored_as(source, names)
    how = {k.name: "taken into another basis" if k.name in changed else "copied" for k in job.plan.keys}
    companions = {"files": copied.files, "modules": copied.modules, "left": copied.left}
    job.manifest(folder, records, KIND, how, companions=companions, basis=noted)
