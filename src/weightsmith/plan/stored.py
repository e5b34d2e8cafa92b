"""In which dtype each tensor of the output is stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.problem import Code, Problems, Tensors
from weightsmith.inputs.opened import Inputs
from weightsmith.io.architectures import WIDE, WIDE_ROUTERS
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import View
from weightsmith.recipe.resolve import Resolver

__all__ = ["Dtypes"]

_WIDE = re.compile("|".join(f"(?:{pattern})" for pattern in WIDE))
_ROUTER = re.compile(r".*\bgate\.weight")


class Dtypes:
    """Answers `dtypes(key) -> Key` as it is stored: by the rules, else by the recipe's output.dtype, else as it is.

    Under an output.dtype a tensor stays wider where a model stores it wider than most of its weights, and where its
    numbers are known to need that (`architectures.WIDE`); `warnings` says so.
    """

    def __init__(self, resolver: Resolver, inputs: Inputs, wanted: str | None, warnings: Problems) -> None:
        self._resolver, self._wanted, self._warnings = resolver, wanted, warnings
        self._wide = dict(found for _, source in inputs.models for found in _wider(source)) if wanted else {}

    def __call__(self, key: Key) -> Key:
        if not key.floating:
            return key
        if (ruled := self._resolver.dtype(key)) is not None:
            return Key(key.name, key.shape, ruled)
        if self._wanted is None:
            return key
        wide = self._wide.get(key.name)
        if wide is None or DTYPES[wide].itemsize <= DTYPES[self._wanted].itemsize:
            return Key(key.name, key.shape, self._wanted)
        text = partial(_kept, wide, self._wanted)
        self._warnings.share(Code.DTYPE, key.name, ("wide", wide), text)
        return Key(key.name, key.shape, wide)


def _wider(source: Source) -> Iterator[tuple[str, str]]:
    """(tensor, its dtype) for those that a model stores wider than most of its weights, or has to.

    Of a model made of others each part counts by itself: a stack of a float32 and a bfloat16 model has no such tensors.
    """
    parts: dict[int, list[Key]] = {}
    view = source if isinstance(source, View) and len(source.parts) > 1 else None
    for key in source.keys.values():
        if key.floating:
            parts.setdefault(0 if view is None else id(view.own(key.name)[0]), []).append(key)
    for keys in parts.values():
        sizes: Counter[int] = Counter()
        for key in keys:
            sizes[DTYPES[key.dtype].itemsize] += key.numel
        most = max(sizes.most_common(1)[0][0], 2)
        for key in keys:
            size = DTYPES[key.dtype].itemsize
            if size > most or (size == 4 and _needs_it(key.name, source)):
                yield key.name, key.dtype


def _needs_it(name: str, source: Source) -> bool:
    if _WIDE.fullmatch(name):
        return True
    return _ROUTER.fullmatch(name) is not None and _kind(Modules(source).config) in WIDE_ROUTERS


def _kind(config: Any) -> str:
    inner = config.get("text_config")
    return str((inner if isinstance(inner, dict) else config).get("model_type"))


def _kept(wide: str, wanted: str, tensors: Tensors) -> str:
    it = tensors["it|them"]
    return (
        f"{tensors} {tensors['stays|stay']} {wide}, not {wanted}: stored wider than the weights around {it}, or known "
        f"to need it; to round {it} too add a rule with dtype: {wanted}"
    )
