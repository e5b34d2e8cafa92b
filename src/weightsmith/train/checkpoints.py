"""Checkpoints beside the output: OUT.training/step-N, each a folder that appears whole; the last one is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import remove, writing
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json
from weightsmith.io.url import absolute
from weightsmith.train.loop import Row, State
from weightsmith.train.save import save_folder

__all__ = ["Checkpoints"]

_LIMIT = 1 << 30  # bytes of a state.json
_ANEW = "pass --overwrite to start anew"


class Checkpoints:
    """The checkpoints of one run (`loop.Store`).

    out       what the run will write
    identity  plain values that decide the run; one is taken up only under the same
    resume    take up the last one; else there must be none
    overwrite drop those that are there
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        out = absolute(out)
        self.folder, self._identity = out.with_name(f"{out.name}.training"), json.loads(json.dumps(identity))
        self._found: Path | None = None
        kept = self._steps()
        if kept and resume:
            self._found = kept[-1]
            said = read_json(self._found / "state.json", _LIMIT)["identity"]
            if said != self._identity:
                wrong = [key for key in {**said, **self._identity} if said.get(key) != self._identity.get(key)]
                raise OutputError(f"cannot resume: {self.folder} belongs to a run with another {wrong[0]}; {_ANEW}")
            if damage := verify_folder(self._found):
                raise OutputError(
                    f"cannot resume: {self._found} is damaged ({damage[0]}); pass --overwrite to start anew"
                )
        elif kept and not overwrite:
            raise OutputError(
                f"{self.folder}: a previous run was interrupted; pass --resume to go on, or --overwrite to start anew"
            )
        elif kept:
            self.clear()

    def save(self, state: State) -> None:
        """Write a checkpoint, then remove those before it."""
        before = self._steps()
        text = json.dumps({"step": state.step, "identity": self._identity, **state.values})
        save_folder(
            self.folder / f"step-{state.step:08}",
            state.tensors,
            made={"step": state.step, **self._identity},
            how="training",
            kind="checkpoint",
            texts={"state.json": text},
            overwrite=True,
        )
        for folder in before:
            if folder.name != f"step-{state.step:08}":
                remove(folder)

    def last(self) -> State | None:
        """The checkpoint to go on from."""
        if self._found is None:
            return None
        values = read_json(self._found / "state.json", _LIMIT)
        source = SafetensorsSource(self._found / "model.safetensors")
        rows = tuple(Row(**row) for row in values["rows"])
        return State(values["step"], rows, {name: source.read(name) for name in source.keys}, values)

    def clear(self) -> None:
        """Remove them all."""
        if self.folder.exists():
            with writing(self.folder):
                remove(self.folder)

    def _steps(self) -> list[Path]:
        found = system.call(list, self.folder.iterdir()) if self.folder.is_dir() else []
        return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))
