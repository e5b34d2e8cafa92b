"""config.json after a model's blocks were cut or stacked: counts of layers, lists with an entry per layer, patterns.

Which field counts which stack of blocks is found from the numbers and the words in the names (encoder, decoder,
text, vision), not from a table of architectures.  What a pattern says without a list ("every sixth layer is
global") is written out as a list first, since a stack seldom keeps to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import layer_of
from weightsmith.io.architectures import COUNTS, GLOBAL_EVERY, PERIODIC
from weightsmith.io.read.small import parse_json, read_small
from weightsmith.io.read.source import Source

__all__ = [
    "Stacked",
    "adopt_config",
    "blocks_held",
    "config_mapping",
    "config_of",
    "counted_blocks",
    "cut_config",
    "miscounted",
    "parsed_config",
    "stack_configs",
]

_LIMIT = 16_000_000  # bytes of config.json
_COUNT = re.compile(
    r"(?:num|n)_(?:(?:hidden|encoder|decoder|text|vision|transformer)_)*(?:layers?|blocks?)"
    r"|(?:encoder|decoder)_layers|depth|layers"
)
_LISTED = re.compile(r"layer|block|attn|attention|mixer|mlp|ffn|heads|pattern|intermediate|rope|window|types")
_INDEXED = re.compile(r"(?!no_rope_layers)(?:.*_)?(?:layers|layer_ids|idxs?|indexes|indices)")
_SIDES = (
    ("vision", re.compile(r"vision|visual|image")),
    ("audio", re.compile(r"audio|speech")),
    ("text", re.compile(r"text|language|llm")),
    ("decoder", re.compile(r"decoder")),
    ("encoder", re.compile(r"encoder")),
)

Config = dict[str, Any]
_Place = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Stacked:
    """A part's config.json and how many blocks each of the stacks has in it."""

    config: str
    counts: Mapping[str, int]


def config_of(source: Source) -> str | None:
    """A source's config.json, as it is for its blocks; None if it has none."""
    if (text := source.origin.config) is not None:
        return text
    folder = source.origin.folder
    path = None if folder is None else folder / "config.json"
    return read_small(path, _LIMIT).decode(errors="surrogateescape") if path is not None and path.is_file() else None


def config_mapping(source: Source) -> dict[str, Any]:
    """The values of a source's config.json; SourceError where there is none, or no folder that it lies in."""
    text = config_of(source)
    if text is None or source.origin.folder is None:
        raise SourceError(f"{source}: no config.json, which the mixture's is made from; give a model folder")
    return _parsed(text, source.origin.label)


def parsed_config(source: Source) -> dict[str, Any]:
    """The values of a source's config.json; none where there is no such file."""
    text = config_of(source)
    return {} if text is None else _parsed(text, source.origin.label)


def counted_blocks(config: Mapping[str, Any]) -> tuple[str, set[int]] | None:
    """('num_hidden_layers = 28', the numbers of blocks that weights may then hold); None if it does not say."""
    inner = config.get("text_config")
    language = {**config, **inner} if isinstance(inner, dict) else config
    name = next((name for name in COUNTS if isinstance(language.get(name), int)), None)
    if name is None:
        return None
    count, extra = language[name], language.get("num_nextn_predict_layers")
    # Multi-token prediction blocks follow the counted ones.
    return f"{name} = {count}", {count, count + extra if isinstance(extra, int) else count}


def miscounted(source: Source) -> str | None:
    """Where a source's config.json and the block numbers in its tensors' names disagree; None if they do not."""
    text = config_of(source)
    said = counted_blocks(_parsed(text, source.origin.label)) if text is not None else None
    held = blocks_held(source.keys)
    if said is None or not held or any(len(found) in said[1] for found in held.values()):
        return None
    stack = max(held, key=lambda name: len(held[name]))
    return f"config.json says {said[0]}, the weights hold {len(held[stack])} blocks in {stack}"


def blocks_held(names: Iterable[str]) -> dict[str, set[int]]:
    """Stack ('model.layers') -> numbers of the blocks that tensors have names of."""
    held: dict[str, set[int]] = {}
    for name in names:
        if place := layer_of(name):
            held.setdefault(place[0], set()).add(place[1])
    return held


