"""SVG as a task for language models: editing, understanding, generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.language import Language, language
from weightsmith.study.evaluators.lines import rows, texts
from weightsmith.study.evaluators.specs import Svg
from weightsmith.study.evaluators.subject import Subject
from weightsmith.study.evaluators.text_tasks import right_of
from weightsmith.study.svg.render import mse, render
from weightsmith.study.svg.scenes import INVARIANT, OPERATIONS, Case, caption, edit, moved, question
from weightsmith.study.svg.score import edited, generated, letter_of, lettered

__all__ = ["svg"]

_FORM = "{svg}\n{instruction}\n"
_STOP = ("</svg>\n", "\n\n")


def svg(subject: Subject, spec: Svg) -> Found:
    """The cases of the spec: seeded ones, or those of a file."""
    cases = _cases(spec, subject.setting.limit)
    model = language(subject)
    return {"edit": _edit, "understand": _understand, "generate": _generate}[spec.task](model, spec, cases)


def _cases(spec: Svg, limit: int | None) -> list[Case]:
    if spec.file is not None:
        return rows(Path(spec.file), limit, lambda item: _case(item, spec.task))
    count = min(spec.count, limit or spec.count)
    if spec.task == "edit":
        names = spec.operations or tuple(OPERATIONS)
        return [edit(spec.seed, at, names[at % len(names)]) for at in range(count)]
    make = question if spec.task == "understand" else caption
    return [make(spec.seed, at) for at in range(count)]


def _case(item: Mapping[str, Any], task: str) -> Case:
    if task == "generate":
        raise ValueError("generation is scored on seeded captions only: leave file out")
    offered = tuple(map(str, item["choices"])) if task == "understand" else ()
    answer = offered[right_of(item["answer"], offered)] if offered else texts(item, "answer")
    return Case(
        texts(item, "svg"), texts(item, "instruction", "question"), answer, str(item.get("task", task)), offered
    )


def _edit(model: Language, spec: Svg, cases: list[Case]) -> Found:
    prompts = [_FORM.format(svg=case.svg, instruction=case.instruction) for case in cases]
    written, notes = model.written(prompts, spec.max_new_tokens, _STOP)
    found = [edited(case, _closed(text), spec.render) for case, text in zip(cases, written, strict=True)]
    still = [mse(_drawn(case.svg, spec), _drawn(case.answer, spec)) for case in cases]
    short = [
        one.compression for one, case in zip(found, cases, strict=True) if case.operation == "compression" and one.valid
    ]
    more = {"compression": sum(short) / len(short)} if short else {}
    by_kind: dict[str, list[float]] = {}
    for one, case in zip(found, cases, strict=True):
        by_kind.setdefault(f"one_minus_mse,{case.operation}", []).append(1 - one.mse)
    if odd := sum(one.unsupported > 0 for one in found):
        notes = {**notes, "answers with parts that are not drawn": odd}
    return of_examples(
        {
            "one_minus_mse": [1 - one.mse for one in found],
            "mse": [one.mse for one in found],
            "validity": [float(one.valid) for one in found],
            "unchanged": [float(one.unchanged) for one in found],
            "do_nothing": [1 - error for error in still],
            "tokens": model.lengths(written),
        },
        notes,
        **more,
        **{name: sum(values) / len(values) for name, values in by_kind.items()},
    )


def _drawn(text: str, spec: Svg) -> Any:
    from weightsmith.study.svg.parse import Refused

    try:
        return render(text, spec.render).pixels
    except Refused as error:
        raise SourceError(f"{spec.file}: an SVG of it cannot be read: {error}") from None


def _closed(text: str) -> str:
    """The stop takes the closing tag away."""
    return text if "</svg>" in text or "<svg" not in text else text + "</svg>"


def _understand(model: Language, spec: Svg, cases: list[Case]) -> Found:
    """By letter and by likelihood; consistency: answered alike after the picture was moved or turned a little."""
    answers = {name: _chosen(model, cases, change) for name, change in {"": "", **INVARIANT}.items()}
    right = [case.choices.index(case.answer) for case in cases]
    prompts = [_asked(case, case.svg) + "\n" + lettered(case.choices) + "\nAnswer:" for case in cases]
    written, notes = model.written(prompts, 8, ("\n",))
    letters = [letter_of(text, len(case.choices)) for text, case in zip(written, cases, strict=True)]
    alike = [
        sum(answers[name][at] == answers[""][at] for name in INVARIANT) / len(INVARIANT) for at in range(len(cases))
    ]
    return of_examples(
        {
            "likelihood_acc": [float(a == b) for a, b in zip(answers[""], right, strict=True)],
            "letter_acc": [float(a == b) for a, b in zip(letters, right, strict=True)],
            "consistency": alike,
        },
        notes,
    )


def _asked(case: Case, picture: str) -> str:
    return _FORM.format(svg=picture, instruction=case.instruction)


def _chosen(model: Language, cases: list[Case], change: str) -> list[int]:
    pairs = [
        (_asked(case, moved(case.svg, change) if change else case.svg) + "Answer:", " " + one)
        for case in cases
        for one in case.choices
    ]
    found, _ = model.targets(pairs)
    chosen, at = [], 0
    for case in cases:
        mine = [one.log_likelihood for one in found[at : at + len(case.choices)]]
        chosen.append(mine.index(max(mine)))
        at += len(case.choices)
    return chosen


def _generate(model: Language, spec: Svg, cases: list[Case]) -> Found:
    written, notes = model.written([case.instruction + "\n" for case in cases], spec.max_new_tokens, _STOP)
    found = [generated(case, _closed(text)) for case, text in zip(cases, written, strict=True)]
    return of_examples(
        {
            "rules": [one.rules for one in found],
            "validity": [float(one.valid) for one in found],
            "elements": [float(one.elements) for one in found],
            "commands": [float(one.commands) for one in found],
            "bytes": [float(one.bytes) for one in found],
            "tokens": model.lengths(written),
        },
        notes,
    )
