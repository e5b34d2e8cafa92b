"""Values of a parameter that lie in a file, tensor by tensor: `weight: {file: coefficients.safetensors}`.

The file holds, for each parameter and tensor, `<parameter>/<tensor>`: [n] numbers, one for each model, or [n, c] where
the parameter takes several (`scale: {factor: ...}`); [1] and [1, c] are for all models alike.  Its metadata `models` is
the JSON list of the models' names, in order.  A tensor without an entry says nothing, as a list of cases does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.parameter import Vector
from weightsmith.io import system

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Table", "checked", "digest", "file_of", "read_table", "table_in_memory", "table_of", "write_table"]

KEYS = {"file", "sha256"}


class Table:
    """tensor -> model -> a number or a `Vector`; '' is every model."""

    def __init__(self, values: Mapping[str, Mapping[str, Any]], label: str = "coefficients in memory") -> None:
        self.values, self.label = values, label

    def at(self, tensor: str, model: str | None) -> Any:
        """The value of one tensor (and model), or None where nothing is said."""
        by_model = self.values.get(tensor)
        if by_model is None:
            return None
        if "" in by_model:
            return by_model[""]
        if model is None or model not in by_model:
            names = ", ".join(by_model)
            raise RecipeError(f"{self.label}: no coefficients of {model or 'all models'}; it has those of {names}")
        return by_model[model]


def table_in_memory(label: str, models: Sequence[str], values: Mapping[str, Tensor]) -> Table:
    """A table of tensor -> [n] or [n, c] values, as a file of coefficients holds them."""
    return Table({key: _by_model(label, key, list(models), tensor) for key, tensor in values.items()}, label)


def file_of(value: Any) -> str | None:
    """The path where a parameter's value is a file of coefficients."""
    if isinstance(value, Mapping) and isinstance(value.get("file"), str) and set(value) <= KEYS:
        return str(value["file"])
    return None


def checked(name: str, value: Mapping[str, Any], path: str) -> dict[str, str]:
    """The value with its absolute path and the file's hash.

    Raises ValueError for a file that is not there, was changed, or says nothing of the parameter.
    """
    if not Path(path).is_file():
        raise ValueError(f"{name}: {path}: no such file of coefficients")
    found = digest(path)
    if value.get("sha256", found) != found:
        raise ValueError(f"{name}: {path} was changed since the recipe was written; take the line sha256 out to use it")
    _read(path, found, name)
    return {"file": path, "sha256": found}


def table_of(name: str, value: Mapping[str, Any]) -> Table:
    """The table that a checked value stands for."""
    path = str(value["file"])
    found = digest(path)
    if value.get("sha256", found) != found:
        raise RecipeError(f"{name}: {path} was changed since the recipe was read")
    return _read(path, found, name)


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with system.call(Path(path).open, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_table(path: Path, models: tuple[str, ...], values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write parameter -> tensor -> [n] or [n, c] as a file of coefficients."""
    from safetensors.torch import save_file

    flat = {f"{name}/{key}": t.detach().clone() for name, by in values.items() for key, t in by.items()}
    system.call(
        save_file, flat, path, {"models": json.dumps(models)}
    )  # one entry: safetensors writes several in any order


def read_table(path: Path) -> dict[str, dict[str, Tensor]]:
    """What `write_table` has written: parameter -> tensor -> values."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {}
    for entry, values in system.call(load_file, path).items():
        name, _, key = entry.partition("/")
        found.setdefault(name, {})[key] = values
    return found


@lru_cache(maxsize=64)
def _read(path: str, sha: str, name: str) -> Table:
    from safetensors import SafetensorError, safe_open

    del sha  # part of the key: a file that was changed is read again
    try:
        with system.call(safe_open, path, "pt") as file:
            models = json.loads((file.metadata() or {}).get("models", "[]"))
            names = list(file.keys())
            held = {n.partition("/")[2]: file.get_tensor(n) for n in names if n.startswith(f"{name}/")}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: {path}: not a file of coefficients ({error})") from None
    if not held:
        hint = did_you_mean(name, {n.partition("/")[0] for n in names})
        raise ValueError(f"{name}: {path} holds no coefficients of this parameter{hint}")
    return Table({key: _by_model(path, key, models, tensor) for key, tensor in held.items()}, path)


def _by_model(path: str, key: str, models: list[str], tensor: Tensor) -> dict[str, Any]:
    if tensor.ndim not in (1, 2) or len(tensor) not in (1, len(models)) or not tensor.is_floating_point():
        raise ValueError(f"{path}: {key} has shape {list(tensor.shape)} for {len(models)} models")
    rows = [float(row) if row.numel() == 1 else Vector(row) for row in tensor.unbind()]
    return {"": rows[0]} if len(rows) < len(models) or not models else dict(zip(models, rows, strict=True))
