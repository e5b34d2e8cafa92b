"""Do two models number their tokens alike?  Merging embeddings of unlike vocabularies gives gibberish in silence."""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.read.small import read_json, short

__all__ = ["difference", "read_vocabulary"]

_FILES = ("tokenizer.json", "vocab.json")
_LIMIT = 100_000_000  # bytes; real ones have up to 35 MB
_MOST = 1 << 28  # tokens' numbers are below it; real ones are below 300,000


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> number, from tokenizer.json (or vocab.json); None where there is neither."""
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        found = read_json(path, _LIMIT)
        tokens = _tokens(found) if name == "tokenizer.json" else _numbers(found)
        for token, number in tokens.items():
            if not 0 <= number < _MOST:
                raise SourceError(f"{path}: the token {short(token)} has the number {short(number)}")
        return tokens
    return None


def difference(first: Path | None, second: Path | None) -> str | None:
    """How two folders' vocabularies contradict each other, in words; None if they do not, or one has none.

    More tokens at the end of one are no contradiction: rows and shapes tell of those.
    """
    if first is None or second is None or _same_file(first, second):
        return None
    a, b = read_vocabulary(first), read_vocabulary(second)
    if not a or not b:
        return None
    unlike = [token for token, number in a.items() if b.get(token, number) != number]
    taken = {number: token for token, number in b.items()}
    unlike += [t for t, number in a.items() if t not in b and number in taken and taken[number] not in a]
    if not unlike:
        return None
    token = min(unlike, key=lambda t: a[t])
    other = f"{b[token]}" if token in b else f"not there, {a[token]} is {taken[a[token]]!r}"
    return f"{len(unlike)} tokens differ, the first is {token!r}: {a[token]} against {other}"


def _same_file(first: Path, second: Path) -> bool:
    """Whether the first vocabulary file that either has is byte for byte the same."""
    for name in _FILES:
        a, b = first / name, second / name
        if a.is_file() and b.is_file():
            return a.stat().st_size == b.stat().st_size and system.read_file(a) == system.read_file(b)
    return False


def _tokens(found: object) -> dict[str, int]:
    """The vocabulary of a tokenizers file: a mapping, or (Unigram) a list of [token, score]; plus added tokens."""
    if not isinstance(found, dict):
        return {}
    model = found.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):
        texts = ((i, entry[0]) for i, entry in enumerate(listed) if isinstance(entry, list) and entry)
        tokens = {text: i for i, text in texts if isinstance(text, str)}
    else:
        tokens = _numbers(listed)
    added = found.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            tokens |= _numbers({entry["content"]: entry.get("id")})
    return tokens


def _numbers(found: object) -> dict[str, int]:
    if not isinstance(found, dict):
        return {}
    return {t: n for t, n in found.items() if isinstance(t, str) and type(n) is int}
