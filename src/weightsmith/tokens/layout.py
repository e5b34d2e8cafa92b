"""Which row of which model stands for each token of the output's vocabulary.  Pure bookkeeping, as index arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith.core.errors import WeightsmithError, did_you_mean

__all__ = ["Layout", "TokenRule", "lay_out", "read_rule"]


@dataclass(frozen=True)
class TokenRule:
    """Where one token's row comes from in models that lack it; with `force` in all models.

    model   whose row; None: a row of zeros
    token   of that model; or
    number  the row itself
    """

    model: str | None
    token: str = ""
    number: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Layout:
    """Rows of every model's token tensors in the output's vocabulary.

    own       int64 [models, rows]: the model's own row, or -1
    fallback  int64 [models, rows]: rows whose mean stands in where a model has none of its own; -1: no part in it
    zero      bool [rows]: zeros stand in

    Where nothing stands in (padding, tokens that no model has) it is the mean of that model's other rows.
    """

    models: tuple[str, ...]
    own: np.ndarray
    fallback: np.ndarray
    zero: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.zero.size)

    def filled(self, model: str) -> np.ndarray:
        """Bool [rows]: the rows of a model that are the mean of its others."""
        own = self.own[self.models.index(model)]
        found: np.ndarray = (own < 0) & (self.fallback < 0).all(axis=0) & ~self.zero
        return found


def lay_out(
    vocabularies: Mapping[str, Mapping[str, int]],
    rows: Mapping[str, int],
    output: Mapping[str, int],
    *,
    base: str | None = None,
    rules: Mapping[str, TokenRule] | None = None,
    multiple: int | None = None,
) -> Layout:
    """Lay models out for the vocabulary `output`.

    vocabularies  model -> token -> row;  rows: how many rows each model has (tokens beyond them have none)
    base          whose row stands in where it has one; else the mean over the models that have the token
    rules         exceptions, for tokens of `output`
    multiple      the number of rows is rounded up to a multiple of it

    Raises WeightsmithError for a rule that names a token or row that is not there.
    """
    models = tuple(vocabularies)
    size = max(output.values(), default=-1) + 1
    size += -size % (multiple or 1)
    places = np.fromiter(output.values(), np.int64, len(output))
    own = np.full((len(models), size), -1, np.int64)
    for i, (model, known) in enumerate(vocabularies.items()):
        numbers = np.fromiter((known.get(token, -1) for token in output), np.int64, len(output))
        own[i, places] = np.where(numbers < rows[model], numbers, -1)
    fallback = own.copy()
    if base is not None:
        at = models.index(base)
        others = np.arange(len(models)) != at
        fallback[np.ix_(others, own[at] >= 0)] = -1
    zero = np.zeros(size, bool)
    for token, rule in (rules or {}).items():
        place = output[token]
        fallback[:, place] = -1
        zero[place] = rule.model is None
        if rule.model is not None:
            fallback[models.index(rule.model), place] = _row(token, rule, vocabularies, rows)
        if rule.force:
            own[:, place] = -1
    return Layout(models, own, fallback, zero)


def _row(token: str, rule: TokenRule, vocabularies: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]) -> int:
    assert rule.model is not None
    wanted = rule.token or token
    number = vocabularies[rule.model].get(wanted) if rule.number is None else rule.number
    if number is None:
        raise WeightsmithError(f"tokens: {token!r} is to come from {rule.model}, which has no token {wanted!r}")
    if not 0 <= number < rows[rule.model]:
        raise WeightsmithError(
            f"tokens: {token!r} is to come from row {number} of {rule.model}, which has {rows[rule.model]} rows"
        )
    return number


def read_rule(token: str, given: Any, models: tuple[str, ...]) -> TokenRule | None:
    """A token's entry under `tokens`: {source: MODEL or {kind: zero} or {kind: model_token, ...}, force: bool}.

    None where it only asks for the token to be there.  Raises WeightsmithError for anything else.
    """
    if given is None or given == {}:
        return None
    if not isinstance(given, Mapping) or not given.keys() <= {"source", "force"}:
        raise WeightsmithError(f"tokens: {token!r} should have source and force only, is {given!r}")
    source, force = given.get("source"), given.get("force", False)
    if not isinstance(force, bool):
        raise WeightsmithError(f"tokens: force of {token!r} should be true or false, is {force!r}")
    if source is None:
        if force:
            raise WeightsmithError(f"tokens: {token!r} has force but no source; name a model, or {{kind: zero}}")
        return None
    if source == {"kind": "zero"}:
        return TokenRule(None, force=force)
    if isinstance(source, str):
        return TokenRule(_model(token, source, models), force=force)
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind != "model_token" or not source.keys() <= {"kind", "model", "token", "token_id"}:
        raise WeightsmithError(
            f"tokens: the source of {token!r} should be a model, {{kind: zero}}, or {{kind: model_token, model, "
            f"token or token_id}}; is {source!r}"
        )
    other, number = source.get("token"), source.get("token_id")
    if not ((isinstance(other, str) and number is None) or (type(number) is int and other is None)):
        raise WeightsmithError(f"tokens: the source of {token!r} should have token (a text) or token_id (a number)")
    return TokenRule(_model(token, source.get("model"), models), other or "", number, force)


def _model(token: str, name: Any, models: tuple[str, ...]) -> str:
    if name not in models:
        raise WeightsmithError(
            f"tokens: the source of {token!r} is {name!r}, no model{did_you_mean(str(name), models)}"
        )
    return str(name)
