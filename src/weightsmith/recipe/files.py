"""Recipe files: finding them, and reading their text with limits."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

from weightsmith.core.errors import RecipeError
from weightsmith.io import system
from weightsmith.recipe.reader import MAX_BYTES

__all__ = ["SUFFIXES", "exists", "expanded", "text_of"]

SUFFIXES = (".yaml", ".yml", ".json")


def text_of(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):  # those the shell makes: <(...)
            raise RecipeError(f"{path}: a pipe, not a recipe file")
        raw = system.read_file(path, MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path}: more than {MAX_BYTES:,} bytes; a recipe has at most that")
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; give the recipe file in it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text; is this a recipe?") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names: list[str] = []
    with contextlib.suppress(OSError):  # no more than a hint
        names = [p.name for p in system.call(list, folder.iterdir()) if p.suffix in SUFFIXES] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(folder / near[0])!r}?" if near else ""


def expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody who has no home here
        return Path(path)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a NUL
        return False
