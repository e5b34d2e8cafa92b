"""Several LoRA adapters into one, module by module: never more than one module's factors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch
from weightsmith.core.site import Site
from weightsmith.engine.execute import fold
from weightsmith.io.read.lora import TARGETING, Adapter, config_of
from weightsmith.io.read.trainer import logged, step_of
from weightsmith.lora.recipe import AdapterRecipe, built, method_of
from weightsmith.lora.rules import Averaged, Combine, Made, Part, SharedBasis
from weightsmith.lora.write import Description, Writer, Written
from weightsmith.ops.combine import spread, weighted_sum
from weightsmith.recipe.reader import Document

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merge", "run"]

Method = Combine | SharedBasis | Averaged
Adapters = Mapping[str, Adapter]


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
    return run(built(Document("lora.merge", tree), tree), out, force=force, overwrite=overwrite)


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
    adapters = {name: Adapter(ref.model) for name, ref in recipe.models.items()}
    notes = [] if force else _refuse_other_bases(adapters)
    if isinstance(method, Combine) and len(adapters) == 1 and method.kind != "linear":
        if method.kind != "cat":  # whose product is that of linear
            notes.append(f"one adapter: {method.kind} is then linear, as in peft; lora resize lowers the rank of one")
        method = Combine("linear", weight=method.weight, saved=method.saved)
    notes += _twice(adapters, method)
    method, weights = _weighted(method, adapters)
    modules = _modules(adapters, method)
    notes += _fit(adapters, modules, method)
    dtype = recipe.output.dtype or _common(adapters)
    folders = [adapter.path for adapter in adapters.values()]
    with Writer(Path(out), folders, overwrite=overwrite) as writer:
        for done, (module, made) in enumerate(_made(adapters, modules, method, weights, recipe.seed)):
            first = next(a.modules[module] for a in adapters.values() if module in a.modules)
            writer.add(
                module,
                made.factors,
                made.wanted,
                dtype=dtype,
                energy=made.energy,
                how=method.describe(),
                embedding=first.embedding,
                shapes=(first.b_shape[2:], first.a_shape[1:]),
            )
            if progress:
                progress(done + 1, len(modules))
        whole, more = _whole(adapters, weights, method)
        for name, (value, how) in whole.items():
            stored = next(adapter.whole[name] for adapter in adapters.values() if name in adapter.whole)
            writer.add_whole(stored, value, recipe.output.dtype or str(value.dtype).removeprefix("torch."), how)
        config = _config(recipe, adapters, writer.ranks, method, _limit(adapters, method))
        about = Description(
            made=recipe.model_dump(mode="json", exclude_defaults=True),
            inputs={name: adapter.fingerprint() for name, adapter in adapters.items()},
            folders={name: adapter.path for name, adapter in adapters.items()},
            how=f"LoRA adapters combined by {method.describe()}.",
            command="weightsmith lora merge recipe.yaml OUT",
            base=config["base_model_name_or_path"],
        )
        return writer.finish(
            config, about, saved=tuple(whole), warnings=(*notes, *more),
            weights=dict(zip(adapters, weights, strict=True)),
        )  # fmt: skip


# --- before anything is computed --------------------------------------------------------------------


def _refuse_other_bases(adapters: Adapters) -> list[str]:
    bases = {name: adapter.config.get("base_model_name_or_path") for name, adapter in adapters.items()}
    known = {name: base for name, base in bases.items() if base}
    if len(set(known.values())) > 1:
        (one, first), *rest = known.items()
        two, second = next((n, b) for n, b in rest if b != first)
        raise PlanError([
            f"{one} is for the base {first!r}, {two} for {second!r}; if these are the same model, pass --force "
            "(force=True)"
        ])  # fmt: skip
    return []


def _twice(adapters: Adapters, method: Method) -> list[str]:
    """Folders that are listed twice: an error for an average of one run, else a note."""
    first: dict[Path, str] = {}
    notes = []
    for name, adapter in adapters.items():
        other = first.setdefault(adapter.path.resolve(), name)
        if other != name and isinstance(method, Averaged):
            raise PlanError([f"{name} is the same checkpoint as {other} ({adapter.label}); leave one out"])
        if other != name:
            notes.append(f"{name} is the same adapter as {other}: the two count twice")
    return notes


def _weighted(method: Method, adapters: Adapters) -> tuple[Method, tuple[float, ...]]:
    """The weight of each adapter; those of an average from what was logged."""
    count = len(adapters)
    if isinstance(method, SharedBasis):
        return method, spread(method.scaling, count)
    if isinstance(method, Combine):
        return method, spread(method.weight, count)
    values = _values(method, adapters)
    if problem := method.problem(values):
        raise PlanError([f"{problem} (values: {', '.join(f'{v:g}' for v in values)})"])
    return replace(method, value=tuple(values)), method.weights(values)


def _values(method: Averaged, adapters: Adapters) -> list[float]:
    given = method.value if isinstance(method.value, tuple) else (method.value,) * len(adapters)
    if not method.penalty and method.value == "log":
        return [1.0] * len(adapters)  # an even average needs no log
    found: list[float] = []
    for value, adapter in zip(given, adapters.values(), strict=True):
        if value != "log":
            found.append(float(value))
        elif method.metric == "steps":
            found.append(float(step_of(adapter.path)))
        else:
            found.append(logged(adapter.path, *_wanted(method, adapter, adapters)))
    return found


def _wanted(method: Averaged, adapter: Adapter, adapters: Adapters) -> tuple[str, int | None]:
    """Which logged value, and after which step."""
    what = "eval_loss" if method.source == "eval" else "loss"
    if method.smooth == "nearest":
        return what, None
    here = step_of(adapter.path)
    return what, max((step for other in adapters.values() if (step := step_of(other.path)) < here), default=0)


def _modules(adapters: Adapters, method: Method) -> list[str]:
    """All modules, in the adapters' order; the same module must be of one form in all of them."""
    names = list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.modules))
    problems = []
    for name in names:
        who = [(label, adapter.modules[name]) for label, adapter in adapters.items() if name in adapter.modules]
        one, first = who[0]
        for two, other in who[1:]:
            if other.form != first.form:
                problems.append(
                    f"{name}: {one} has factors {list(first.b_shape)} and {list(first.a_shape)}, {two} has "
                    f"{list(other.b_shape)} and {list(other.a_shape)}; these are not for one base"
                )
            elif _side_by_side(method) and other.rank != first.rank:
                problems.append(
                    f"{name}: rank {first.rank} in {one} and {other.rank} in {two}; {method.name} adds the factors up "
                    "and needs equal ranks: use cat or svd" + (", or space: product" * isinstance(method, Averaged))
                )
    turned = {label: bool(adapter.config.get("fan_in_fan_out")) for label, adapter in adapters.items()}
    if len(set(turned.values())) > 1:
        problems.append(f"fan_in_fan_out differs ({turned}); these are not for one base")
    if problems:
        shown = problems[:5] + ([f"and {len(problems) - 5} more of this kind"] if len(problems) > 5 else [])
        raise PlanError(shown)
    return names


