"""Names of tensors that differ between models by a prefix: mapped where a recipe says how, or where one way fits.

Trainers save what they wrap: `module.` (DDP, DeepSpeed), `_orig_mod.` (torch.compile), `model.` (Lightning),
`base_layer.` (peft); a model
saved without its head lacks the prefix that the whole one has (`bert.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from weightsmith.core.errors import SourceError
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import RenamedSource

__all__ = ["named_like", "renamed", "unwrapped"]

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
_TRIED = 8
"""Tensors by which prefixes are looked for."""


def unwrapped(name: str) -> str:
    """A tensor's name without what trainers put into it where they wrap models."""
    return _WRAPPERS.sub("", name)


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """The source with other beginnings of names: prefix -> what stands in its place; the longest that fits counts."""
    if not names:
        return source
    order = sorted(names, key=len, reverse=True)
    found: dict[str, str] = {}
    for old in (*source.keys, *source.aliases):
        prefix = next((prefix for prefix in order if old.startswith(prefix)), "")
        new = names.get(prefix, "") + old.removeprefix(prefix) if prefix in names else old
        if not new or new in found:
            other = f" and {found[new]!r}" if new in found else ""
            raise SourceError(f"{source}: names: {old!r}{other} would become {new!r}")
        found[new] = old
    return source if all(new == old for new, old in found.items()) else RenamedSource(source, found)


def named_like(source: Source, reference: Source) -> Source:
    """The source, or a view of it with the names that `reference` has, where just one way to map them fits."""
    if source is reference or not source.keys or not reference.keys:
        return source
    here = reference.keys.keys() | reference.aliases.keys()
    if not here.isdisjoint(source.keys) and not any(map(_WRAPPERS.search, source.keys.keys() - here)):
        return source
    ways: dict[tuple[tuple[str, str], ...], str] = {}
    for candidates in (_unwrapped, _from_memory, _prefixed):  # what fits in whole goes before what may fit by chance
        for names, words in candidates(source, reference):
            if _fits(names, source, reference):
                ways.setdefault(tuple(names.items()), words)
        if ways:
            break
    if len(ways) != 1:
        return source
    ((pairs, words),) = ways.items()
    found = RenamedSource(source, dict(pairs))
    origin = found.origin
    found.origin = replace(origin, remarks=(*origin.remarks, words))
    return found


def _unwrapped(source: Source, reference: Source) -> Iterator[tuple[dict[str, str], str]]:
    """The names without what trainers put into them: new name -> old name, and what to say."""
    old = (*source.keys, *source.aliases)
    bare = {unwrapped(name): name for name in old}
    if len(bare) == len(old) and tuple(bare) != old:
        word = next(found[0] for name in old if (found := _WRAPPERS.search(name)))
        yield bare, f"names hold {word!r}, as trainers wrap models: read without it"


def _from_memory(source: Source, reference: Source) -> Iterator[tuple[dict[str, str], str]]:
    """The names in files of tensors that are all called as in memory."""
    modules = Modules(reference)
    stored = {modules.stored(name) or "": name for name in source.keys} if modules.renames else {}
    if stored and "" not in stored and len(stored) == len(source.keys):
        tied = {modules.stored(name) or name: name for name in source.aliases}
        yield {**tied, **stored}, "names are those in memory: read as the other models' files have them"


def _prefixed(source: Source, reference: Source) -> Iterator[tuple[dict[str, str], str]]:
    """One prefix less, or more."""
    old = (*source.keys, *source.aliases)
    here = (*reference.keys, *reference.aliases)
    if not set(here).isdisjoint(old):
        return
    prefixes = {n[: -len(h)] for h in here[:_TRIED] for n in old if n.endswith(f".{h}")}
    for prefix in sorted(prefixes):
        longer = {n.removeprefix(prefix) if n.startswith(prefix) else n: n for n in old}
        if len(longer) == len(old):
            yield longer, f"names begin with {prefix!r}: read without it (as names: {{{prefix!r}: ''}} says)"
    for prefix in sorted({h[: -len(n)] for n in old[:_TRIED] for h in here if h.endswith(f".{n}")}):
        yield {prefix + n: n for n in old}, f"names lack {prefix!r}: read with it (as names: {{'': {prefix!r}}} says)"


def _fits(names: Mapping[str, str], source: Source, reference: Source) -> bool:
    """Whether half of the smaller model is there under these names, and nothing in another shape."""
    there = [(new, old) for new, old in names.items() if new in reference.keys or new in reference.aliases]
    if 2 * len(there) < min(len(names), len(reference.keys)):
        return False
    return all(source.key(old).shape == reference.key(new).shape for new, old in there)
