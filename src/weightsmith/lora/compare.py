"""Whether adapters belong together, and how they are weighted: known before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.io.read.lora import Adapter
from weightsmith.io.read.trainer import logged, step_of
from weightsmith.lora.rules import Averaged, Combine, SharedBasis
from weightsmith.ops.combine import spread

__all__ = ["Adapters", "Method", "combinable", "differences", "modules_of", "other_bases", "twice", "weighted"]

Method = Combine | SharedBasis | Averaged
Adapters = Mapping[str, Adapter]


def combinable(adapter: Adapter) -> Adapter:
    """The adapter, whose changes must be products of two factors."""
    for module in adapter.modules.values():
        field = "use_dora" if module.magnitude is not None else "lora_bias" if module.bias is not None else ""
        if field:
            raise SourceError(
                f"{adapter.label}: {field} is not a product of two factors, so it cannot be combined exactly; merge "
                'it into its base with "weightsmith merge" and get a LoRA back with "weightsmith lora extract"'
            )
    if not adapter.modules:
        raise SourceError(f"{adapter.label}: no lora_A and lora_B in it")
    return adapter


def other_bases(adapters: Adapters, *, force: bool) -> list[str]:
    """A note where adapters name several revisions of their base; PlanError where they name several bases."""
    named = {name: (adapter.config.get("base_model_name_or_path"), adapter.config.get("revision"))
             for name, adapter in adapters.items()}  # fmt: skip
    known = [(name, base, revision) for name, (base, revision) in named.items() if base]
    if not known or force:
        return []
    one, first, revision = known[0]
    for two, second, other in known[1:]:
        if second != first:
            raise PlanError([
                f"{one} is for the base {first!r}, {two} for {second!r}; if these are the same model, pass --force "
                "(force=True)"
            ])  # fmt: skip
        if revision and other and revision != other:
            return [f"{one} is for revision {revision} of {first}, {two} for {other}: they may be different models"]
    return []


def twice(adapters: Adapters, method: Method) -> list[str]:
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


def weighted(method: Method, adapters: Adapters) -> tuple[Method, tuple[float, ...]]:
    """The weight of each adapter; those of an average from what was logged."""
    count = len(adapters)
    if isinstance(method, SharedBasis):
        return method, spread(1.0 if isinstance(method.scaling, str) else method.scaling, count)
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


def modules_of(adapters: Adapters, method: Method) -> list[str]:
    """All modules, in the adapters' order; the same module must be of one form in all of them."""
    kinds = {adapter.kind: label for label, adapter in adapters.items()}
    if len(kinds) > 1:
        (one, first), (two, second), *_ = kinds.items()
        raise PlanError([
            f"{first} is a LoRA of {one}, {second} of {two}, whose names for modules differ; convert one of them, or "
            'merge both into their base with "weightsmith merge"'
        ])  # fmt: skip
    names = list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.modules))
    problems = []
    for name in names:
        who = [(label, adapter.modules[name]) for label, adapter in adapters.items() if name in adapter.modules]
        one, first_module = who[0]
        for two, other in who[1:]:
            if other.form != first_module.form:
                problems.append(
                    f"{name}: {one} changes a weight of {list(first_module.update.shape)}, {two} one of "
                    f"{list(other.update.shape)}; these are not for one base"
                )
            elif _side_by_side(method) and other.rank != first_module.rank:
                problems.append(
                    f"{name}: rank {first_module.rank} in {one} and {other.rank} in {two}; {method.name} adds the "
                    "factors up and needs equal ranks: use cat or svd"
                    + (", or space: product" * isinstance(method, Averaged))
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


def differences(adapters: Adapters, modules: Sequence[str], method: Method) -> list[str]:
    """How the adapters differ: an error for an average of one run, else a note."""
    notes = [f"{label}: {text}" for label, adapter in adapters.items() for text in adapter.says]
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