def cut_config(text: str, cuts: Mapping[str, tuple[int, int, int]], label: str) -> str:
    """The config of blocks [start, end) of some stacks: stack -> (blocks before, start, end)."""
    config = _parsed(text, label)
    for stack, (count, start, end) in cuts.items():
        places = _places(config, stack, count)
        for scope in _scopes_of(config, places):
            _spell_out(scope, count)
            lists, indexed = _lists(scope, count, stack), _index_lists(scope, count, stack)
            scope.update({name: scope[name][start:end] for name in lists})
            scope.update({name: [i - start for i in scope[name] if start <= i < end] for name in indexed})
            if type(scope.get("first_k_dense_replace")) is int:
                scope["first_k_dense_replace"] = max(0, min(scope["first_k_dense_replace"], end) - start)
            for word in _periods(scope):
                scope[f"{word}_offset"] = (scope[f"{word}_offset"] - start) % scope[f"{word}_period"]
            _set_window(scope)
        _set(config, places, end - start)
    return _text(config)


def stack_configs(parts: Sequence[Stacked], label: str) -> str:
    """The config of parts on top of each other: the first one's, with the layers of all."""
    configs = [_parsed(part.config, label) for part in parts]
    frame = configs[0]
    for stack in parts[0].counts:
        counts = [part.counts[stack] for part in parts]
        each = [_places(config, stack, count) for config, count in zip(configs, counts, strict=True)]
        for path in dict.fromkeys(path for path, _ in each[0]):
            scopes = [_scope(config, path) for config in configs]
            if all(scope is not None for scope in scopes):
                _stack_scope([s for s in scopes if s is not None], counts, stack, label)
        _set(frame, each[0], sum(counts))
    return _text(frame)


def adopt_config(text: str, part: Stacked, label: str) -> str:
    """`text` with what `part` says of the layers of its stacks."""
    config, other = _parsed(text, label), _parsed(part.config, label)
    for stack, count in part.counts.items():
        places = _places(other, stack, count)
        theirs = {path: _scope(other, path) for path, _ in places}
        for path, source in theirs.items():
            target = _scope(config, path)
            if target is None or source is None:
                continue
            changed = [*_lists(source, count, stack), *_index_lists(source, count, stack)]
            for name in [*changed, "first_k_dense_replace", "max_window_layers", *(f"{w}_offset" for w in PERIODIC)]:
                if name in source:
                    target[name] = source[name]
        _set(config, places, count)
    return _text(config)


def _stack_scope(scopes: Sequence[Config], counts: Sequence[int], stack: str, label: str) -> None:
    """Put the per-layer facts of all scopes into the first."""
    frame = scopes[0]
    for scope, count in zip(scopes, counts, strict=True):
        _spell_out(scope, count)
    for name in _lists(frame, counts[0], stack):
        if any(len(scope.get(name) or ()) != count for scope, count in zip(scopes, counts, strict=True)):
            raise SourceError(f"{label}: config.json: {name} does not have an entry for each layer in every part")
    lists = {n: [v for scope in scopes for v in scope[n]] for n in _lists(frame, counts[0], stack)}
    indexed: dict[str, list[int]] = {}
    for name in _index_lists(frame, counts[0], stack):
        starts = [sum(counts[:i]) for i in range(len(counts))]
        indexed[name] = [i + s for scope, s in zip(scopes, starts, strict=True) for i in scope.get(name) or ()]
    dense = [i < scope["first_k_dense_replace"] for scope, count in zip(scopes, counts, strict=True)
             if "first_k_dense_replace" in scope for i in range(count)]  # fmt: skip
    for word in _periods(frame):
        flags = [_periodic(scope, word, i) for scope, count in zip(scopes, counts, strict=True) for i in range(count)]
        if flags != [_periodic(frame, word, i) for i in range(sum(counts))]:
            raise SourceError(f"{label}: config.json cannot say where the layers of {word}_period are after this; "
                              f"take slices whose lengths are multiples of {frame[f'{word}_period']}")  # fmt: skip
    if dense:
        leading = dense.index(False) if False in dense else len(dense)
        if any(dense[leading:]):
            raise SourceError(f"{label}: config.json cannot say that dense layers follow layers with experts; "
                              f"take the dense ones (first_k_dense_replace) from the first slice only")  # fmt: skip
        frame["first_k_dense_replace"] = leading
    frame.update(lists, **indexed)
    _set_window(frame)


# --- finding the fields ----------------------------------------------------------------------------


def _scopes(config: Config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Config]]:
    yield path, config
    for name, value in config.items():
        if isinstance(value, dict) and len(path) < 3:
            yield from _scopes(value, (*path, name))


