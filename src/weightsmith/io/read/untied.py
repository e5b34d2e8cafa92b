"""Models of which some tie the head to the embedding and some do not: all are shown with a head of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from weightsmith.core.keys import Key
from weightsmith.io.architectures import (
    EMBEDDINGS,
    OUTPUT_LAYERS,
    TEXT_TO_TEXT,
    TIED,
    TIED_BY_DEFAULT,
    TIED_BY_PARTS,
    WITHOUT_TOKENS_IN,
)
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import RenamedSource

__all__ = [
    "SHARED_SAYS",
    "UntiedSource",
    "bias_of",
    "bias_twin",
    "grown_config",
    "is_output_layer",
    "says_tied",
    "shares",
    "tables",
    "untied",
    "untied_config",
]

SHARED_SAYS = "transformers 5 loads it beside the embedding that encoder and decoder share; older releases tie the two"
"""Of an encoder-decoder's output layer with a weight of its own, whose config.json stays as it was."""


class UntiedSource(RenamedSource):
    """A model whose head is its embedding, with that head as a tensor of its own.

    heads  the head's name -> the embedding's
    """

    shows = "untied"

    def __init__(self, source: Source, heads: Mapping[str, str]) -> None:
        super().__init__(source, {name: name for name in (*source.keys, *source.aliases) if name not in heads})
        self.names |= {head: (0, embedding) for head, embedding in heads.items()}
        own = {new: Key(new, (k := source.key(old)).shape, k.dtype) for new, old in heads.items()}
        self.keys = {**self.keys, **own}
        text = config_of(source)
        config = None if text is None else untied_config(text)
        head, embedding = next(iter(heads.items()))
        own_way = f"{TIED}: false" if text is None or not shares(_parsed(text)) else SHARED_SAYS
        remark = f"tied to {embedding}, {head} becomes a tensor of its own, as another model has it ({own_way})"
        origin = source.origin
        self.origin = replace(origin, config=config, remarks=(*origin.remarks, remark))


def untied_config(text: str) -> str:
    """A config.json that says that the output layer has a weight of its own.

    That of an encoder-decoder stays as it is: there the flag is also about the embeddings of encoder and decoder, and
    T5 scales by it what goes into the output layer.  transformers 5 ties no two weights that are stored and differ.
    """
    config = _parsed(text)
    if shares(config):
        return text
    for scope in _scopes(config):
        if TIED in scope:
            scope[TIED] = False
    return _text({**config, TIED: False})


def grown_config(text: str, rows: Mapping[int, int]) -> str:
    """A config.json with other numbers of tokens: rows before -> rows now."""
    config = _parsed(text)
    for scope in _scopes(config):
        size = scope.get("vocab_size")
        scope |= {"vocab_size": rows[size]} if isinstance(size, int) and size in rows else {}
    return _text(config)


def untied(models: Mapping[str, Source], kept: Callable[[str], bool]) -> dict[str, Source]:
    """The models, those with a tied head untied where another has a head of its own.

    kept  whether a tensor is taken as it is from the first model, which then stays tied

    Encoder-decoders that say they are not tied make no others so: T5 scales what goes into a tied head, so that the two
    are not the same model.
    """
    owners = [source for source in models.values() if not _apart(_config(source) or {})]
    own = [key for source in owners for key in source.keys.values() if is_output_layer(source, key)]
    heads = {key.name: key for key in own if not kept(key.name)}
    found = {}
    for name, source in models.items():
        tied = {head: embedding for head, key in heads.items() if (embedding := _embedding(source, key)) is not None}
        tied |= {bias: plain for head in tied if (plain := bias_twin(source, bias := bias_of(head))) is not None}
        found[name] = UntiedSource(source, tied) if tied else source
    return found


def is_output_layer(source: Source, key: Key) -> bool:
    """Whether a tensor is a head that could be tied: one of the shape of its own model's embedding."""
    if key.role != "head":
        known = OUTPUT_LAYERS.get(str((_config(source) or {}).get("model_type")))
        if known is None or key.name != f"{known}.weight":
            return False
    return any(table.shape == key.shape for table in tables(source))


def bias_twin(source: Source, bias: str) -> str | None:
    """The tensor that an output layer's bias is, where that is not stored: BERT's `cls.predictions.bias`."""
    module, _, leaf = bias.rpartition(".")[0].rpartition(".")
    plain = f"{module}.bias"
    return plain if leaf == "decoder" and plain in source.keys and bias not in source.keys else None


def bias_of(weight: str) -> str:
    """The name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def tables(source: Source) -> list[Key]:
    """The embeddings of tokens by what they are called; all embeddings, of positions too, where none is called so."""
    found = [key for key in source.keys.values() if key.role == "embed"]
    return [key for key in found if key.name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS] or found


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json ties the output layer to the embedding: for the model, for a part of it, or by default."""
    said = [scope[TIED] for scope in _scopes(config) if scope.get(TIED) is not None]
    if said:
        return any(value is True for value in said)
    parts = _scopes(config)[1:] if config.get("model_type") in TIED_BY_PARTS else [config]
    return any(part.get("model_type") in TIED_BY_DEFAULT for part in parts)


def shares(config: Mapping[str, Any]) -> bool:
    """Whether the embedding of a tied model is that of an encoder and a decoder, too."""
    kind = config.get("model_type")
    return kind in TEXT_TO_TEXT or (bool(config.get("is_encoder_decoder")) and kind not in WITHOUT_TOKENS_IN)


def _apart(config: Mapping[str, Any]) -> bool:
    return shares(config) and not says_tied(config)


def _embedding(source: Source, head: Key) -> str | None:
    """The tensor that a model's head is tied to, or None."""
    if head.name in source.keys:
        return None
    if head.name in source.aliases:
        return source.aliases[head.name]
    config = _config(source) or {}
    if not says_tied(config):
        return None
    alike = [table.name for table in tables(source) if table.shape[1:] == head.shape[1:]]
    return alike[0] if len(alike) == 1 else None


def _config(source: Source) -> dict[str, Any] | None:
    return _parsed(config_of(source) or "null") or None


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}  # whoever needs it will say what is wrong with it
    return found if isinstance(found, dict) else {}


def _scopes(config: Mapping[str, Any]) -> list[Any]:
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
