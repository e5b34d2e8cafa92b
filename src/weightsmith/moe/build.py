"""From a mixture's recipe to a finished folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Code, Problem, told
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.compare import compare_tensors, gathered
from weightsmith.engine.runner import one_thread_each
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, model_card
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url
from weightsmith.jobs.job import Job, Records, Result
from weightsmith.jobs.verify import differences
from weightsmith.moe import router
from weightsmith.moe.draft import Draft, draft
from weightsmith.moe.recipe import PROMPTED, Expert, MoeRecipe, Prompt
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Drift", "build", "build_in_memory", "drifts", "made_routers", "prepared_draft", "rerun"]


@dataclass(frozen=True)
class Drift:
    """How far an expert moved from the base, relative L2: in the MLPs, which are used, and in all that is not."""

    expert: str
    mlp: float
    dropped: float


def build(
    recipe: MoeRecipe | Draft, out: Path, settings: Settings = DEFAULT, *, drift: bool = True, **options: Any
) -> Result:
    """Write the mixture into the folder `out`, which appears complete or not at all.

    recipe   or what `prepared_draft` has made of it
    drift    also read what the mixture leaves out of the experts, and warn where that moved more than what it takes
    options  change single settings; `device` is where the prompts' forward passes are made

    Raises PlanError with every problem before anything is written.
    """
    settings = settings.but(**options)
    made = recipe if isinstance(recipe, Draft) else prepared_draft(recipe)
    return _job(made, settings, out, drift=drift).run(out, settings)


def build_in_memory(
    recipe: MoeRecipe, given: Mapping[str, Source] | None = None, settings: Settings = DEFAULT, **options: Any
) -> dict[str, Tensor]:
    """The mixture's tensors, by name, and nothing on disk; `given` as in `draft.draft`."""
    settings = settings.but(**options)
    return _job(prepared_draft(recipe, given), settings).tensors(settings)


def prepared_draft(recipe: MoeRecipe, given: Mapping[str, Source] | None = None) -> Draft:
    """The laid-out mixture; PlanError with every problem if there is one."""
    made, problems = draft(recipe, given)
    if made is None:
        raise PlanError(dict.fromkeys(problems))
    return made


def rerun(out: Path | Url, settings: Settings = DEFAULT) -> list[str]:
    """Build the mixture in `out` again, without writing, and return what differs, a line each."""
    manifest = read_manifest(out)
    try:
        recipe = MoeRecipe.model_validate(manifest["recipe"])
    except ValueError as error:
        raise OutputError(f"{out}: the recipe in weightsmith.json is not one of this version ({error})") from error
    made, problems = draft(recipe)
    if made is None:
        return [f"the recipe cannot be run again: {text}" for text in problems]
    return differences(_job(made, settings), out, manifest, settings)


def _job(made: Draft, settings: Settings, out: Path | None = None, *, drift: bool = False) -> Job:
    """Copying the mixture's source is a merge with one model that is kept: planned and carried out as any other."""
    recipe = Recipe(
        models={"moe": ModelRef(model="moe")},
        method=(StageSpec(name="keep"),),
        output=made.recipe.output,
        seed=made.recipe.seed,
    )
    inputs = Inputs(None, {"moe": made.source})
    here = settings.but(device="cpu")  # bytes are copied; only prompts are work for a device
    plan = make_plan(recipe, here, sources=inputs, out=out, strict=out is None)

    def ready() -> list[Problem]:
        made.source.made |= made_routers(made, settings.device)
        moved = drifts(made, settings.but(progress=None)) if drift else []
        return list(told(Code.FOUND, [*conditions(made), *(text for found in moved if (text := _told(found)))]))

    return Job(
        inputs,
        replace(plan, warnings=(*made.warnings, *plan.warnings)),
        partial(_package, made),
        recipe=made.recipe.model_dump(mode="json", exclude_defaults=True),
        parents=made.source.sources,
        identify=made.source.fingerprint,
        ready=ready,
    )


# --- routers ---------------------------------------------------------------------------------------


def made_routers(made: Draft, device: str = "auto") -> dict[str, Tensor]:
    """Every tensor that comes from no model: routers [experts, hidden], gates of shared experts [1, hidden], zeros."""
    recipe = made.recipe
    experts, shared = recipe.experts, recipe.shared if made.gates else {}
    if recipe.router in PROMPTED:
        with one_thread_each():  # the same rows whatever the number of cores
            rows, gates = _from_prompts(made, {**experts, **shared}, device)
    else:
        rows = [router.drawn(recipe.router, recipe.seed, n, tuple(experts), made.hidden) for n in made.routers]
        gates = [router.drawn(recipe.router, recipe.seed, n, tuple(shared), made.hidden) for n in made.gates]
    if made.layout.sigmoid and recipe.router != "uniform_random":
        rows = [router.within_sigmoid(matrix) for matrix in rows]
    out = dict(zip(made.routers, rows, strict=True)) | dict(zip(made.gates, gates, strict=False))
    zeros = {n: torch.zeros(p.key.shape) for n, p in made.source.pieces.items() if not p.parts and n not in out}
    return out | zeros


