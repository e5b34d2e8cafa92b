"""A model's vocabulary, and which of its tensors have a row per token.  No code of a model's folder is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import LOGITS_BIAS, layer_of
from weightsmith.io.package.companions import tokenizer_files, tokenizer_home
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.small import read_json, read_small
from weightsmith.io.read.source import Source
from weightsmith.io.read.vocabulary import read_vocabulary

__all__ = ["Vocabulary", "read_tokens", "unite", "vocabulary_of", "vocabulary_tensors", "with_tokens"]

_NOT_TOKENS = re.compile(r"wpe|pos_embed|position|patch|token_type|segment|class_embed|relative|per_layer")
_SIZE = 100_000_000  # bytes of a tokenizer's file


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their numbers.

    ids      token -> number
    added    token -> its entry in tokenizer.json, for tokens that are matched before the text is cut into words
    folder   where the tokenizer lies
    kind     'BPE', 'WordPiece', 'WordLevel', 'Unigram'; '' where there is no tokenizer.json
    fresh    the entries of `added` that the files in `folder` do not have yet
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    kind: str = ""
    fresh: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def size(self) -> int:
        """The numbers are below this."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        return {number: token for token, number in self.ids.items()}


def read_tokens(folder: Path) -> Vocabulary | None:
    """The vocabulary in a folder; None where it has no tokenizer.  SourceError for one that cannot be read."""
    ids = read_vocabulary(folder)
    added: dict[str, Mapping[str, Any]] = {}
    kind = ""
    if ids is not None and (folder / "tokenizer.json").is_file():
        found = read_json(folder / "tokenizer.json", _SIZE)
        entries = found.get("added_tokens") if isinstance(found, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                added[entry["content"]] = entry
        model = found.get("model") if isinstance(found, dict) else None
        kind = str(model.get("type") or "") if isinstance(model, dict) else ""
    elif ids is not None or (folder / "vocab.txt").is_file():
        ids = dict(ids) if ids is not None else _lines(folder / "vocab.txt")
        extra = read_json(folder / "added_tokens.json", _SIZE) if (folder / "added_tokens.json").is_file() else {}
        ids |= {t: n for t, n in (extra.items() if isinstance(extra, dict) else ()) if type(n) is int and n >= 0}
    elif tokenizer_files(folder):
        ids = _through_transformers(folder)
    return Vocabulary(ids, added, folder, kind) if ids else None


def vocabulary_of(source: Source) -> Vocabulary | None:
    """The vocabulary that a source's rows are numbered by; None where nothing tells."""
    origin = source.origin
    if origin.numbering is not None:
        found: Vocabulary = origin.numbering.new
        return found
    home = tokenizer_home(origin)
    return None if home is None or not home.is_dir() else read_tokens(home)


def unite(vocabularies: Iterable[tuple[Vocabulary, int]]) -> Vocabulary:
    """The union: the first vocabulary as it is, then what others have more: ordinary tokens, then added ones.

    Each vocabulary comes with the number of rows that its model has; tokens of later ones that have no row are left
    out.  Where two disagree about an added token the first counts.
    """
    (first, _), *others = vocabularies
    ordinary: dict[str, Mapping[str, Any]] = {}
    special: dict[str, Mapping[str, Any]] = {}
    for vocabulary, rows in others:
        for token, number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
            if number < rows and token not in first.ids:
                if token in vocabulary.added:
                    special.setdefault(token, vocabulary.added[token])
                else:
                    ordinary.setdefault(token, {})
    return with_tokens(first, {t: e for t, e in ordinary.items() if t not in special} | special)


def with_tokens(vocabulary: Vocabulary, tokens: Mapping[str, Mapping[str, Any]]) -> Vocabulary:
    """The vocabulary with further added tokens at its end; tokens that it has stay as they are."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True}
    fresh: list[dict[str, Any]] = []
    for token, entry in tokens.items():
        if token not in vocabulary.ids:
            fresh.append({"id": vocabulary.size + len(fresh), "content": token, **plain, **_settings(entry)})
    return Vocabulary(
        {**vocabulary.ids, **{str(e["content"]): int(e["id"]) for e in fresh}},
        {**vocabulary.added, **{str(e["content"]): e for e in fresh}},
        vocabulary.folder,
        vocabulary.kind,
        (*vocabulary.fresh, *fresh),
    )


def vocabulary_tensors(source: Source) -> tuple[tuple[str, ...], int]:
    """The tensors with a row per token (embedding, head, head's bias) and how many rows they have; ((), 0) if none.

    They are known by their role and by the config's vocab_size; without that, by the largest embedding's rows.
    """
    known = [k for k in source.keys.values() if k.shape and k.floating and layer_of(k.name) is None]
    likely = [k for k in known if not _NOT_TOKENS.search(k.name) and (
        (len(k.shape) == 2 and k.role in ("embed", "head")) or (k.name.endswith("bias") and k.role == "head")
        or "predictions" in k.name
    )]  # fmt: skip
    sizes = set(_sizes(source))
    stated = [k.rows for k in likely if k.rows in sizes]
    rows = max(stated or [k.rows for k in likely if k.role == "embed"], default=0)
    found = tuple(k.name for k in likely if k.rows == rows and rows)
    if found and (odd := next((n for n in source.keys if n.endswith(LOGITS_BIAS)), None)):
        raise SourceError(f"{source}: {odd} has its tokens along the second axis; give it no other vocabulary")
    return found, rows if found else 0


def _sizes(source: Source) -> Iterator[int]:
    try:
        config = json.loads(config_of(source) or "{}")
    except ValueError:
        return
    scopes = [config, *(v for v in config.values() if isinstance(v, dict))] if isinstance(config, dict) else []
    yield from (scope["vocab_size"] for scope in scopes if isinstance(scope.get("vocab_size"), int))


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in ("id", "content")}


def _lines(path: Path) -> dict[str, int]:
    try:
        text = read_small(path, _SIZE).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} cannot be read as a vocabulary: {error}") from None
    return {line.rstrip("\r"): i for i, line in enumerate(text.removesuffix("\n").split("\n"))}


def _through_transformers(folder: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer without a readable file (sentencepiece, tiktoken)."""
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_vocab()
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{folder}: its tokenizer cannot be read ({said}); save it as tokenizer.json") from None
    return {str(token): int(number) for token, number in found.items()}
