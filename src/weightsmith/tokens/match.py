"""Which tokens of two tokenizers are the same, although they spell word starts, bytes and special tokens their way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from weightsmith.core.errors import SourceError
from weightsmith.io.read.small import read_json
from weightsmith.tokens.vocabulary import Vocabulary

__all__ = ["ROLES", "byte_twin", "keys_of", "prefixes", "roles_of", "spelling", "texts"]

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_LIMIT = 50_000_000  # bytes of tokenizer_config.json


def roles_of(folder: Path | None) -> dict[str, str]:
    """Role -> token, of the special tokens that a tokenizer's config names: {'bos': '<s>'}."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if folder is None or not (folder / name).is_file():
            continue
        config = read_json(folder / name, _LIMIT)
        if not isinstance(config, dict):
            raise SourceError(f"{folder / name} should hold names and values, holds {json.dumps(config)[:40]}")
        for role in ROLES:
            value = config.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[role] = value
    return found


def spelling(vocabulary: Vocabulary) -> str:
    """How its tokens are written: 'bytes' (GPT-2's letters for bytes), 'blocks' (U+2581 for a space), 'hashes', ''."""
    if vocabulary.kind == "WordPiece" or any(t.startswith("##") and len(t) > 2 for t in vocabulary.ids):
        return "hashes"
    bytewise = sum(token.startswith("\u0120") for token in vocabulary.ids)
    blocks = sum(token.startswith("\u2581") for token in vocabulary.ids)
    return "" if not bytewise and not blocks else "bytes" if bytewise >= blocks else "blocks"


def texts(vocabulary: Vocabulary) -> Iterator[tuple[str, int]]:
    """(text, number) of every token, by number; a word's first token begins with a space."""
    how = spelling(vocabulary)
    for token, number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
        yield (token if token in vocabulary.added else _text(token, how)), number


def keys_of(vocabulary: Vocabulary) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number, what it may be found by, the best first) of every token: its roles ('\\0bos'), then its text."""
    roles: dict[str, list[str]] = {}
    for role, token in roles_of(vocabulary.folder).items():
        roles.setdefault(token, []).append(f"\0{role}")
    for text, number in texts(vocabulary):
        yield number, (*roles.get(vocabulary.tokens.get(number, ""), ()), text)


def prefixes(text: str) -> Iterator[str]:
    """Every shorter beginning of a text, the longest first; not the space alone."""
    for end in range(len(text) - 1, 0, -1):
        if not text[:end].strip():
            return
        yield text[:end]


def byte_twin(text: str) -> str | None:
    """'<0x41>' for 'A' and the other way round; None for longer texts."""
    if len(text) == 1 and ord(text) < 128:
        return f"<0x{ord(text):02X}>"
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            byte = int(text[3:5], 16)
        except ValueError:
            return None
        return chr(byte) if byte < 128 else None  # beyond that a letter has several bytes
    return None


def _text(token: str, how: str) -> str:
    if how == "blocks":
        return token.replace("\u2581", " ")
    if how == "hashes":
        return token[2:] if token.startswith("##") else f" {token}"
    if how == "bytes":
        letters = _letters()
        if all(letter in letters for letter in token):
            raw = bytes(letters[letter] for letter in token)
            try:
                return raw.decode()
            except UnicodeDecodeError:  # part of a character: such tokens are alike in all byte-wise tokenizers
                return "\0bytes" + raw.hex()
    return token


@lru_cache(maxsize=1)
def _letters() -> Mapping[str, int]:
    """GPT-2's letter for each byte: itself where it is printable Latin-1, else the next free one from U+0100."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
