"""Four unlike kinds of text that the demo's own dependencies ship: Python, English prose, JSON and French.

Nothing is downloaded, and the packages' versions are pinned, so everybody trains on the same bytes.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from demo.family import fingerprint, write

DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # import name -> name of the package
SPLITS = ("train", "validation", "test")
PER_FILE = 60_000  # characters taken of one file at most, so that no file rules its domain
PER_DOMAIN = 600_000  # characters; training reads about half of it
SHORTEST = 500  # characters of a document, so that many unlike windows fit into it

Reader = Callable[[Path], Iterable[str]]
"""What counts as text of a kind: the documents of one file."""

Corpus = Mapping[str, Mapping[str, tuple[bytes, ...]]]
"""Domain -> split -> documents: a file each, or several messages of a catalogue."""


def corpus(home: Path) -> Corpus:
    """Read all four domains, or what an earlier run with the same packages kept of them under `home`.

    Documents are shuffled by a hash of their names; each belongs to one split only.
    """
    packages = sorted({package for sources in SOURCES.values() for package, _ in sources})
    key = fingerprint([version(DISTRIBUTIONS.get(name, name)) for name in packages], Path(__file__).read_text("utf-8"))
    kept = home / f"corpus-{key}.json"
    if not kept.is_file():
        texts = {domain: split_by_document(documents(SOURCES[domain], READERS[domain])) for domain in SOURCES}
        write(kept, json.dumps(texts))
    return {
        domain: {split: tuple(text.encode() for text in texts) for split, texts in splits.items()}
        for domain, splits in json.loads(kept.read_text("utf-8")).items()
    }


def documents(sources: Iterable[tuple[str, str]], reader: Reader) -> Iterator[str]:
    """The documents in the files of some (package, pattern) pairs, up to PER_DOMAIN characters."""
    found = {name: path for package, pattern in sources for name, path in files(package, pattern)}
    total = 0
    for name in sorted(found, key=_shuffled):
        for document in reader(found[name]):
            text = document.strip()[:PER_FILE]
            if len(text) >= SHORTEST:
                yield text
                total += len(text)
            if total >= PER_DOMAIN:
                return


def split_by_document(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Four documents of six to training, one to validation, one to test; a text met before is dropped."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, text in enumerate(dict.fromkeys(texts)):
        parts[("train", "train", "validation", "train", "test", "train")[number % 6]].append(text)
    return {split: tuple(texts) for split, texts in parts.items()}


def files(package: str, pattern: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of a package's files, without importing it; vendored copies and test code are left out."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the demo reads files of {package}, which is not installed; run `make setup`")
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in root.glob(pattern):
        name = path.relative_to(root.parent).as_posix()
        if not re.search(r"/_?(vendor\w*|externals?|array_api\w*)/|/test_", name):
            yield name, path


def _shuffled(name: str) -> bytes:
    """A key that sorts names into a random order, the same everywhere."""
    return hashlib.sha256(name.encode()).digest()


# --- readers: what counts as text of a kind --------------------------------------------------------


def python_code(path: Path) -> tuple[str]:
    """A source file without its docstrings (those are the English)."""
    source = path.read_text("utf-8")
    lines = source.splitlines()
    for node in _documented(source):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            span = slice(first.lineno - 1, first.end_lineno)
            lines[span] = [""] * len(lines[span])
    return (re.sub(r"\n(\s*\n){2,}", "\n\n", "\n".join(lines)),)


def english_prose(path: Path) -> tuple[str]:
    """The paragraphs of a source file's docstrings, or of a text file, that read like sentences."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = "\n\n".join(doc for node in _documented(text) if (doc := ast.get_docstring(node)))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return ("\n".join(dict.fromkeys(line for line in paragraphs if _is_prose(line))),)


def json_text(path: Path) -> tuple[str]:
    """A gzipped JSON file."""
    return (gzip.decompress(path.read_bytes()).decode("utf-8"),)


def catalogue(path: Path) -> Iterator[str]:
    """The translations of a compiled message catalogue, shuffled and joined to documents of SHORTEST or more.

    A message stands in one document only, so none is in two splits; what is left at the end makes no document.
    """
    from babel.messages.mofile import read_mo

    with path.open("rb") as file:
        translated = {_first(message.id): _first(message.string) for message in read_mo(file) if message.id}
    held: list[str] = []
    for text in dict.fromkeys(translated[name] for name in sorted(translated, key=_shuffled)):
        held.append(text)
        if sum(map(len, held)) >= SHORTEST:
            yield "\n".join(held)
            held = []


def _first(forms: str | list[str] | tuple[str, ...]) -> str:
    """A message, or the first form of one that has a plural (the forms are nearly the same text)."""
    return forms if isinstance(forms, str) else forms[0]


def _documented(source: str) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield node


def _is_prose(line: str) -> bool:
    """Long, starts like a sentence, ends like one, and has hardly any signs in it."""
    plain = sum(c.isalpha() or c in " ,.'" for c in line)
    like_a_sentence = len(line) >= 100 and line[0].isupper() and line[-1] in ".:" and " : " not in line
    return like_a_sentence and plain >= 0.95 * len(line)


SOURCES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Python": (("sklearn", "**/*.py"),),
    "English": (("scipy", "**/*.py"), ("numpy", "**/*.py"), ("sklearn", "datasets/descr/*.rst")),
    "JSON": (("sklearn", "datasets/tests/data/**/*.json.gz"),),
    "French": (("sphinx", "locale/fr/LC_MESSAGES/sphinx.mo"),),
}
READERS: Mapping[str, Reader] = {
    "Python": python_code,
    "English": english_prose,
    "JSON": json_text,
    "French": catalogue,
}
