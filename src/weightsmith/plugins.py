"""Methods from outside the package: python files named on the command line.

Installed packages need nothing here: they declare an entry point in the group `weightsmith.methods`
that names the module (or function) which defines their methods, and the registry finds it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

from weightsmith.core.errors import RecipeError, WeightsmithError

__all__ = ["blamed", "home_of", "line_in", "load_file", "neighbours", "run_file", "run_once"]

_RUN: dict[str, str] = {}
"""File that was run, as its code knows it -> the option and the file as the user named them."""
_HELD: dict[Path, tuple[bytes, ModuleType]] = {}
"""File that was run once -> what it held then, and its module."""


def load_file(path: str | Path) -> ModuleType:
    """Run a python file that defines methods; they are then known by name, as built-in ones are.

    Raises RecipeError if the file cannot be run, or defines no method.  The file is code: it can do anything.
    """
    from weightsmith.core.method import registered

    module = run_file(path, "--plugin")
    if not any(cls.__module__ == module.__name__ for cls in registered().values()):
        raise RecipeError(
            f'--plugin {path}: it defines no method; write class Mine(Method, name="mine") with a merge(site)'
        )
    return module


def run_file(path: str | Path, option: str) -> ModuleType:
    """Run a python file that the user has named with `option`, and return it as a module.

    It may import files that lie beside it.  Raises RecipeError, with the file's line, if it cannot be run.  The file is
    code: it can do anything.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"{option} {file}: no such file")
    if file.suffix != ".py":
        raise RecipeError(f"{option} {file}: not a python file, named .py")
    name = f"weightsmith_{option.strip('-')}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    beside = str(file.resolve().parent)
    _RUN[str(file.absolute())] = f"{option} {file}"
    sys.path.insert(0, beside)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ among the user's files
    try:
        with redirect_stdout(sys.stderr):  # what it prints is no part of a report in JSON
            spec.loader.exec_module(module)
    except WeightsmithError as error:
        del sys.modules[name]
        raise RecipeError(f"{option} {file}: {error}") from None
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{option} {file}{line_in(error, file)}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = kept
        sys.path.remove(beside)
        if beside not in sys.path:
            sys.path.append(beside)  # for what it imports later; it cannot hide other modules from here on
    return module


def run_once(path: str | Path, option: str) -> ModuleType:
    """`run_file`, but once for all who ask, until what the file holds changes."""
    file = Path(path).expanduser().absolute()
    held = file.read_bytes() if file.is_file() else None
    if held is not None and file in _HELD and _HELD[file][0] == held:
        return _HELD[file][1]
    module = run_file(path, option)
    if held is not None:
        _HELD[file] = held, module
    return module


def neighbours(path: str | Path) -> tuple[Path, ...]:
    """The files beside and below a file that has been run which it, or they, have imported; sorted."""
    home = Path(path).expanduser().resolve().parent
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    # Some modules name no file that exists, as torch._classes does.
    found = {Path(file).resolve() for file in files if isinstance(file, str) and Path(file).is_absolute()}
    own = Path(__file__).resolve().parent
    return tuple(sorted(
        file for file in found
        if home in file.parents and own not in file.parents and file.suffix == ".py" and not _installed(file, home)
    ))  # fmt: skip


def _installed(file: Path, home: Path) -> bool:
    """Whether a file belongs to an environment that stands in the folder."""
    parts = file.relative_to(home).parts
    return (
        "site-packages" in parts
        or "dist-packages" in parts
        or any((home / part / "pyvenv.cfg").exists() for part in parts[:1])
    )


def _kinds(kind: type) -> Iterator[type]:
    """A class and all that are made of it."""
    yield kind
    derived: list[type] = kind.__subclasses__()
    for one in derived:
        yield from _kinds(one)


def home_of(kind: type) -> str:
    """Where a class from outside the package is defined: '--plugin mine.py', or a file; '' for one of the package."""
    if kind.__module__.startswith("weightsmith."):
        return ""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__
    return _RUN.get(file, file)


def blamed(error: BaseException) -> str:
    """'--plugin mine.py:7' where code from outside the package took part in an error last; '' if none did.

    Of an installed plug-in: its file and line.
    """
    from weightsmith.core.method import Stage

    outside = {kind.__module__ for kind in _kinds(Stage) if not kind.__module__.startswith("weightsmith.")}
    found, trace = "", error.__traceback__
    while trace is not None:
        file, name = trace.tb_frame.f_code.co_filename, trace.tb_frame.f_globals.get("__name__")
        if file in _RUN:
            found = f"{_RUN[file]}:{trace.tb_lineno}"
        elif name in outside:
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def line_in(error: BaseException, file: Path) -> str:
    """':7' for the last line of this file that took part in an error."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file.absolute()):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
