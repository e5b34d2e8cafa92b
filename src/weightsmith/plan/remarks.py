"""What the user should know of the inputs that a plan is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from weightsmith.core.checks import Case, small_changes
from weightsmith.core.lazy import is_a
from weightsmith.core.method import Stage
from weightsmith.core.problem import Code, Problem, told
from weightsmith.core.task import Task
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import Source, quick_rows
from weightsmith.plan.lengths import lengths

__all__ = [
    "foreign_statistics", "heads_apart", "large_changes", "twins", "what_inputs_say", "what_models_say",
    "what_was_found",
]  # fmt: skip


def what_inputs_say(inputs: Inputs) -> Iterator[Problem]:
    """Warnings: no config.json to lend, heads that are untied, entries of pickles that are no tensors, adapters
    that are unlike."""
    adapters = {n: s for n, s in inputs.experts.items() if is_a(s, "io.read.peft", "AdapterSource")}
    yield from told(Code.ADAPTER, list(_unlike_adapters(adapters)))
    for i, (name, source) in enumerate(inputs.models):
        if i == 0 and source.origin.lacks:
            yield Problem(Code.SOURCE, name, f"{name} {source.origin.lacks}")
        yield from (Problem(Code.SOURCE, name, f"{name}: {remark}") for remark in source.origin.remarks)


def _unlike_adapters(adapters: Mapping[str, Any]) -> Iterator[str]:
    """Adapters that leave alone what others change, or that say they were trained on unlike models."""
    changed = {name: dict.fromkeys(source.changed) for name, source in adapters.items()}
    every = list(dict.fromkeys(tensor for own in changed.values() for tensor in own))
    for name, own in changed.items():
        if lacking := [tensor for tensor in every if tensor not in own]:
            yield (
                f"{name} does not change {len(lacking)} of {len(every)} tensors that other adapters change "
                f"({lacking[0]}): its task vector is zero there"
            )
    bases = {name: source.trained_on for name, source in adapters.items() if source.trained_on}
    if len(set(bases.values())) > 1:
        yield (
            f"adapters name unlike base models ({', '.join(f'{n}: {b}' for n, b in bases.items())}); all are put on "
            "the one given here"
        )


def foreign_statistics(inputs: Inputs) -> tuple[list[Problem], list[Problem]]:
    """Problems: statistics of another model of the recipe.  Warnings: of other files than the model's.

    `observe` notes which files it has looked at; those are compared by size, header and samples.
    """
    models = {name: files for name, source in inputs.models if (files := _files(source.fingerprint()))}
    problems, warnings = [], []
    for stat, by_model in inputs.stats.items():
        for name, source in by_model.items():
            noted = source.origin.metadata.get("fingerprint") if source.origin.metadata else None
            seen, own = _files(noted), models.get(name)
            if not seen or own is None or seen == own:
                continue
            said = f"{name}: the statistic {stat!r} in {source.origin.label} was taken of"
            if other := next((n for n, files in models.items() if files == seen), ""):
                problems.append(Problem(Code.STATISTIC, name, f"{said} {other}, not of {name}; give {name} its own"))
            else:
                text = f"{said} other files than {name}'s: right only if they hold the same weights in another form"
                warnings.append(Problem(Code.STATISTIC, name, text))
    return problems, warnings


def _files(fingerprint: Any) -> list[tuple[Any, ...]]:
    """(size, header, sample) of each file; [] where there is more to it than files (views, adapters), or less."""
    while isinstance(fingerprint, Mapping) and "files" not in fingerprint and "source" in fingerprint:
        fingerprint = fingerprint["source"]
    files = fingerprint.get("files") if isinstance(fingerprint, Mapping) else None
    if not isinstance(files, Mapping) or not all(isinstance(f, Mapping) and "sample" in f for f in files.values()):
        return []
    return sorted((file.get("size"), file.get("header", ""), file["sample"]) for file in files.values())


def what_was_found(tasks: Iterable[Task], records: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    """What the stages of a finished run say about it; records: task id -> what `engine.execute` returned."""
    tasks = list(tasks)
    told: dict[type[Stage], tuple[Stage, dict[str, dict[str, float]]]] = {}
    for task in tasks:
        found = records[task.id].get("told", {})
        for stage in task.pipeline.stages if task.pipeline is not None and found else ():
            _, by_tensor = told.setdefault(type(stage), (stage, {}))
            so_far = by_tensor.setdefault(task.key.name, {})
            so_far |= {what: max(figure, so_far.get(what, figure)) for what, figure in found.items()}
    for stage, by_tensor in told.values():
        if factors := [found[f"auto.{stage.name}"] for found in by_tensor.values() if f"auto.{stage.name}" in found]:
            low, high = (f"{end:.3g}" for end in (min(factors), max(factors)))
            text = low if low == high else f"{low} to {high}, tensor by tensor"
            yield Problem(Code.AUTO, stage.name, f"{stage.name}: auto came to {text}")
        yield from (Problem(Code.FOUND, stage.name, f"{stage.name}: {text}") for text in stage.says(by_tensor, names))
    yield from (text for one in lengths(tasks, records) for text in one.advice("is"))


def what_models_say(
    tasks: Iterable[Task], inputs: Inputs, fingerprints: Mapping[str, Mapping[str, Any]]
) -> Iterator[Problem]:
    """What a look at the weights themselves tells before a run; fingerprints: see `Inputs.fingerprints`."""
    yield from twins({name: fingerprints[name] for name, _ in inputs.models if name in fingerprints})
    tasks = list(tasks)
    yield from large_changes(tasks, inputs)
    yield from heads_apart(tasks, inputs)


TENSORS, ENTRIES = 8, 1 << 14
"""How many tensors, and about how many entries of each, a sample of a model is made of."""


def large_changes(tasks: Iterable[Task], inputs: Inputs) -> Iterator[Problem]:
    """A line for every expert that has changed too much for a stage of the plan, as a sample of its weights says."""
    stages = {task.key.name: stage for task in tasks if task.pipeline is not None
              for stage in task.pipeline.stages if small_changes in stage.traits.checks}  # fmt: skip
    names = list(stages)[:: -(-len(stages) // TENSORS) or 1]
    if inputs.base is None:
        return
    for expert, source in inputs.experts.items() if names else ():
        pairs = [_sampled(name, inputs.base, source) for name in names]
        base, delta = (np.concatenate([[], *(np.abs(pair[i]) for pair in pairs if pair is not None)]) for i in (0, 1))
        if not len(base):
            continue
        ratio, quantile = float(delta.mean() / max(base.mean(), 1e-30)), float(np.quantile(delta, 0.99))
        stage = stages[names[0]]
        for _, text, _ in small_changes(stage, Case(1, change=(ratio, quantile))):
            yield Problem(Code.CHANGE, expert, f"{expert} has changed much for {stage.name}: {text}")


APART = 0.5
"""Cosine of two heads below which they are said not to have begun as one.  Chosen."""


def heads_apart(tasks: Iterable[Task], inputs: Inputs) -> Iterator[Problem]:
    """A line for every classifier that is merged without a base and whose head did not begin as the first one's."""
    if inputs.base is not None or len(inputs.experts) < 2:
        return
    names = [task.key.name for task in tasks if task.pipeline is not None]
    heads = [n for n in names if n.split(".")[0] in ("classifier", "score") and n.endswith(".weight")]
    (first, one), *others = inputs.experts.items()
    for name, source in others if heads else ():
        pair = _sampled(heads[-1], one, source)
        if pair is None:
            continue
        a, b = pair[0].ravel().astype(np.float64), (pair[0] + pair[1]).ravel().astype(np.float64)
        if a @ b < APART * np.linalg.norm(a) * np.linalg.norm(b):
            text = (
                f"{heads[-1]} of {name} did not begin as that of {first}: the mean of heads that were trained apart "
                "seldom works; merge models that were trained from one head, or train the merged model's head again"
            )
            yield Problem(Code.CHANGE, name, text)


def _sampled(name: str, base: Source, expert: Source) -> tuple[np.ndarray, np.ndarray] | None:
    """(base, delta) of rows from the middle of a tensor; None where that takes more than reading them."""
    key = base.key(name)
    if not (base.quick(name) and expert.quick(name)):
        return None
    rows = min(key.rows, max(1, ENTRIES // max(key.row_numel, 1)))
    start = (key.rows - rows) // 2
    old, new = (quick_rows(source, name, start, start + rows) for source in (base, expert))
    return old, new - old


def twins(fingerprints: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """A warning for every model that, as far as size, header and samples of its files say, is another one of them.

    A task vector of zeros is no error, but it draws means, norms and softmaxes towards the base.
    """
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    for name, found in fingerprints.items():
        files = found.get("files", {}).values()
        if not files or not all("sample" in file for file in files):
            continue
        known = tuple(sorted((file["size"], file.get("header", ""), file["sample"]) for file in files))
        other = first.setdefault(known, name)
        if other == name:
            continue
        what = "its task vector is zero" if other == "base" else "the two count twice"
        text = f"{name} seems to hold the weights of {other} (size, header and samples of its files agree): {what}"
        yield Problem(Code.TWIN, name, text)
