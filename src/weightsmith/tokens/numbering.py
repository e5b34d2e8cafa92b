"""What else speaks of token numbers: config.json, generation_config.json, the tokenizer's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.disk import write_file
from weightsmith.tokens.vocabulary import Vocabulary

__all__ = ["Numbering", "special_numbers"]

_NUMBER = re.compile(r"\w*_token_(?:id|index|ids)")


@dataclass(frozen=True)
class Numbering:
    """From a model's own token numbers to those of the output.

    old, new   the vocabularies
    rows       of the token tensors, before and after
    others     numbers in the new vocabulary, by config field, for tokens that it spells otherwise (eos_token_id: 2)
    own_first  whether the model's own special tokens are looked for before those of `others`
    before     of a model that is itself shown in another vocabulary than its files
    """

    old: Vocabulary
    new: Vocabulary
    rows: tuple[int, int]
    others: Mapping[str, Any] = field(default_factory=dict)
    own_first: bool = True
    before: Numbering | None = None

    def config(self, text: str) -> str:
        """config.json with the output's vocab_size and token numbers."""
        return _text(self._renumbered(_parsed(text, "config.json")))

    def write(self, folder: Path) -> list[Path]:
        """Bring the files that were copied into the output's folder into line; returns those that it rewrote."""
        changed = []
        path = folder / "generation_config.json"
        if path.is_file():
            found = _read(path) if self.before is None else self.before._renumbered(_read(path))
            changed.append(write_file(path, _text(self._renumbered(found))))
        if self.new.fresh:
            changed += [write_file(folder / name, _text(found)) for name, found in self._with_fresh(folder)]
        return changed

    def _with_fresh(self, folder: Path) -> Iterator[tuple[str, Any]]:
        """The tokenizer's files with the tokens that are new."""
        path = folder / "tokenizer.json"
        found = _read(path)
        yield path.name, {**found, "added_tokens": [*(found.get("added_tokens") or []), *self.new.fresh]}
        path = folder / "tokenizer_config.json"
        if path.is_file() and isinstance((found := _read(path)).get("added_tokens_decoder"), dict):
            entries = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in self.new.fresh}
            yield path.name, {**found, "added_tokens_decoder": {**found["added_tokens_decoder"], **entries}}
        path = folder / "added_tokens.json"
        if path.is_file():
            yield path.name, {**_read(path), **{e["content"]: e["id"] for e in self.new.fresh}}

    def _renumbered(self, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        out = {}
        for name, value in found.items():
            if name == "vocab_size" and value == self.rows[0]:
                out[name] = self.rows[1]
            elif _NUMBER.fullmatch(name):
                out[name] = self._number(name, value)
            else:
                out[name] = self._renumbered(value)
        return out

    def _number(self, name: str, value: Any) -> Any:
        if not self.own_first and name in self.others:
            return self.others[name]
        if isinstance(value, list):
            numbers = [self._one(number) for number in value]
            return [n for n in numbers if n is not None] or self.others.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        found = self._one(value)
        return self.others.get(name) if found is None else found

    def _one(self, number: Any) -> int | None:
        token = self.old.tokens.get(number)
        return None if token is None else self.new.ids.get(token)


def special_numbers(folder: Path | None) -> dict[str, Any]:
    """The numbers of special tokens that a folder's config.json states: {'eos_token_id': 2}."""
    path = None if folder is None else folder / "config.json"
    found = _read(path) if path is not None and path.is_file() else {}
    return {k: v for k, v in found.items() if _NUMBER.fullmatch(k) and v is not None} if isinstance(found, dict) else {}


def _read(path: Path) -> Any:
    try:
        return _parsed(system.read_file(path).decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _parsed(text: str, label: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{label} is no JSON: {error}") from None


def _text(found: Any) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
