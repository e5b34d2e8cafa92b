"""Does a folder hang together?  What config, tokenizer and weight headers tell, without running anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.keys import layer_of
from weightsmith.io import system
from weightsmith.io.architectures import EMBEDDINGS, HEADS, SIZED_OTHERWISE, SIZES_OF_THEIR_OWN, TIED
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.layers import blocks_held, counted_blocks
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url

__all__ = ["cheap_check"]

# What a configuration calls a size: the first name present counts.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_ROWS_AT_ONCE = 4096
_OTHER_PARTS = ("vision", "visual", "image", "video", "audio", "speech", "talker", "connector")
"""In names of parts whose sizes are in a configuration of their own (vision_config, audio_config)."""


def cheap_check(out: Path | Url) -> list[str]:
    """Compare a model folder's config.json and tokenizer with its weights' headers; returns warnings, a line each.

    Reads headers only, except for an output head that the configuration ties to the embedding: the two are
    compared.  A folder without config.json is a raw state dict: nothing to compare, no warning.
    Raises SourceError if the weights themselves cannot be opened.
    """
    source: Source | None = None
    if isinstance(out, Url):
        from weightsmith.io.read.remote_source import open_url

        source = open_url(out)
        source.prepare()
        assert source.origin.folder is not None
        out = source.origin.folder
    path = out / "config.json"
    if not path.exists():
        return []
    config, fault = _read_json(path)
    if fault:
        return [fault]
    source = source or FolderSource(out)
    language = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    return [
        *_embedding_warnings(source, language),
        *_layer_warnings(source, language),
        *_projection_warnings(source, language),
        *_tied_warnings(source, language),
        *_tokenizer_warnings(out, source, language),
    ]


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    try:
        found = json.loads(system.read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read ({error}); the folder will not load"
    if not isinstance(found, dict):
        return {}, f"{path.name} holds {type(found).__name__}, not an object; the folder will not load"
    return found, ""


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int] | None:
    """(its name in the configuration, the number), or None."""
    return next(((name, config[name]) for name in names if isinstance(config.get(name), int)), None)


def _tables(source: Source, modules: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Matrices called <...>.<module>.weight for one of the modules."""
    for name, key in source.keys.items():
        parts = name.split(".")
        if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in modules and len(key.shape) == 2:
            yield name, key.shape


