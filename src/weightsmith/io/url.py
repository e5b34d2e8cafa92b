"""Places that are URLs (s3://, gs://, https://, memory://, ...), reached through fsspec and nothing of our own.

A URL may stand wherever a path does.  `pathlib` writes one with a single slash (s3:/bucket/x): that is understood
too, so that paths go through programs as they are.  What the URL's user, password or query say is never shown.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from weightsmith.core.errors import MissingExtra, OutputError, SourceError, WeightsmithError, public
from weightsmith.core.keys import good_name
from weightsmith.io import system

__all__ = ["Url", "absolute", "attempt", "destination", "filesystem", "missing", "output_of", "parse_url", "place_of",
           "said", "stored_at", "without_secrets"]  # fmt: skip

_FORM = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):(?P<slashes>/{1,3})(?P<rest>[^/?][^?]*)(?P<query>\?.*)?")
_LOCAL = ("file", "local")
_TRIES = 4
_PAUSE = 0.25  # seconds before the second try; doubled for each one after it
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
"""Answers that another try would not change."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Url:
    """scheme://rest?query, without a slash at the end.  Its text form leaves out user, password and query."""

    scheme: str
    rest: str
    query: str = ""

    @property
    def full(self) -> str:
        return f"{self.scheme}://{self.rest}{self.query}"

    def __str__(self) -> str:
        return public(self.full)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def name(self) -> str:
        return self.rest.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.rest.rpartition("/")[0] or self.rest, self.query)

    @property
    def is_http(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def location(self) -> Path:
        """What stands for it among paths (see `Origin.locations`)."""
        return Path(f"{self.scheme}:/{self.rest.rpartition('@')[2]}")

    def __truediv__(self, name: str) -> Url:
        return Url(self.scheme, f"{self.rest}/{name}", self.query)


def parse_url(ref: object) -> Url | Path | None:
    """The URL that a text or path is; a Path for file:// ones; None for what is none (a path, a hub id).

    s3:/bucket/x, as pathlib writes it, is a URL where fsspec knows the scheme and no such path exists.
    """
    found = _FORM.fullmatch(str(ref)) if isinstance(ref, (str, Path)) else None
    if found is None:
        return None
    scheme, rest = found["scheme"], found["rest"].rstrip("/")
    if found["slashes"] == "/":
        from fsspec.registry import known_implementations

        if scheme not in known_implementations or Path(str(ref)).exists():
            return None
    if scheme in _LOCAL:
        return Path(f"/{rest}{found['query'] or ''}")
    return Url(scheme, rest, found["query"] or "")


def without_secrets(value: Any) -> Any:
    """Plain JSON values with every URL in them shown without user, password and query."""
    if isinstance(value, Mapping):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner) for inner in value]
    return public(value) if isinstance(value, str) and _FORM.fullmatch(value) else value


def filesystem(url: Url) -> tuple[Any, str]:
    """(fsspec's file system, the path in it).

    Raises MissingExtra where the scheme needs a package that is not installed, WeightsmithError for no scheme at all.
    """
    import fsspec
    from fsspec.registry import known_implementations

    try:
        found: tuple[Any, str] = system.call(fsspec.core.url_to_fs, url.full)
        return found
    except ImportError:
        package = str(known_implementations.get(url.scheme, {}).get("class", url.scheme)).partition(".")[0]
        needed = {"fsspec": "aiohttp" if url.is_http else f"fsspec[{url.scheme}]"}.get(package, package)
        raise MissingExtra(needed, "", str(url)) from None
    except ValueError as error:
        raise WeightsmithError(f"{url}: {said(error)}; known: s3, gs, abfs, hf, https, memory, file, ...") from None


def attempt(
    what: str, kind: type[WeightsmithError], function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> R:
    """function(*args), tried again a few times where the network or the store failed; then an error of that kind.

    FileNotFoundError and its like come through as they are, at once.
    """
    for tries in range(1, _TRIES + 1):
        try:
            return system.call(function, *args, **kwargs)
        except (*_FOR_GOOD, WeightsmithError):
            raise
        except Exception as error:  # every store's library has errors of its own, of no common kind
            if tries == _TRIES:
                advice = "check the network and your access" + ("" if kind is SourceError else ", then --resume")
                raise kind(f"{what} failed {tries} times ({said(error)}); {advice}") from None
            time.sleep(_PAUSE * 2 ** (tries - 1))
    raise AssertionError


@contextmanager
def missing(url: Url, kind: type[WeightsmithError]) -> Iterator[None]:
    """Turn what `attempt` lets through into one line."""
    try:
        yield
    except _FOR_GOOD as error:
        words = {FileNotFoundError: "no such file", PermissionError: "access is refused"}
        why = next((text for what, text in words.items() if isinstance(error, what)), said(error))
        raise kind(f"{url}: {why}") from None


def stored_at(folder: Url, kind: type[WeightsmithError] = SourceError, depth: int = 2) -> dict[str, int | None]:
    """Relative names of the files in a folder (and in its own folders) -> bytes, where the store says so.

    Nothing is there: no names.  Of a web server's page only links into the folder count, whatever it lists.
    """
    fs, path = filesystem(folder)
    fs.invalidate_cache()
    with missing(folder, kind):
        try:
            if folder.is_http:
                listed = attempt(f"{folder}: listing", kind, fs.ls, path, detail=True)
                found = {entry["name"]: entry for entry in listed if entry.get("type") == "file"}
            else:
                found = attempt(f"{folder}: listing", kind, fs.find, path, maxdepth=depth, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    start = f"{path.partition('?')[0].rstrip('/')}/"
    names = {
        name.partition("?")[0].removeprefix(start): entry for name, entry in found.items() if name.startswith(start)
    }
    return {name: entry.get("size") for name, entry in sorted(names.items()) if _inside(name)}


def _inside(name: str) -> bool:
    return good_name(name) and "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def place_of(path: Path) -> Path | Url:
    """The URL that a path stands for (s3:/bucket/x), or the path."""
    return parse_url(path) or path


def output_of(place: object) -> Url | None:
    """The URL that an output goes to; None for a folder of this machine."""
    found = parse_url(place)
    if isinstance(found, Url) and found.is_http:
        raise OutputError(f"{found}: web addresses are for reading; write to a folder or an object store")
    return found if isinstance(found, Url) else None


def absolute(path: Path) -> Path:
    """The path that is meant, with links followed; OutputError for a URL of another place than this machine."""
    found = parse_url(path)
    if isinstance(found, Url):
        raise OutputError(f"{found}: this is written to folders of this machine only; name one")
    return Path(os.path.realpath((found or Path(path)).expanduser()))


def destination(out: Path) -> Path | Url:
    """Where an output goes: a folder of this machine, with links followed, or a URL (s3:/bucket/x as a path)."""
    return output_of(out) or absolute(out)


def said(error: Exception) -> str:
    """An error's kind and first line, without anything in it that lets others in."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    return public(f"{type(error).__name__}: {text}")[:200]
