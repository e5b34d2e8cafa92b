"""Keys of locks: a file of mode 600 that nothing else ever holds the content of.

The secret drives all sampling.  What a model's card and manifest state is a hash of it, which tells keys apart and
nothing more.  Beside the secret the file holds what was locked and how, so that unlocking needs nothing but it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.align.invariance import Known, Scheme
from weightsmith.core.errors import OutputError, SourceError
from weightsmith.io import system
from weightsmith.io.disk import remove, sync_file, sync_folder, write_all, writing
from weightsmith.io.read.small import read_json

__all__ = ["PARTS", "Key", "new_secret", "read_key", "tidy_key", "write_key"]

PARTS = ("qk", "vo", "heads", "mlp")
"""What may be changed: queries and keys, values and outputs, the order of heads, hidden units of MLPs."""

_LIMIT = 64_000_000  # bytes of a key file: masks of equal gains of large models
_WHAT = "weightsmith lock key"
_VERSION = 1


@dataclass(frozen=True)
class Key:
    """One lock of one model.

    secret     64 hexadecimal digits
    parts      see PARTS;  condition: largest condition number of a matrix;  modules: globs of what is locked
    known      what was proved of the architecture
    equal      attention -> for each branch which pairs of gains are equal ('0110', '' where that does not matter)
    shapes     digest of the names, shapes and dtypes of the model
    unlocked   and locked: digests of samples of the tensors that the lock changes, before and after
    """

    secret: str = field(repr=False)
    parts: tuple[str, ...]
    condition: float
    modules: tuple[str, ...]
    known: Known
    equal: Mapping[str, tuple[str, ...]]
    shapes: str
    unlocked: str = ""
    locked: str = ""

    @property
    def hash(self) -> str:
        """What may be told of the key: a SHA-256 of its secret."""
        return hashlib.sha256(b"weightsmith lock\0" + bytes.fromhex(self.secret)).hexdigest()

    def draw(self, *words: object) -> np.random.Generator:
        """The generator for one thing: of a model's module, branch and head."""
        text = "\0".join(map(str, words)).encode()
        seed = hashlib.sha256(bytes.fromhex(self.secret) + b"\0" + text).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))


def new_secret(seed: int | None = None) -> str:
    """A random secret; from a seed the same one again, which whoever knows the seed has too."""
    if seed is None:
        return secrets.token_hex(32)
    return hashlib.sha256(f"weightsmith seed {seed}".encode()).hexdigest()


def write_key(path: Path, key: Key) -> None:
    """Write a key file, which nobody else may read, durably; OutputError where it cannot be, or is there already."""
    known = asdict(key.known) | {"still": sorted(key.known.still)}
    noted = {"what": _WHAT, "version": _VERSION, **asdict(key), "known": known}
    text = json.dumps({**noted, "sum": _sum(json.loads(json.dumps(noted)))}, indent=1) + "\n"
    staged = _staged(path)
    with writing(path):
        remove(staged)
        try:
            descriptor = system.call(os.open, staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                write_all(descriptor, text.encode())
            finally:
                os.close(descriptor)
            sync_file(staged)
            # Under its name it is whole, and never in place of another key: a rename would be one or the other.
            system.call(os.link, staged, path)
        except FileExistsError:
            raise OutputError(f"{path} exists already; choose another name for the key") from None
        finally:
            with suppress(OSError):  # there may be an error to report already
                remove(staged)
        sync_folder(path.parent)


def tidy_key(path: Path) -> None:
    """Remove what a run that was killed has left beside a key."""
    with writing(path):
        remove(_staged(path))


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def read_key(path: Path) -> Key:
    """Read a key file.

    Raises SourceError, which never shows what is in it, for a file that is none, is damaged, or that others may read.
    """
    try:
        mode = stat.S_IMODE(system.call(path.stat).st_mode)
    except OSError as error:
        raise SourceError(f"{path}: the key cannot be read ({error.strerror}); nothing is unlocked without") from None
    if mode & 0o077:
        raise SourceError(f"{path}: others may read this key (mode {mode:o}); run: chmod 600 {path}")
    noted = read_json(path, _LIMIT)
    if not isinstance(noted, dict) or noted.get("what") != _WHAT:
        raise SourceError(f"{path}: this is no key of weightsmith lock")
    if noted.get("version") != _VERSION:
        raise SourceError(f"{path}: a key of version {noted.get('version')!r}; this program reads version {_VERSION}")
    try:
        intact = noted.pop("sum") == _sum(noted)
        return _key(noted) if intact else _damaged(path)
    except (KeyError, TypeError, ValueError, AttributeError):
        return _damaged(path)


def _damaged(path: Path) -> Key:
    raise SourceError(f"{path}: the key is damaged: it does not match its own checksum; take a copy that is whole")


def _sum(noted: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()


def _key(noted: Mapping[str, Any]) -> Key:
    known = noted["known"]
    schemes = {
        kind: tuple(None if one is None else Scheme(**one) for one in own) for kind, own in known["schemes"].items()
    }
    scaled = {kind: None if one is None else (int(one[0]), bool(one[1])) for kind, one in known["scaled"].items()}
    read = Known(known["prefix"], schemes, scaled, frozenset(known["still"]), known["refused"], known["left"])
    if len(bytes.fromhex(noted["secret"])) != 32:
        raise ValueError("a secret of another length")
    return Key(
        noted["secret"], tuple(noted["parts"]), float(noted["condition"]), tuple(noted["modules"]), read,
        {name: tuple(masks) for name, masks in noted["equal"].items()}, noted["shapes"], noted["unlocked"],
        noted["locked"],
    )  # fmt: skip