def _from_prompts(made: Draft, experts: Mapping[str, Expert], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the experts and of the shared ones behind them, layer by layer."""
    from weightsmith.moe.prompts import encoded, states
    from weightsmith.observe.model import folder_coder, load_model

    recipe, label = made.recipe, made.base.origin.label
    texts = any(isinstance(p, str) for e in experts.values() for p in (*e.prompts, *e.avoid))
    coder = folder_coder(made.base.origin.folder, label, made.vocabulary) if texts else None

    def ids(prompts: tuple[Prompt, ...], who: str) -> list[tuple[int, ...]]:
        return encoded(prompts, coder, made.vocabulary, who)

    layers = len(made.routers)
    if recipe.router == "cheap_embed":
        name = next(key.name for key in made.base.keys.values() if key.name.endswith("embed_tokens.weight"))

        def state(prompts: list[tuple[int, ...]]) -> Tensor:
            found = router.cheap_embed(lambda token: made.base.read(name, token, token + 1)[0], prompts)
            return found.expand(layers, -1)
    else:
        # The text the prompts are in is that of the base: experts only lend their MLPs.
        loaded = load_model(made.base.origin.folder or recipe.base, kind="causal-lm", device=device)

        def state(prompts: list[tuple[int, ...]]) -> Tensor:
            return states(loaded, prompts, whole=recipe.router == "hidden_avg", site=recipe.site)

    plus = [state(ids(expert.prompts, name)) for name, expert in experts.items()]
    minus = [state(ids(expert.avoid, name)) if expert.avoid else None for name, expert in experts.items()]
    rows = router.rows(plus, minus).transpose(0, 1)  # [layers, experts, hidden]
    count = len(recipe.experts)
    return [r[:count].contiguous() for r in rows], [r[count:].contiguous() for r in rows]


def conditions(made: Draft) -> list[str]:
    """A warning for the worst router whose rows lie too near to each other."""
    found = {name: router.condition(made.source.made[name]) for name in made.routers}
    worst = max(found, key=lambda name: found[name])
    bad = sum(value > router.ILL_CONDITIONED for value in found.values())
    if not bad:
        return []
    return [f"{bad} of {len(found)} routers have a condition number above {router.ILL_CONDITIONED:g} (worst: {worst}, "
            f"{found[worst]:.3g}): the prompts are too much alike, and some experts will hardly be used"]  # fmt: skip


def drifts(made: Draft, settings: Settings = DEFAULT) -> list[Drift]:
    """How far each expert moved from the base in what is taken from it, and in what is left behind."""
    base, out = made.base, []
    for name in made.recipe.experts:
        expert = made.source.sources[name]
        fitting = [
            n for n, k in base.keys.items() if k.floating and n in expert.keys and expert.key(n).shape == k.shape
        ]
        changes = compare_tensors(base, expert, fitting, settings)
        mlp = gathered(c for c in changes if ".mlp." in c.name)
        rest = gathered(c for c in changes if ".mlp." not in c.name)
        out.append(Drift(name, mlp.relative, rest.relative))
    return out


def _told(found: Drift) -> str | None:
    if found.dropped <= found.mlp:
        return None
    return (
        f"{found.expert} moved more outside its MLPs (relative L2 {found.dropped:.2%}) than in them ({found.mlp:.2%}); "
        "a mixture takes only the MLPs, so most of what it learned is left behind"
    )


# --- what goes with the weights --------------------------------------------------------------------


def _package(made: Draft, job: Job, records: Records, folder: Path) -> None:
    """Write config, companion files, model card and weightsmith.json."""
    base, recipe = made.base, made.recipe
    assert base.origin.folder is not None
    copied = copy_companions(base.origin.folder, folder, base.origin.files)
    write_file(folder / "config.json", made.config)
    words = f"A mixture of {made.facts.experts} experts ({made.layout.class_name}), {made.facts.chosen} per token: "
    words += "MLPs of the models below, everything else of the base; "
    words += f"routers by {recipe.router}, from prompts." if recipe.router in PROMPTED else f"{recipe.router} routers."
    card = model_card(
        title=folder.name if folder.name != "files" else "Mixture of experts",
        models=[CardModel(name) for name in (*recipe.experts, *recipe.shared)],
        base=CardModel("base"),
        method=words,
        recipe=job.recipe,
        licences=job.licences(),
        version=__version__,
    )
    write_file(folder / "README.md", card.replace("weightsmith merge recipe", "weightsmith moe recipe"))
    made_by = {name: piece.story for name, piece in made.source.pieces.items()}
    companions = {"files": copied.files, "modules": copied.modules, "left": copied.left}
    job.manifest(folder, records, "moe", made_by, companions=companions)
