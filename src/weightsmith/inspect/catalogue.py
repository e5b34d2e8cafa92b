"""The registered methods in words: grouped by purpose, and each with what it declares about itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith.report.units import roughly

if TYPE_CHECKING:
    from weightsmith.core.method import Stage

__all__ = [
    "LEARNED", "PURPOSES", "by_purpose", "cost_at_7b", "describe", "describe_pipeline", "describe_preset", "explain",
    "facts", "listing",
]  # fmt: skip

PURPOSES: Mapping[str, tuple[str, ...]] = {
    "Average models": ("linear", "soup", "mwa", "codiemb", "model_stock", "karcher", "multislerp"),
    "Add the changes of fine-tunes to their base": ("task_arithmetic",),
    "Add changes that contradict each other, entry by entry": (
        "ties", "pcb", "sce", "widen", "ram", "ramplus_tl", "magmax", "emr",
    ),
    "Add changes that contradict each other, matrix by matrix": (
        "tsvm", "r_tsvm", "iso_c", "iso_cts", "opcm", "knots", "swudi", "aswudi", "wudi", "optmerge", "doge",
    ),
    "Edit the changes before a method (or after it: lines, consensus)": (
        "scale", "agree", "dare", "della", "magnitude", "breadcrumbs", "lines", "consensus", "ffg",
    ),
    "Go from one model towards another": ("slerp", "nuslerp", "nearswap", "arcee_fusion"),
    'Merge with statistics of data ("weightsmith observe")': ("regmean", "fisher", "ota"),
    "Merge networks that were trained apart": ("weight_matching",),
    "Take tensors as they are, in rules and slices": ("keep", "passthrough"),
    'Keep every expert, in less space ("weightsmith compress")': (
        "exact", "tall_masks", "emr_masks", "bitdelta", "randes", "mbat", "tsvc", "twin", "rmm", "fwsvd",
        "losparse",
    ),
}  # fmt: skip
"""Purpose -> methods, the simplest first.  Another method is listed last under its own `purpose`, or under OTHERS."""

OTHERS = "Others"

LEARNED = 'Learn the numbers of a recipe from data ("weightsmith tune")'

GRAINS = {
    "element": "any block of rows (models of any size in bounded memory)",
    "tensor": "one whole tensor at a time",
    "group": "several whole tensors that belong together",
}


def by_purpose(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Purpose -> descriptions, in the order of `PURPOSES`; purposes without a method are left out."""
    known = {one["name"]: one for one in found}
    groups = {purpose: [known.pop(n) for n in names if n in known] for purpose, names in PURPOSES.items()}
    for one in known.values():
        groups.setdefault(one["purpose"], []).append(one)
    return {purpose: members for purpose, members in groups.items() if members}


def describe(cls: type[Stage]) -> dict[str, Any]:
    """Everything a stage declares about itself, as plain values."""
    from weightsmith.core.checks import Count
    from weightsmith.core.method import Codec, Filter
    from weightsmith.plan.cost import seconds_at_7b
    from weightsmith.plan.costs import costs_of

    traits, stage = cls.traits, cls()
    count = next((check for check in traits.checks if isinstance(check, Count)), Count())
    other = stage.elsewhere()
    text = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": traits.name,
        "aliases": list(traits.aliases),
        "kind": "filter" if issubclass(cls, Filter) else "codec" if issubclass(cls, Codec) else "method",
        "purpose": next(
            (purpose for purpose, names in PURPOSES.items() if traits.name in names), cls.purpose or OTHERS
        ),
        "summary": text.split("\n")[0],
        "text": text,
        "paper": traits.paper,
        "needs": list(traits.needs),
        "grain": stage.grain.value,
        "min_models": count.low,
        "max_models": count.high,
        "otherwise": other.name if other is not None else "",
        "seconds_per_billion": costs_of(cls).seconds,
        "seconds_at_7b": seconds_at_7b(cls),
        "parameters": [
            {"name": p.name, "default": p.default, "range": p.range, "per_model": p.each, "meaning": p.help}
            for p in cls.parameters()
        ],
    }