def _embedding_warnings(source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    vocabulary, hidden = _size(config, ("vocab_size",)), _size(config, _HIDDEN)
    narrow = _size(config, ("word_embed_proj_dim", "embedding_size")) or hidden
    for name, (rows, width) in [*_tables(source, EMBEDDINGS), *_tables(source, HEADS)]:
        if vocabulary and rows != vocabulary[1]:
            yield f"{name} has {rows} rows, config.json says vocab_size = {vocabulary[1]}; loaders will refuse it"
        if hidden and narrow and width not in (hidden[1], narrow[1]):
            yield f"{name} is {width} wide, config.json says {hidden[0]} = {hidden[1]}; loaders will refuse it"


def _layer_warnings(source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    stacks, said = blocks_held(source.keys), counted_blocks(config)
    if said is None:
        return
    wanted, allowed = said
    if not stacks:
        if any(allowed):
            yield f"config.json says {wanted}, the weights hold no numbered blocks"
        return
    if not any(len(found) in allowed for found in stacks.values()):
        stack = max(stacks, key=lambda name: len(stacks[name]))
        yield (
            f"config.json says {wanted}, the weights hold {len(stacks[stack])} blocks in {stack}; "
            "the model will be cut, or partly random"
        )
        return
    deep = {stack for name in source.keys if (stack := _stack_of_modules(name))}  # not the layers of a Sequential
    for stack, found in stacks.items():
        if stack not in deep:
            continue
        missing = sorted(set(range(max(found) + 1)) - found)
        if missing and len(found) in allowed:
            yield f"{stack} lacks block {missing[0]} although block {max(found)} is there; renumber the blocks"


def _stack_of_modules(name: str) -> str:
    """'model.layers' for a tensor of a module inside a numbered block; '' for one of the block itself."""
    place = layer_of(name)
    inside = "" if place is None else name.removeprefix(f"{place[0]}.{place[1]}.")
    return place[0] if place is not None and "." in inside else ""


def _projections(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int | None, int]]]:
    """Module -> (fields that say it, (rows, columns)) of Llama-like attention and MLP matrices; None: any number."""
    hidden, heads = _size(config, _HIDDEN), _size(config, ("num_attention_heads",))
    if hidden is None or heads is None or config.get("model_type") in SIZED_OTHERWISE:
        return {}
    if any(config.get(field) for field in SIZES_OF_THEIR_OWN):
        return {}
    head_dim = _size(config, ("head_dim",)) or ("head_dim", hidden[1] // max(heads[1], 1))
    kv_heads = _size(config, ("num_key_value_heads",)) or heads
    middle = _size(config, ("intermediate_size",))
    inside = middle[1] if middle else None
    sizes: dict[str, tuple[str, int | None]] = {
        "self_attn.q_proj": (f"{heads[0]} x {head_dim[0]}", heads[1] * head_dim[1]),
        "self_attn.k_proj": (f"{kv_heads[0]} x {head_dim[0]}", kv_heads[1] * head_dim[1]),
        "self_attn.v_proj": (f"{kv_heads[0]} x {head_dim[0]}", kv_heads[1] * head_dim[1]),
        "mlp.gate_proj": ("intermediate_size", inside),
        "mlp.up_proj": ("intermediate_size", inside),
    }
    return {module: (f"{words}, {hidden[0]}", (rows, hidden[1])) for module, (words, rows) in sizes.items()}


def _fits(shape: tuple[int, ...], said: tuple[int | None, int]) -> bool:
    return len(shape) != 2 or (said[0] in (None, shape[0]) and said[1] == shape[1])


def _projection_warnings(source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    """Attention and MLP matrices, [out, in], of the language model; one warning per kind.

    A matrix that fits another part's configuration (vision_config) is of that part, whatever the part is called.
    """
    parts = [_projections(part) for name, part in config.items() if isinstance(part, dict) and name != "text_config"]
    for module, (words, said) in _projections(config).items():
        for name, key in source.keys.items():
            place = layer_of(name)
            if place is None or name != f"{place[0]}.{place[1]}.{module}.weight":
                continue
            if any(part in place[0] for part in _OTHER_PARTS) or _fits(key.shape, said):
                continue
            if not any(module in part and _fits(key.shape, part[module][1]) for part in parts):
                yield (
                    f"{name} is {list(key.shape)}, config.json says [{said[0] or '?'}, {said[1]}] ({words}); loaders "
                    "will refuse it"
                )
                break


def _tied_warnings(source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    tied = config.get(TIED)
    heads = [name for name, _ in _tables(source, HEADS)]
    architectures = config.get("architectures") or [""]
    if tied is False and not heads and not source.aliases and str(architectures[0]).endswith("ForCausalLM"):
        yield "config.json says tie_word_embeddings = false, but the weights hold no output head; it would be random"
    if tied is not True:
        return
    for head in heads:
        for embedding, shape in _tables(source, EMBEDDINGS):
            if shape == source.keys[head].shape and not _same_bits(source, head, embedding):
                yield (
                    f"config.json ties the output head to the embedding, but {head} differs from {embedding}; loaders "
                    "ignore one of them: set tie_word_embeddings to false, or drop the head"
                )


def _same_bits(source: Source, one: str, other: str) -> bool:
    rows = source.keys[one].rows
    steps = range(0, rows, _ROWS_AT_ONCE)
    return source.keys[one].dtype == source.keys[other].dtype and all(
        np.array_equal(source.bits(one, i, i + _ROWS_AT_ONCE), source.bits(other, i, i + _ROWS_AT_ONCE)) for i in steps
    )


def _tokenizer_warnings(out: Path, source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    tables = dict(_tables(source, EMBEDDINGS))
    if not tables:
        return
    name, (rows, _) = max(tables.items(), key=lambda item: item[1][0])
    for file, largest, fault in _largest_ids(out):
        if fault:
            yield fault
        elif largest >= rows:
            yield f"{file} has token ids up to {largest}, {name} has {rows} rows; texts with such tokens will fail"
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(field)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= rows:
                yield f"config.json says {field} = {token}, {name} has {rows} rows"


def _largest_ids(out: Path) -> Iterator[tuple[str, int, str]]:
    """(file, largest token id in it, what is wrong with the file)."""
    for file, reader in (("tokenizer.json", _tokenizer_ids), ("vocab.json", lambda found: found.values())):
        if (out / file).exists():
            found, fault = _read_json(out / file)
            ids = [] if fault else [i for i in reader(found) if isinstance(i, int)]
            yield file, max(ids, default=-1), fault


def _tokenizer_ids(found: Mapping[str, Any]) -> list[Any]:
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    added = found.get("added_tokens")
    return ids + [token.get("id") for token in added or () if isinstance(token, dict)]
