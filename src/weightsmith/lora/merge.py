"""Several LoRA adapters into one, module by module: never more than one module's factors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Found, Pass, fold, measured
from weightsmith.core.site import Site
from weightsmith.io.read.lora import Adapter, Module
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.lora.coefficients import Weights, weights_by
from weightsmith.lora.compare import (
    Adapters,
    Method,
    combinable,
    differences,
    modules_of,
    other_bases,
    twice,
    weighted,
)
from weightsmith.lora.kernels import described
from weightsmith.lora.naming import TARGETING, config_of
from weightsmith.lora.recipe import AdapterRecipe, method_of
from weightsmith.lora.rules import Averaged, Combine, Made, Part, SharedBasis
from weightsmith.lora.whole import token_rows, whole_tensors
from weightsmith.lora.write import Description, ModuleReport, Writer, Written

__all__ = ["merge", "run"]


def merge(
    models: Mapping[str, str | Path],
    method: str,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    force: bool = False,
    overwrite: bool = False,
    **parameters: Any,
) -> Written:
    """Combine the LoRA adapters `models` (name -> PEFT folder) into one adapter in the folder `out`.

    method      cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune, any of the last four with _svd,
                knots, mwa, average
    parameters  of the method: weight (one per adapter, or one), density, rank, vote, clamp, ...
    base        noted in the result as its base model; default: the adapters' own
    dtype       of the stored factors; default: as the adapters store theirs
    force       also combine adapters that name different bases

    Raises RecipeError, SourceError or PlanError, one line per problem, before anything is written.
    """
    tree = {
        "models": {name: str(path) for name, path in models.items()},
        "method": {"name": method},
        "parameters": {name: list(v) if isinstance(v, tuple) else v for name, v in parameters.items()},
        "base": base,
        "output": {"dtype": dtype},
        "seed": seed,
    }
    return run(AdapterRecipe.model_validate(tree), out, force=force, overwrite=overwrite)


def run(
    recipe: AdapterRecipe,
    out: str | Path,
    *,
    force: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Carry out a recipe; see `merge`.  `progress` is called with (modules done, modules in all)."""
    method = method_of(recipe)
    adapters = {name: combinable(read_adapter(ref.model)) for name, ref in recipe.models.items()}
    notes = other_bases(adapters, force=force)
    if isinstance(method, Combine) and len(adapters) == 1 and method.kind != "linear":
        if method.kind != "cat":  # whose product is that of linear
            notes.append(f"one adapter: {method.kind} is then linear, as in peft; lora resize lowers the rank of one")
        method = Combine("linear", weight=method.weight, saved=method.saved)
    notes += twice(adapters, method)
    method, weights = weighted(method, adapters)
    modules = modules_of(adapters, method)
    known = described(adapters, modules, _base(recipe, adapters))
    by = weights_by(recipe.coefficients, method, adapters, modules, weights)
    notes += differences(adapters, modules, method)
    kind = next(iter(adapters.values())).kind
    dtype = recipe.output.dtype or _common(adapters)
    folders = [adapter.path for adapter in adapters.values()]
    with Writer(Path(out), folders, overwrite=overwrite, kind=kind) as writer:
        for done, (module, made) in enumerate(_made(adapters, modules, method, by, recipe.seed)):
            writer.add(
                known[module],
                [part.factors for part in made],
                [part.wanted for part in made],
                dtype=dtype,
                energy=min(part.energy for part in made),
                how=method.describe(),
            )
            if progress:
                progress(done + 1, len(modules))
        notes += _unlike_factors(writer.worst, method)
        averaged = isinstance(method, Averaged) or method.saved == "average"
        whole, more = whole_tensors(adapters, weights, averaged=averaged)
        rows, indices, said = token_rows(adapters, weights, averaged=averaged)
        for stored, (value, how) in {**whole, **rows}.items():
            writer.add_whole(stored, value, recipe.output.dtype or str(value.dtype).removeprefix("torch."), how)
        config = _config(recipe, adapters, writer.ranks, method, known) | indices
        about = Description(
            made=recipe.model_dump(mode="json", exclude_defaults=True),
            inputs={name: adapter.fingerprint() for name, adapter in adapters.items()},
            folders={name: adapter.path for name, adapter in adapters.items()},
            how=f"LoRA adapters combined by {method.describe()}.",
            command="weightsmith lora merge recipe.yaml OUT",
            base=config["base_model_name_or_path"],
        )
        return writer.finish(
            config, about, saved=(*whole, *rows), warnings=(*notes, *more, *said),
            weights=dict(zip(adapters, weights, strict=True)),
        )  # fmt: skip


# --- the work ----------------------------------------------------------------------------------------


def _made(
    adapters: Adapters, modules: Sequence[str], method: Method, weights: Weights, seed: int
) -> Iterator[tuple[str, list[Made]]]:
    """Module -> what becomes of it, by expert or group where it has several."""
    if isinstance(method, SharedBasis):
        yield from _in_shared_basis(adapters, modules, method, seed)
        return
    limit = _limit(adapters)
    for module in modules:
        who = [
            (label, a, w)
            for (label, a), w in zip(adapters.items(), weights(module), strict=True)
            if module in a.modules
        ]
        pieces = [adapter.factors(module) for _, adapter, _ in who]
        own, most = _of_one_group(method, limit, who[0][1].modules[module].groups)
        made = []
        for i, factors in enumerate(zip(*pieces, strict=True)):
            parts = [Part(f, a.modules[module].scale, w, label) for f, (label, a, w) in zip(factors, who, strict=True)]
            made.append(own.combine(parts, module if len(pieces[0]) == 1 else f"{module}.{i}", seed, most))
        yield module, made