def _side_by_side(method: Method) -> bool:
    """Whether factors are added to factors: their ranks must then be equal."""
    if isinstance(method, Averaged):
        return method.space == "factors"
    return isinstance(method, Combine) and method.rule.on == "factors"


def _fit(adapters: Adapters, modules: Sequence[str], method: Method) -> list[str]:
    """What is unlike between the adapters: an error for an average of one run, else a note."""
    notes = []
    for label, adapter in adapters.items():
        lacking = [name for name in modules if name not in adapter.modules]
        if lacking and isinstance(method, Averaged):
            raise PlanError([
                f"{label} adapts {len(adapter.modules)} modules, but lacks {lacking[0]!r}, which another has: not "
                "checkpoints of one run; use cat or svd"
            ])  # fmt: skip
        if lacking:
            notes.append(f"{label} lacks {len(lacking)} of {len(modules)} modules ({lacking[0]}, ...): zero there")
    if not isinstance(method, Averaged) or method.space == "product":
        return notes
    (one, first), *others = adapters.items()
    for two, other in others:
        for name in modules:
            if first.modules[name].scale != other.modules[name].scale:
                raise PlanError([
                    f"{name}: alpha / r is {first.modules[name].scale:g} in {one} and {other.modules[name].scale:g} "
                    f"in {two}: not checkpoints of one run; use space: product"
                ])  # fmt: skip
    if len({adapter.path.resolve().parent for adapter in adapters.values()}) > 1:
        notes.append("the checkpoints lie in different folders: averaged factors mean something within one run only; "
                     "for others use space: product")  # fmt: skip
    return notes


# --- the work ----------------------------------------------------------------------------------------


def _made(
    adapters: Adapters, modules: Sequence[str], method: Method, weights: Sequence[float], seed: int
) -> Iterator[tuple[str, Made]]:
    if isinstance(method, SharedBasis):
        yield from _in_shared_basis(adapters, modules, method, seed)
        return
    limit = _limit(adapters, method)
    for module in modules:
        parts = [
            Part(adapter.factors(module), adapter.modules[module].scale, weight, label)
            for (label, adapter), weight in zip(adapters.items(), weights, strict=True)
            if module in adapter.modules
        ]
        yield module, method.combine(parts, module, seed, limit)


def _limit(adapters: Adapters, method: Method) -> int:
    """The rank that `auto` stands for."""
    return max(adapter.rank for adapter in adapters.values())


