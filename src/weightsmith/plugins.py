"""Methods from outside the package: python files named on the command line.

Installed packages need nothing here: they declare an entry point in the group `weightsmith.methods`
that names the module (or function) which defines their methods, and the registry finds it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from weightsmith.core.errors import RecipeError, WeightsmithError

__all__ = ["line_in", "load_file", "run_file"]


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

    Raises RecipeError, with the file's line, if it cannot be run.  The file is code: it can do anything.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"{option} {file}: no such file")
    if file.suffix != ".py":
        raise RecipeError(f"{option} {file}: not a python file, named .py")
    name = f"weightsmith_{option.strip('-')}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except WeightsmithError as error:
        del sys.modules[name]
        raise RecipeError(f"{option} {file}: {error}") from None
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{option} {file}{line_in(error, file)}: {type(error).__name__}: {error}") from error
    return module


def line_in(error: BaseException, file: Path) -> str:
    """':7' for the last line of this file that took part in an error."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