def describe_pipeline(name: str) -> dict[str, Any]:
    """What a name such as dare_ties stands for."""
    from weightsmith.core.method import registry
    from weightsmith.recipe.aliases import PIPELINES, spelled

    stages = [describe(registry(stage)) for stage, _ in PIPELINES[name]]
    return {"name": name, "kind": "pipeline", "method": spelled(name), "stages": stages}


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a method needs and costs, as pairs of a label and its words."""
    needs = ["a base model" if n == "base" else f"the statistic {n!r} (weightsmith observe)" for n in found["needs"]]
    low, top = found["min_models"], found["max_models"]
    said = [
        ("paper", found["paper"] or "-"),
        ("needs", ", ".join(needs) or "nothing but the models"),
        ("models", f"{low}" if top == low else f"{low} to {top}" if top else f"{low} or more"),
        ("sees", GRAINS[found["grain"]]),
    ]
    if found["seconds_at_7b"] is not None:
        said.append(("at 7B", f"about {cost_at_7b(found)}"))
    if found["otherwise"]:
        said.append(("elsewhere", f"tensors it does not cover are merged by {found['otherwise']}"))
    return said


def cost_at_7b(found: Mapping[str, Any]) -> str:
    """What a method costs on models of 7e9 parameters, in words."""
    return f"{roughly(found['seconds_at_7b'])} per model, on one core of a server (AMD EPYC; default parameters)"


def describe_preset(
    name: str, summary: str, text: str = "", options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a way to learn numbers is, as `describe` says it of a method."""
    return {"name": name, "kind": "preset", "purpose": LEARNED, "summary": summary} | (
        {"text": text, "options": dict(options)} if options is not None else {}
    )


def listing(every: Sequence[Mapping[str, Any]]) -> str:
    """All methods and presets, a line each, under their purposes."""
    from weightsmith.recipe.aliases import PIPELINES

    width = max(len(one["name"]) for one in every)
    lines = []
    for purpose, members in by_purpose(every).items():
        lines += [purpose, *(f"  {one['name']:<{width}}  {one['summary']}" for one in members), ""]
    lines += [f"Names of pipelines: {', '.join(PIPELINES)}.", ""]
    lines.append('"weightsmith methods NAME" explains one and lists its parameters.')
    return "\n".join([*lines, "A method of your own is one Python file: --plugin FILE; docs/howto/plugin.md."])


def explain(found: Mapping[str, Any]) -> str:
    """What a method or a pipeline is, in words; the parameters are a table of their own."""
    if found["kind"] == "preset":
        options = [f"{name + ':':<17}{default!r}" for name, default in found["options"].items()]
        return "\n".join([
            f"{found['name']} (preset of \"weightsmith tune\")", "", found["text"], "", "options, with their defaults:",
            *options, "", f"In TUNE.yaml: preset: {found['name']}, or preset: {{{found['name']}: {{OPTION: VALUE}}}}.",
        ])  # fmt: skip
    if found["kind"] == "pipeline":
        return "\n".join([
            f"{found['name']} (name of a pipeline)", "", f"method: {found['method']}", "",
            *(f"{stage['name'] + ':':<17}{stage['summary']}" for stage in found["stages"]), "",
            f"A parameter written inside goes to the first stage that has it: {{{found['name']}: {{density: 0.5}}}}.",
            'For all that a mergekit config means by this name (rescaling, tied signs): "weightsmith convert CONFIG".',
        ])  # fmt: skip
    also = f", also called {', '.join(found['aliases'])}" if found["aliases"] else ""
    said = [f"{label + ':':<11}{text}" for label, text in facts(found)]
    return "\n".join([f"{found['name']} ({found['kind']}{also})", "", found["text"], "", *said, ""])
