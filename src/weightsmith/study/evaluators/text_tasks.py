"""Likelihood, multiple choice, bits per byte, and exact match after generation, for causal language models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.language import language
from weightsmith.study.evaluators.lines import rows, texts
from weightsmith.study.evaluators.specs import Bytes, Choices, Generate, Texts
from weightsmith.study.evaluators.subject import Subject

__all__ = ["bits_per_byte", "choices", "generate", "gsm8k_answer", "likelihood", "right_of"]


def likelihood(subject: Subject, spec: Texts) -> Found:
    """Of every target behind its prompt; perplexity and bits per byte are over all tokens together."""
    examples = rows(Path(spec.file), subject.setting.limit, lambda item: (
        spec.prefix + (texts(item, "prompt") if "prompt" in item else ""), texts(item, "target", "text")))  # fmt: skip
    found, cut = language(subject).targets(examples)
    nats, tokens, size = (sum(getattr(one, name) for one in found) for name in ("log_likelihood", "tokens", "bytes"))
    return of_examples(
        {
            "token_accuracy": [one.greedy / one.tokens for one in found],
            "log_likelihood": [one.log_likelihood / one.tokens for one in found],
            "exact": [float(one.greedy == one.tokens) for one in found],
        },
        {"prompts cut": cut} if cut else {},
        perplexity=math.exp(min(-nats / tokens, 700)),
        bits_per_byte=-nats / math.log(2) / max(size, 1),
    )


def choices(subject: Subject, spec: Choices) -> Found:
    """acc: the likeliest choice is right; acc_norm: the likeliest per byte of its text.  Equal ones: the first.

    A choice that stands twice is right wherever it stands.
    """
    items = rows(Path(spec.file), subject.setting.limit, _choice)
    pairs = [(spec.prefix + question, spec.joint + one) for question, offered, _ in items for one in offered]
    found, cut = language(subject).targets(pairs)
    plain, normed, at = [], [], 0
    for _, offered, right in items:
        mine = found[at : at + len(offered)]
        at += len(offered)
        sums = [one.log_likelihood for one in mine]
        shares = [total / max(len(text.encode()), 1) for total, text in zip(sums, offered, strict=True)]
        plain.append(float(offered[sums.index(max(sums))] == offered[right]))
        normed.append(float(offered[shares.index(max(shares))] == offered[right]))
    return of_examples({"acc": plain, "acc_norm": normed}, {"prompts cut": cut} if cut else {})


def _choice(item: Mapping[str, Any]) -> tuple[str, list[str], int]:
    offered = item["choices"]
    if not isinstance(offered, list) or len(offered) < 2 or not all(isinstance(one, str) for one in offered):
        raise ValueError("choices should be a list of two texts or more")
    return texts(item, "question", "prompt"), offered, right_of(item["answer"], offered)


def right_of(answer: Any, offered: Sequence[str]) -> int:
    """The index of the right choice, given as index, letter or text; ValueError where it is none."""
    if isinstance(answer, str) and answer in offered:
        return offered.index(answer)
    letter = answer.strip().upper() if isinstance(answer, str) else ""
    at = ord(letter) - ord("A") if len(letter) == 1 and letter.isalpha() else answer
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(offered):
        raise ValueError(
            f"answer {answer!r} is none of the {len(offered)} choices: give an index, a letter or the text"
        )
    return at


def bits_per_byte(subject: Subject, spec: Bytes) -> Found:
    """Of a text in windows of 512 tokens, see `observe.check.perplexity`; a limit counts windows."""
    from weightsmith.observe.check import perplexity

    try:
        text = system.read_file(Path(spec.file)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{spec.file}: not readable as UTF-8 text ({error})") from None
    if subject.setting.limit is not None:
        text = text[: 512 * subject.setting.limit]
    figures = perplexity(subject.loaded("causal-lm"), text)
    return Found({name: figures[name] for name in ("bits_per_byte", "perplexity")})


# --- generation --------------------------------------------------------------------------------------


_STRICT = re.compile(r"####\s*(-?[0-9][0-9.,]*)")
_LOOSE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k_answer(text: str, flexible: bool = False) -> str | None:
    """The number that an answer gives: behind '####', or, `flexible`, the last number anywhere; None without one.

    Commas, dollar signs and a last full stop do not count.
    """
    found = _LOOSE.findall(text) if flexible else _STRICT.findall(text)
    plain = [number for one in found if (number := re.sub(r"[$,]", "", one).rstrip(".")) and re.search(r"\d", number)]
    return (plain[-1] if flexible else plain[0]) if plain else None


def generate(subject: Subject, spec: Generate) -> Found:
    """Greedy answers against the right ones, by the spec's rule."""

    def one(item: Mapping[str, Any]) -> tuple[str, Any]:
        answer = _wanted(item["answer"]) if spec.rule == "json" else texts(item, "answer")
        if spec.rule == "contains" and not answer.strip():
            raise ValueError("answer is empty, which everything contains")
        return texts(item, "question", "prompt"), answer

    items = rows(Path(spec.file), subject.setting.limit, one)
    if spec.rule == "gsm8k":
        for number, (_, right) in enumerate(items, 1):
            if gsm8k_answer(right) is None:
                raise SourceError(f"{spec.file}, example {number}: its answer has no number behind '####'")
    prompts = [spec.prefix + spec.form.replace("{question}", question) for question, _ in items]
    written, notes = language(subject).written(prompts, spec.max_new_tokens, spec.stop)
    pairs = [(text, right) for text, (_, right) in zip(written, items, strict=True)]
    if spec.rule == "gsm8k":
        loose = [gsm8k_answer(text, flexible=True) for text in written]
        without = sum(one is None for one in loose)
        return of_examples(
            {
                "exact_match": [float(gsm8k_answer(text) == gsm8k_answer(right)) for text, right in pairs],
                "flexible_extract": [
                    float(one == gsm8k_answer(right)) for one, (_, right) in zip(loose, items, strict=True)
                ],
            },
            {**notes, **({"answers without a number": without} if without else {})},
        )
    return of_examples({"exact_match": [float(_fits(text, right, spec.rule)) for text, right in pairs]}, notes)


def _wanted(answer: Any) -> Any:
    """What a text of JSON says; any other value is meant itself."""
    if not isinstance(answer, str):
        return answer
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise ValueError(f"answer {answer[:40]!r} is not valid JSON: nothing could equal it") from None


def _fits(text: str, right: Any, rule: str) -> bool:
    if rule == "contains":
        return right.strip() in text
    if rule == "exact":
        return bool(text.strip() == right.strip())
    try:
        return bool(json.loads(text.strip()) == right)
    except (ValueError, RecursionError):
        return False
