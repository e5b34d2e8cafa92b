"""Models put together of parts of models: slices on top of each other, modules side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import layer_of
from weightsmith.io.read.layers import Stacked, adopt_config, config_of, stack_configs
from weightsmith.io.read.source import Cut, Source
from weightsmith.io.read.views import JoinedSource, block_counts

__all__ = ["join_modules", "stack_slices"]

_BELOW = re.compile(r"embed|wte|wpe|shared|token|position|patch|conv|feature|(?:^|[._])pre_|ln_pre")
"""What stands in the names of tensors that come before the blocks."""


def stack_slices(parts: Sequence[Source]) -> JoinedSource:
    """Blocks of the parts one above the other, renumbered; what lies below the blocks comes from the first part,
    what lies above (final norm, head) from the last.

    Other stacks of blocks (a vision tower beside the text) come whole from the first part.  Tensors that only the
    first block of a model has (T5's relative positions) are the first part's too.
    """
    stacks = _common_stacks(parts)
    counts = [block_counts(part) for part in parts]
    names: dict[str, tuple[int, str]] = {}
    offsets = dict.fromkeys(stacks, 0)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        for old in (*part.keys, *part.aliases):
            place = layer_of(old)
            if place is not None and place[0] in stacks:
                if old in part.origin.cut.pinned and number:
                    continue
                stack, block = place
                names[f"{stack}.{offsets[stack] + block}{old[len(f'{stack}.{block}') :]}"] = (number, old)
            elif (number == 0) if place is not None or _is_below(old) else last:
                names[old] = (number, old)
        for stack in stacks:
            offsets[stack] += counts[number].get(stack, 0)
    label = "[" + " + ".join(part.origin.label for part in parts) + "]"
    texts = [config_of(part) for part in parts]
    configs = [Stacked(text, {s: count.get(s, 0) for s in stacks}) for text, count in zip(texts, counts, strict=True)
               if text is not None]  # fmt: skip
    config = stack_configs(configs, label) if len(configs) == len(parts) else None
    cut = Cut(stacks, parts[0].origin.cut.pinned)
    return _joined(parts, names, label, config, cut)


def _common_stacks(parts: Sequence[Source]) -> tuple[str, ...]:
    """The stacks that all parts are slices of; for whole models their longest."""
    found = []
    for part in parts:
        counts = block_counts(part)
        found.append(part.origin.cut.stacks or tuple(s for s, count in counts.items() if count == max(counts.values())))
    if len(set(found)) != 1 or not found[0]:
        each = "; ".join(
            f"{part}: {', '.join(stacks) or 'no blocks'}" for part, stacks in zip(parts, found, strict=True)
        )
        raise SourceError(f"slices of unlike stacks of blocks ({each}); say which is meant, as stack: model.layers")
    return found[0]


def _is_below(name: str) -> bool:
    return _BELOW.search(name.lower()) is not None


def join_modules(parts: Mapping[str, Source]) -> JoinedSource:
    """Every part's tensors under their own names; the parts have none in common.

    Companion files are the first part's; its config.json takes over what the others say of their slices.
    """
    names = {n: (i, n) for i, part in enumerate(parts.values()) for n in (*part.keys, *part.aliases)}
    label = "{" + ", ".join(f"{name}: {part}" for name, part in parts.items()) + "}"
    first, *others = parts.values()
    text = config_of(first)
    for part in others if text is not None else ():
        theirs = config_of(part)
        stacks = part.origin.cut.stacks
        if stacks and theirs is not None and text is not None:
            counts = {s: n for s, n in block_counts(part).items() if s in stacks}
            text = adopt_config(text, Stacked(theirs, counts), label)
    return _joined(tuple(parts.values()), names, label, text, Cut(pinned=first.origin.cut.pinned))


def _joined(
    parts: Sequence[Source], names: Mapping[str, tuple[int, str]], label: str, config: str | None, cut: Cut
) -> JoinedSource:
    origins = tuple(part.origin for part in parts)
    first, *others = origins
    return JoinedSource(parts, names, first.beside(*others, label=label, config=config, cut=cut, made_of=origins))
