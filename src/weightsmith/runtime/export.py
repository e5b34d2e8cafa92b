"""Routed experts for servers that exist: the shared model, one PEFT adapter per expert, and prototypes to route by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.read.codec_folder import CodecFolder, CodecSource, SharedSource
from weightsmith.io.read.open import open_source
from weightsmith.io.write.output import check_output
from weightsmith.jobs.merge import run
from weightsmith.lora.extract import extract
from weightsmith.lora.write import Written
from weightsmith.recipe.schema import ModelRef, Recipe
from weightsmith.runtime.changes import unfit
from weightsmith.runtime.router import Router
from weightsmith.train.save import save_folder

__all__ = ["INDEX", "Exported", "export"]

INDEX = "experts.json"
"""Written last: a folder that has it is complete."""


@dataclass(frozen=True)
class Exported:
    """A finished export: OUT/shared, OUT/adapters/NAME, OUT/prototypes, and the index of them."""

    out: Path
    index: Path
    adapters: Mapping[str, Written]


def export(
    folder: str | Path,
    out: str | Path,
    settings: Settings = DEFAULT,
    *,
    router: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    matrices_only: bool = False,
) -> Exported:
    """Write a compressed folder (`twin` with strategy svd) as a shared model and adapters on it.

    shared model + adapter t is expert t of the folder, up to rounding in the shared model's dtype; adapters joined by
    peft's `cat` with weights w are sum_t w_t v_t.

    matrices_only  leave out scales and biases, which PEFT keeps whole, and then neither joins nor (most servers) serves
    router  its prototypes, the mean features of each expert's samples, go along: [experts, width]
    dtype   of the factors; default: as the base stores its weights

    Errors: PlanError, SourceError, before anything is written.
    """
    out = Path(out)
    opened = CodecFolder(Path(folder).expanduser(), open_source)
    origin = opened.base(None if base is None else open_source(base), strict=base is not None)
    problems: list[Any] = [*check_output(out, [opened.path], settings.overwrite, False, 0), *unfit(opened, origin)]
    if problems:
        raise PlanError(problems)
    routing = None if router is None else Router.load(router, opened.experts)
    origin.prepare()
    opened.refuse_other(origin)
    shared = SharedSource(opened, origin)
    reference = ModelRef(model=str(opened.path), expert=opened.experts[0])
    recipe = Recipe(models={"shared": reference}, method="keep")  # type: ignore[arg-type]
    quiet = settings.but(progress=None)
    run(recipe, out / "shared", quiet, sources=Inputs(None, {"shared": shared}))
    written: dict[str, Written] = {}
    rank = _rank(opened)
    for number, name in enumerate(opened.experts):
        expert = CodecSource(opened, origin, name)
        place = out / "adapters" / name
        how: dict[str, Any] = {"rank": rank, "dtype": dtype, "skip": matrices_only, "overwrite": settings.overwrite}
        written[name] = extract(expert, out / "shared", place, **how)
        if settings.progress is not None:
            settings.progress(number + 1, len(opened.experts))
    if routing is not None:
        made = {"experts": list(opened.experts)}
        tensors = {"prototypes": routing.prototypes}
        save_folder(out / "prototypes", tensors, made=made, how="means of features", kind="prototypes",
                    name="prototypes", overwrite=settings.overwrite)  # fmt: skip
    about = {
        "model": "shared",
        "adapters": {name: f"adapters/{name}" for name in opened.experts},
        "prototypes": None if routing is None else "prototypes/prototypes.safetensors",
        "features": "mean over tokens of the shared model's last hidden state; rows are in the order of adapters",
    }
    return Exported(out, write_file(out / INDEX, json.dumps(about, indent=1) + "\n"), written)


def _rank(folder: CodecFolder) -> int:
    """The largest rank that is stored."""
    return max((key.shape[0] for name, key in folder.files.keys.items() if "::s." in name), default=1)