def _places(config: Config, stack: str, count: int) -> list[_Place]:
    """The fields that count the blocks of a stack."""
    found = [(path, name) for path, scope in _scopes(config) for name, value in scope.items()
             if type(value) is int and value == count and _COUNT.fullmatch(name)]  # fmt: skip
    mine = _side(stack)
    by_side: dict[str, list[_Place]] = {}
    for path, name in found:
        by_side.setdefault(_side(".".join((*path, name))), []).append((path, name))
    plain, own = by_side.get("", []), by_side.get(mine, [])
    if mine == "":
        return plain or by_side.get("text", [])
    # Where encoder and decoder have fields of their own, the plain one counts the encoder.
    return own + plain if mine in ("text", "encoder") else own or plain


def _side(words: str) -> str:
    """'vision', 'decoder', ... for a path of names; the outermost that says so counts."""
    for word in words.lower().split("."):
        for side, pattern in _SIDES:
            if pattern.search(word):
                return side
    return ""


def _scope(config: Config, path: Sequence[str]) -> Config | None:
    for name in path:
        inner = config.get(name)
        if not isinstance(inner, dict):
            return None
        config = inner
    return config


def _scopes_of(config: Config, places: Sequence[_Place]) -> list[Config]:
    found = [_scope(config, path) for path in dict.fromkeys(path for path, _ in places)]
    return [scope for scope in found if scope is not None]


def _set(config: Config, places: Sequence[_Place], count: int) -> None:
    for path, name in places:
        scope = _scope(config, path)
        if scope is not None:
            scope[name] = count


def _lists(scope: Config, count: int, stack: str) -> list[str]:
    """Fields that are lists with an entry for each layer."""
    return [name for name, value in scope.items()
            if isinstance(value, list) and len(value) == count and _LISTED.search(name) and _about(name, stack)
            and not (_INDEXED.fullmatch(name) and value == list(range(count)))]  # fmt: skip


def _index_lists(scope: Config, count: int, stack: str) -> list[str]:
    """Fields that list layers by their numbers."""
    return [name for name, value in scope.items()
            if isinstance(value, list) and _INDEXED.fullmatch(name) and "out_" not in name and _about(name, stack)
            and (len(value) != count or value == list(range(count)))
            and all(type(v) is int and 0 <= v < count for v in value) and sorted(set(value)) == value]  # fmt: skip


def _about(name: str, stack: str) -> bool:
    return _side(name) in ("", _side(stack))


def _periods(scope: Config) -> list[str]:
    return [w for w in PERIODIC if type(scope.get(f"{w}_period")) is int and type(scope.get(f"{w}_offset")) is int]


def _periodic(scope: Config, word: str, layer: int) -> bool:
    return bool(layer % scope[f"{word}_period"] == scope[f"{word}_offset"])


# --- patterns --------------------------------------------------------------------------------------


def _spell_out(scope: Config, count: int) -> None:
    """Write what a pattern says of each layer as a list."""
    types = _layer_types(scope, count) if not scope.get("layer_types") else None
    if types is not None and len(set(types)) > 1:
        scope["layer_types"] = types
    interval = scope.get("no_rope_layer_interval")
    if type(interval) is int and interval > 0 and not scope.get("no_rope_layers"):
        scope["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(count)]
    step = scope.get("decoder_sparse_step")
    if type(step) is int and step > 1:
        dense = set(scope.get("mlp_only_layers") or ())
        scope["mlp_only_layers"] = [i for i in range(count) if i in dense or (i + 1) % step != 0]
        scope["decoder_sparse_step"] = 1


def _layer_types(scope: Config, count: int) -> list[str] | None:
    every = scope.get("sliding_window_pattern", GLOBAL_EVERY.get(str(scope.get("model_type"))))
    interval, first = scope.get("full_attention_interval"), scope.get("max_window_layers")
    if type(every) is int and every > 1:
        return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if isinstance(every, str) and every:
        return ["sliding_attention" if every[i % len(every)] == "L" else "full_attention" for i in range(count)]
    if type(interval) is int and interval > 1:
        return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]
    if scope.get("use_sliding_window") and scope.get("sliding_window") and type(first) is int:
        return ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    return None


def _set_window(scope: Config) -> None:
    """`max_window_layers` of a model that slides: the layers before the first that does."""
    types = scope.get("layer_types")
    if scope.get("use_sliding_window") and type(scope.get("max_window_layers")) is int and isinstance(types, list):
        scope["max_window_layers"] = types.index("sliding_attention") if "sliding_attention" in types else len(types)


def _parsed(text: str, label: str) -> Config:
    found = parse_json(text.encode(errors="surrogateescape"), f"{label}: config.json")
    if not isinstance(found, dict):
        raise SourceError(f"{label}: config.json is not a mapping")
    return found


def _text(config: Config) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
