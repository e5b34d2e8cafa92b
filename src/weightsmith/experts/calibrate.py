"""Routers of a mixture with fewer experts, fitted again to what the larger mixture's layers gave.

Layer by layer, on the inputs that the original had there: the router's rows (and its bias, where it has one) are moved
by Adam until the routed experts' output is nearest to the original's in the mean square.  A layer whose error on tokens
held back did not fall keeps its rows.  Source: the observation that pruning loses more by stale routers than by missing
experts (arXiv:2603.02217, abstract); the procedure is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError, WeightsmithError
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.experts.maps import read_map
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, model_card
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View
from weightsmith.io.url import Url
from weightsmith.jobs.job import Job, Records, Result
from weightsmith.observe.data import Example, batches, read_examples
from weightsmith.observe.memory import available_memory, size_text
from weightsmith.observe.mixtures import Mixture, mixtures
from weightsmith.observe.model import LoadedModel, load_model, resting
from weightsmith.observe.outcomes import outcomes
from weightsmith.observe.routing import token_mask
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["Calibrated", "Fit", "calibrate", "fitted", "rerun"]

NAME = "model"
_LOOKS = 8  # at the error on what is held back, while a router is fitted
_HELD = 5  # every fifth example, and token, is held back


@dataclass(frozen=True)
class Fit:
    """How routers are fitted.

    tokens  of the data, at most; steps of Adam per layer, `batch` tokens each
    rate    of a step, relative to the root mean square of the rows
    """

    tokens: int = 4096
    steps: int = 100
    batch: int = 512
    rate: float = 0.01
    seed: int = 0
    length: int = 512


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    perplexity  on examples held back: of the original, and of the smaller mixture before and after
    errors      experts' module -> relative squared error of its output on tokens held back, before and after
    """

    perplexity: Mapping[str, float]
    errors: Mapping[str, tuple[float, float]]
    tokens: int
    result: Result