FAR = 0.3
"""Share of a module's summed change by which the product of summed factors may be off without a word.  Chosen."""


def _unlike_factors(worst: ModuleReport | None, method: Method) -> Iterator[str]:
    """What to say where (sum B)(sum A) is not nearly the sum of the products B A."""
    if worst is not None and not isinstance(method, SharedBasis) and method.apart and worst.error > FAR:
        way = "space: product" if isinstance(method, Averaged) else "svd, or cat at a larger rank,"
        yield (
            f"A and B are combined by themselves, which suits adapters that began alike (of one run): {worst.name} is "
            f"{worst.error:.0%} off the sum of the weighted changes; {way} combines the changes"
        )


def _of_one_group(method: Combine | Averaged, limit: int, groups: int) -> tuple[Combine | Averaged, int]:
    """The method and the limit of ranks for one group of a convolution, of which peft counts all together."""
    if groups > 1 and isinstance(method, Combine) and isinstance(method.rank, int):
        method = replace(method, rank=max(method.rank // groups, 1))
    return method, max(limit // groups, 1)


def _limit(adapters: Adapters) -> int:
    """The rank that `auto` stands for."""
    return max(adapter.rank for adapter in adapters.values())


def _in_shared_basis(
    adapters: Adapters, modules: Sequence[str], method: SharedBasis, seed: int
) -> Iterator[tuple[str, list[Made]]]:
    """KnOTS: its thresholds are over all modules, so each look reads them all once."""
    found: dict[Pass[Any], Any] = {}

    def look(one: Pass[Any]) -> Mapping[str, Any]:
        return fold(one.see(site) for module in modules for site in _sites(adapters, module, found, seed))

    for asked in method.passes(len(adapters)):
        found[asked] = measured(asked, look)
    for module in modules:
        yield module, [method.combine(site) for site in _sites(adapters, module, found, seed)]


def _sites(adapters: Adapters, module: str, results: Found, seed: int) -> Iterator[Site]:
    """One module as the engine shows low-rank experts to methods: factors with the scale in them, no full matrix."""
    found = [a.factors(module) if module in a.modules else None for a in adapters.values()]
    scales = [a.modules[module].scale if module in a.modules else 0.0 for a in adapters.values()]
    first = next(pieces for pieces in found if pieces is not None)
    for i, (b, a) in enumerate(first):
        shape = (b.shape[0], a.shape[1])
        none = (torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        factors = tuple(
            none if pieces is None else (pieces[i].b * scale, pieces[i].a)
            for pieces, scale in zip(found, scales, strict=True)
        )
        key = Key(f"{module}.weight" if len(first) == 1 else f"{module}.{i}.weight", shape, "float32")
        stack = torch.empty(len(factors), *shape, device="meta")
        yield Site(key, stack, is_delta=True, names=tuple(adapters), found=results, seed=seed, factors=factors)


# --- the result's configuration -----------------------------------------------------------------------


def _common(adapters: Adapters) -> str:
    """The adapters' dtype, or float32 where they have several."""
    dtypes = {dtype for adapter in adapters.values() for dtype in adapter.dtypes}
    return dtypes.pop() if len(dtypes) == 1 and all(DTYPES[d].itemsize > 1 for d in dtypes) else "float32"


def _base(recipe: AdapterRecipe, adapters: Adapters) -> str | None:
    named = (adapter.config.get("base_model_name_or_path") for adapter in adapters.values())
    return recipe.base or next(filter(None, named), None)


def _config(
    recipe: AdapterRecipe, adapters: Adapters, ranks: Mapping[str, int], method: Method, modules: Mapping[str, Module]
) -> dict[str, Any]:
    first = next(iter(adapters.values()))
    like = {**first.config, "base_model_name_or_path": _base(recipe, adapters)}
    like["bias"] = next((b for a in adapters.values() if (b := a.config.get("bias", "none")) != "none"), "none")
    kept = isinstance(method, Averaged) and method.space == "factors"
    scale = {name: module.scale for name, module in first.modules.items()} if kept else None
    saved = {name for adapter in adapters.values() for name in adapter.config.get("modules_to_save") or ()}
    return config_of(ranks, like, modules=modules, targets=_targets(adapters), saved=saved, scale=scale)


def _targets(adapters: Adapters) -> Any:
    """target_modules of the adapters where they say the same and mean the same modules; else None: full names."""
    (first, *others) = adapters.values()
    fields: Iterable[str] = ("target_modules", *TARGETING)

    def said(adapter: Adapter) -> list[Any]:
        return [sorted(v) if isinstance(v := adapter.config.get(f), list) else v for f in fields]

    equal = all(said(other) == said(first) and other.modules.keys() == first.modules.keys() for other in others)
    return first.config.get("target_modules") if equal else None
