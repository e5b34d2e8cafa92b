"""The model under test: a folder, or merged tensors that never were one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.observe.model import LoadedModel

__all__ = ["Setting", "Subject"]


@dataclass(frozen=True)
class Setting:
    """What all tasks of a run have in common; a part of every score's key.

    template  plain, chat (the base's own), or a text with {prompt}
    dtype     that the model computes in: float32, bfloat16 or float16
    batch     sequences at once, for likelihoods and generation
    limit     examples per task, the first ones; None for all
    seed      of what is sampled
    """

    template: str = "plain"
    dtype: str = "float32"
    batch: int = 16
    limit: int | None = None
    seed: int = 0
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        """Without what does not change a score."""
        return {"template": self.template, "dtype": self.dtype, "limit": self.limit, "seed": self.seed,
                "batch": self.batch, "device": self.device}  # fmt: skip


@dataclass
class Subject:
    """One model.  `folder` holds its weights, or, beside `state`, only its config and tokenizer."""

    label: str
    folder: Path
    setting: Setting
    state: Mapping[str, Tensor] | None = None
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)

    def loaded(self, kind: str) -> LoadedModel:
        """The model as one of `observe.kinds`, loaded once."""
        import torch

        from weightsmith.observe.model import load_model

        if kind not in self._loaded:
            found = load_model(self.folder, kind=kind, device=self.setting.device, state=self.state)
            found.module.to(getattr(torch, self.setting.dtype))
            self._loaded = {kind: found}  # one at a time in memory
        return self._loaded[kind]

    def path(self) -> Path:
        """The folder, for programs that load it themselves."""
        if self.state is not None:
            raise SourceError(f"{self.label}: is in memory only")
        return self.folder
