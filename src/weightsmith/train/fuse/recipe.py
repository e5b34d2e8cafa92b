"""What `weightsmith train fuse` is to do: a target, the models that it learns from, and how they are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from weightsmith.recipe.fields import Located, LocatedWords
from weightsmith.recipe.grammar import Grammar
from weightsmith.recipe.load import read_file, read_text
from weightsmith.train.recipe import AdamW, OneOf, Optimizer, Schedule

__all__ = ["FuseRecipe", "Gates", "load", "loads"]


class Trained(Grammar):
    """A gate that trains along."""

    threshold: float | None = Field(default=None, ge=0, le=1, description="least selected share; default: 0.75 / m")
    lr: float = Field(default=1e-3, gt=0, description="learning rate of the gate, by AdamW without decay")


class Rule(Grammar):
    """A fixed rule, without values."""


class Gates(OneOf):
    """How the candidates of a text are weighed."""

    trained: Trained | None = Field(default=None, description="by a gate that learns from their losses")
    average: Rule | None = Field(default=None, description="all alike")
    min_ce: Rule | None = Field(default=None, description="the one of the least loss alone")
    avg_ce: Rule | None = Field(default=None, description="softmax of minus the losses")


def _some(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("is empty; name at least one model")
    return value


class FuseRecipe(Schedule):
    """One model that trains on the distributions of several."""

    ROOT: ClassVar[str] = "the recipe"

    target: Located = Field(description="folder or hub id[@revision] of what trains", examples=["PATH"])
    sources: Annotated[LocatedWords, AfterValidator(_some)] = Field(
        description="folders or hub ids of the others", examples=["[PATH, PATH]"]
    )
    data: Located = Field(description=".txt, .jsonl, or a folder of .txt", examples=["texts.jsonl"])
    cache: str | None = Field(
        default=None,
        description="folder, from the working directory, that keeps the distributions for other runs; default: none",
    )
    k: int = Field(default=20, ge=1, description="likeliest tokens that are kept of a distribution")
    gate: Gates = Field(default=Gates(trained=Trained()), description="trained, average, min_ce or avg_ce")
    lm_weight: float = Field(default=0.9, ge=0, le=1, description="of the loss on the texts; the rest is the sources'")
    feedback_weight: float = Field(default=0.5, ge=0, description="of the balance between candidates")
    loss: Literal["ce", "kl"] = Field(default="ce", description="against the fused distribution")
    teacher_temperature: float = Field(default=1.0, gt=0, description="of the candidates' distributions")
    optimizer: Optimizer = Field(
        default=Optimizer(adamw=AdamW(lr=1e-5, weight_decay=0.01)), description="adamw, dct_adamw or trion"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="of the learning rate")
    warmup: float = Field(default=0.008, ge=0, lt=1, description="share of the steps in which the rate grows from 0")


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> FuseRecipe:
    """Read a recipe; see `weightsmith.recipe.load.read_file`."""
    return read_file(FuseRecipe, path, overrides, files)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> FuseRecipe:
    """Read a recipe from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(FuseRecipe, text, where, overrides, folder)