def calibrate(
    folder: str | Path,
    data: str | Path | Iterable[Any],
    out: Path,
    fit: Fit | None = None,
    settings: Settings = DEFAULT,
    *,
    original: str | Path | None = None,
    device: str = "auto",
    field: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Calibrated:
    """Write the smaller mixture in `folder` with routers fitted on data to the folder `out`.

    original  the larger mixture; default: the one that `folder` was made from

    One of the two is in memory at a time, in float32, with inputs and outputs of all layers for the tokens.
    Raises WeightsmithError and its kinds for bad input, before anything is written.
    """
    fit, place = fit or Fit(), Path(folder)
    larger = _original(place) if original is None else str(original)
    source = FolderSource(place)
    shown = _Fitted(source)
    job = _job(shown, larger, data, fit, settings, out)  # every obstacle before a model is loaded
    if problems := [*job.plan.problems, *job.obstacles(out, settings)]:
        raise PlanError(problems)
    teacher = load_model(larger, kind="causal-lm", device=device)
    train, held = _examples(data, teacher, fit, field)
    seen = _taught(teacher, train)
    perplexity = {"original": _perplexity(teacher, held)}
    del teacher
    student = load_model(place, kind="causal-lm", device=device)
    own = mixtures(student)
    if {m.name for m in own} != set(seen):
        raise WeightsmithError(f"{folder} and {larger} do not have the same layers with experts")
    perplexity["before"] = _perplexity(student, held)
    errors: dict[str, tuple[float, float]] = {}
    with resting(student.module):
        for done, mixture in enumerate(own):
            errors[mixture.name] = fitted(mixture, *seen.pop(mixture.name), fit)
            if progress is not None:
                progress(done + 1, len(own))
    perplexity["after"] = _perplexity(student, held)
    shown.take(student, own)
    tokens = sum(len(example.inputs) for example in train)
    return Calibrated(perplexity, errors, tokens, _written(job, perplexity, errors, out, settings))


def rerun(out: Path | Url, settings: Settings = DEFAULT) -> list[str]:
    """Refuse: what was fitted on data is not made of a recipe alone."""
    raise OutputError(f"{out}: its routers were fitted on data; run moe calibrate again into another folder to compare")


def fitted(mixture: Mixture, x: Tensor, wanted: Tensor, fit: Fit) -> tuple[float, float]:
    """Fit one router in place: x, wanted [tokens, hidden]; the relative squared errors before and after, held back."""
    router = list(mixture.router.parameters())
    device = router[0].device
    held = torch.arange(len(x)) % _HELD == _HELD - 1
    scale = float(wanted[held].double().square().sum()) or 1.0

    def error() -> float:
        with torch.no_grad():
            parts = zip(torch.split(x[held], fit.batch), torch.split(wanted[held], fit.batch), strict=True)
            total = sum(float((mixture.output(a.to(device)) - b.to(device)).double().square().sum()) for a, b in parts)
        return total / scale

    before = best = error()
    kept = [p.detach().clone() for p in router]
    rows = torch.cat([p.detach().flatten() for p in router])
    rate = fit.rate * (float(rows.square().mean().sqrt()) or 1.0)
    generator = torch.Generator().manual_seed(fit.seed)
    inside = torch.nonzero(~held).flatten()
    _wants(mixture.experts.parameters(), False)
    for _ in range(min(_LOOKS, fit.steps)):
        _wants(router, True)
        optimizer = torch.optim.Adam(router, lr=rate)
        for _ in range(-(-fit.steps // _LOOKS)):
            chosen = inside[torch.randperm(len(inside), generator=generator)[: fit.batch]]
            with torch.enable_grad():
                loss = (mixture.output(x[chosen].to(device)) - wanted[chosen].to(device)).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        _wants(router, False)
        if (now := error()) < best:
            best, kept = now, [p.detach().clone() for p in router]
        else:  # choices jump: back to the best, and on in smaller steps
            rate /= 3
        for p, value in zip(router, kept, strict=True):
            p.copy_(value)
    return before, best


def _wants(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for p in parameters:
        p.requires_grad_(wanted)
        p.grad = None


# --- what is fitted to -------------------------------------------------------------------------------


def _examples(
    data: str | Path | Iterable[Any], loaded: LoadedModel, fit: Fit, field: str | None
) -> tuple[list[Example], list[Example]]:
    """Examples to fit on, and those held back for perplexities."""
    found = read_examples(data, loaded, examples=max(fit.tokens, 2), length=fit.length, seed=fit.seed, field=field)
    taken, count = list[Example](), 0
    for example in found:
        if count >= fit.tokens:
            break
        taken.append(example)
        count += len(example.inputs)
    held = taken[_HELD - 1 :: _HELD]
    if not held:
        raise WeightsmithError(
            f"{len(taken)} examples with {count} tokens: give at least {_HELD}, of which every {_HELD}th is held back"
        )
    return [example for i, example in enumerate(taken) if i % _HELD != _HELD - 1], held


def _taught(loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, tuple[Tensor, Tensor]]:
    """Experts' module -> inputs and routed outputs [tokens, hidden] of the original, in main memory."""
    found = mixtures(loaded)
    tokens = sum(len(example.inputs) for example in examples)
    needed, free = sum(8 * tokens * m.width for m in found), available_memory(torch.device("cpu"))
    if free is not None and needed > 0.9 * free:
        raise WeightsmithError(
            f"inputs and outputs of {len(found)} layers for {tokens} tokens need {size_text(needed)}, "
            f"{size_text(free)} is free; take fewer tokens (--tokens)"
        )
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {m.name: ([], []) for m in found}
    with resting(loaded.module), torch.no_grad():
        for part in batches(examples, 8):
            keep = token_mask(part).flatten()
            handles = [m.traced(partial(_note, seen[m.name], keep)) for m in found]
            try:
                loaded.run(part.inputs, part.mask)
            finally:
                for handle in (handle for group in handles for handle in group):
                    handle.remove()
    return {name: (torch.cat(x), torch.cat(y)) for name, (x, y) in seen.items()}


def _note(into: tuple[list[Tensor], list[Tensor]], keep: Tensor, x: Tensor, y: Tensor) -> None:
    for place, value in zip(into, (x, y), strict=True):
        place.append(value.detach().float()[keep.to(value.device)].cpu())


def _perplexity(loaded: LoadedModel, examples: Sequence[Example]) -> float:
    loss, _, count = outcomes(loaded, examples)
    return float(np.exp(min(loss.sum() / max(count.sum(), 1), 700)))


def _original(folder: Path) -> str:
    """What the smaller mixture was made from."""
    read = read_map(folder)
    if len(set(read.counts.values())) > 1:
        raise WeightsmithError(f"{folder}: its layers have unlike numbers of experts, which transformers does not run")
    recipe = read_manifest(folder)["recipe"]
    try:
        return str(recipe["models"][NAME]["model"])
    except (KeyError, TypeError):
        raise WeightsmithError(
            f"{folder}: weightsmith.json does not say what it was made from; name it: --original"
        ) from None


# --- the folder --------------------------------------------------------------------------------------


class _Fitted(View):
    """A folder's tensors, with those of routers that were fitted."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.made: dict[str, Tensor] = {}

    def take(self, loaded: LoadedModel, fitted: Sequence[Mixture]) -> None:
        """The routers of a running model, under the checkpoint's names."""
        named = {id(p): n for n, p in loaded.module.named_parameters()}
        for mixture in fitted:
            for value in mixture.router.parameters():
                stored = loaded.names.name(named[id(value)])
                if stored is None:
                    raise WeightsmithError(f"{self}: no tensor for {named[id(value)]}")
                self.made[stored] = value.detach().float().cpu()

    def computes(self, name: str) -> bool:
        return self.key(name).name.rpartition(".")[0].endswith((".gate", ".router")) or super().computes(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name in self.made:
            return self.made[key.name][low:high]
        if self.computes(name):
            return self.source.read(name, low, high)
        return super().block(name, low, high, into)


def _job(shown: _Fitted, original: str, data: object, fit: Fit, settings: Settings, out: Path) -> Job:
    recipe = Recipe(models={NAME: ModelRef(model=NAME)}, method=(StageSpec(name="keep"),))
    inputs = Inputs(None, {NAME: shown})
    plan = make_plan(recipe, settings.but(device="cpu"), sources=inputs, out=out, strict=False)
    what = str(data) if isinstance(data, (str, Path)) else f"{type(data).__name__} in memory"
    told = {
        "models": {NAME: {"model": str(shown.source)}, "original": {"model": original}},
        "calibrate": {"data": what, **vars(fit)},
    }
    return Job(inputs, plan, _nothing, recipe=told, parents={NAME: shown.source}, identify=inputs.fingerprints)


def _nothing(job: Job, records: Records, folder: Path) -> None:
    """Write nothing beside the weights."""


def _written(
    job: Job, perplexity: Mapping[str, float], errors: Mapping[str, tuple[float, float]], out: Path, settings: Settings
) -> Result:
    found = {"perplexity": dict(perplexity), "errors": {name: list(pair) for name, pair in errors.items()}}
    warnings = []
    if not perplexity["after"] < perplexity["before"]:
        text = (f"perplexity on held-back text did not fall ({perplexity['before']:.4g} to {perplexity['after']:.4g}): "
                "give more data, or keep the folder as it was")  # fmt: skip
        warnings.append(Problem(Code.FOUND, "calibrate", text))
    plan = replace(job.plan, warnings=(*job.plan.warnings, *warnings))
    return replace(job, plan=plan, package=partial(_package, found)).run(out, settings)


def _package(found: Mapping[str, Any], job: Job, records: Records, folder: Path) -> None:
    source = job.parents[NAME]
    assert source.origin.folder is not None
    copied = copy_companions(source.origin.folder, folder, source.origin.files)
    card = model_card(
        title=folder.name if folder.name != "files" else "Mixture with fitted routers",
        models=[CardModel(NAME)],
        base=None,
        method="Routers fitted on data to the outputs of the original's layers.",
        recipe=job.recipe,
        licences=job.licences(),
        version=__version__,
    )
    write_file(folder / "README.md", card.replace("weightsmith merge recipe", "weightsmith moe calibrate"))
    made_by = {
        key.name: "router, fitted" if key.name.rpartition(".")[0].endswith((".gate", ".router")) else "copied"
        for key in job.plan.keys
    }
    companions = {"files": copied.files, "modules": copied.modules, "left": copied.left}
    job.manifest(folder, records, "calibrated", made_by, companions=companions, calibration=found)
