"""The journal of a tuning: everything that the next step depends on, written whole after each step."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import replace_file

__all__ = ["Journal", "State", "write_curve"]

NAME = "journal.safetensors"


@dataclass
class State:
    """step: steps done; tensors: by name; curve: a row per step; best: (loss of validation, step) so far."""

    step: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, int] | None = None
    watched: dict[str, Any] = field(default_factory=dict)


class Journal:
    """A file beside the results; `identity` says which tuning it belongs to."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def read(self) -> State | None:
        """The state of a run that was interrupted, or None; OutputError if it is another's."""
        if self.folder is None or not (path := self.folder / NAME).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with system.call(safe_open, path, "pt") as file:
                noted = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{path}: not a journal of weightsmith tune ({error}); take it away to begin anew"
            ) from None
        if noted["identity"] != self.identity:
            raise OutputError(
                f"{path} belongs to another tuning (other recipe, data or settings); choose another folder"
            )
        best = None if noted["best"] is None else (noted["best"][0], noted["best"][1])
        return State(noted["step"], tensors, noted["curve"], best, noted["watched"])

    def write(self, state: State) -> None:
        """Replace the file: it holds one step or the next, whenever the process ends."""
        if self.folder is None:
            return
        from safetensors.torch import save

        noted = {"identity": self.identity, "step": state.step, "curve": state.curve, "best": state.best,
                 "watched": state.watched}  # fmt: skip
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.tensors.items()}
        replace_file(self.folder / NAME, save(tensors, {"state": json.dumps(noted)}))

    def done(self) -> None:
        """The run got through."""
        if self.folder is not None:
            system.call((self.folder / NAME).unlink, missing_ok=True)


def write_curve(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """A row per step: step, loss, validation, loss of each task."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())