def _in_shared_basis(
    adapters: Adapters, modules: Sequence[str], method: SharedBasis, seed: int
) -> Iterator[tuple[str, Made]]:
    """KnOTS: its thresholds are over all modules, so each round reads them all once."""
    summary: Mapping[str, Any] = {}
    for round in range(method.rounds):
        totals = fold(method.measure(_site(adapters, module, summary, seed), round) for module in modules)
        summary = method.digest(totals, round, summary)
    for module in modules:
        yield module, method.combine(_site(adapters, module, summary, seed))


def _site(adapters: Adapters, module: str, summary: Mapping[str, Any], seed: int) -> Site:
    """One module as the engine shows low-rank experts to methods: factors with the scale in them, no full matrix."""
    first = next(adapter for adapter in adapters.values() if module in adapter.modules).factors(module)
    shape = (first.b.shape[0], first.a.shape[1])
    factors = []
    for adapter in adapters.values():
        if module in adapter.modules:
            found = adapter.factors(module)
            factors.append((found.b * adapter.modules[module].scale, found.a))
        else:
            factors.append((torch.zeros(shape[0], 1), torch.zeros(1, shape[1])))
    stack = torch.empty(len(factors), *shape, device="meta")
    key = Key(f"{module}.weight", shape, "float32")
    return Site(key, stack, is_delta=True, names=tuple(adapters), summary=summary, seed=seed, factors=tuple(factors))


def _whole(
    adapters: Adapters, weights: Sequence[float], method: Method
) -> tuple[dict[str, tuple[Tensor, str]], list[str]]:
    """Tensors that adapters keep in full (modules_to_save, trained biases): value and how it was made, by name."""
    found: dict[str, tuple[Tensor, str]] = {}
    notes: list[str] = []
    averaged = isinstance(method, Averaged) or method.saved == "average"
    for name in dict.fromkeys(name for adapter in adapters.values() for name in adapter.whole):
        who = {label: adapter for label, adapter in adapters.items() if name in adapter.whole}
        (label, first), *others = who.items()
        equal = all(_same(first, other, name) for _, other in others)
        if equal:
            found[name] = first.tensor(name), f"copied from {label}"
            if len(who) < len(adapters):
                notes.append(f"{name} is kept in full by {', '.join(who)} alone: copied, whatever the weights")
        elif averaged:
            own = [w for w, label in zip(weights, adapters, strict=True) if label in who]
            found[name] = _mean([adapter.tensor(name) for adapter in who.values()], own, name), "weighted mean"
        else:
            raise PlanError([
                f"{name} is kept in full (modules_to_save or a trained bias) by {', '.join(who)}, differently; set the "
                "parameter saved: average for their weighted mean"
            ])  # fmt: skip
    return found, notes


def _same(one: Adapter, other: Adapter, name: str) -> bool:
    a, b = (adapter.file.bits(adapter.whole[name]) for adapter in (one, other))
    return a.dtype == b.dtype and np.array_equal(a, b)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    total = sum(weights)
    if abs(total) < 1e-8 or len({tuple(t.shape) for t in tensors}) > 1:
        raise SourceError(f"{name}: no mean of tensors whose weights sum to {total:g}, or whose shapes differ")
    stack = torch.stack([t.float() for t in tensors])
    return (weighted_sum(stack, weights) / total).to(tensors[0].dtype)


# --- the result's configuration -----------------------------------------------------------------------


def _common(adapters: Adapters) -> str:
    """The adapters' dtype, or float32 where they have several."""
    dtypes = {dtype for adapter in adapters.values() for dtype in adapter.dtypes}
    return dtypes.pop() if len(dtypes) == 1 and all(DTYPES[d].itemsize > 1 for d in dtypes) else "float32"


def _config(
    recipe: AdapterRecipe, adapters: Adapters, ranks: Mapping[str, int], method: Method, limit: int
) -> dict[str, Any]:
    first = next(iter(adapters.values()))
    like = {**first.config}
    like["base_model_name_or_path"] = recipe.base or next(
        (base for adapter in adapters.values() if (base := adapter.config.get("base_model_name_or_path"))), None
    )
    like["bias"] = next((b for a in adapters.values() if (b := a.config.get("bias", "none")) != "none"), "none")
    kept = isinstance(method, Averaged) and method.space == "factors"
    scale = {name: module.scale for name, module in first.modules.items()} if kept else None
    saved = {name for adapter in adapters.values() for name in adapter.config.get("modules_to_save") or ()}
    return config_of(ranks, like, targets=_targets(adapters), saved=saved, scale=scale)


def _targets(adapters: Adapters) -> Any:
    """target_modules of the adapters where they say the same and mean the same modules; else None: full names."""
    (first, *others) = adapters.values()
    fields: Iterable[str] = ("target_modules", *TARGETING)

    def said(adapter: Adapter) -> list[Any]:
        return [sorted(v) if isinstance(v := adapter.config.get(f), list) else v for f in fields]

    equal = all(said(other) == said(first) and other.modules.keys() == first.modules.keys() for other in others)
    return first.config.get("target_modules") if equal else None
