"""Coefficients that make the merged model answer like its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from weightsmith.core.errors import RecipeError
from weightsmith.tune.descent import Descent
from weightsmith.tune.importance import chunks_by, importance
from weightsmith.tune.objectives.imitate import Imitate
from weightsmith.tune.setting import Found, Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["ExpertMerging", "ExpertMergingPp"]

LEFT = ("vision_model.*", "*lm_head*", "*norm*", "*embed_tokens*", "*bias*")
"""Tensors that the authors leave at the base."""


@dataclass(frozen=True)
class ExpertMerging(Preset, name="expert_merging"):
    """Learn a coefficient per model and matrix, from a few unlabelled examples and the experts' own answers.

    Source: Expert Merging (Zhang et al., 2025), arXiv:2509.25712.  Coefficients are sigmoid(z), so between 0 and 1;
    `pull` keeps them near `init`.  Tasks bear the names of their experts and take turns.  The authors' command line and
    library differ in lr (0.5 and 1e-4, of z) and pull (5 and 0.1): these are the command line's, for about ten steps.

    layers  hidden states to compare beside the predictions; 0 is the embeddings' output
    top     scores of an expert that are kept for each position; 0: all
    """

    init: float = 0.1
    lr: float = 0.5
    steps: int = 10
    accumulate: int = 8
    temperature: float = 1.0
    pull: float = 5.0
    layers: tuple[int, ...] = ()
    weight: float = 1.0
    top: int = 0
    exclude: tuple[str, ...] = LEFT

    def setting(self, models: tuple[str, ...]) -> Setting:
        return Setting(
            free={"factor": Free(per="chunk", parts=1, start=self.init, link="sigmoid")},
            objective=Imitate(self.temperature, self.weight, self.layers, self.top),
            descent=Descent("adamw", lr=self.lr, steps=self.steps, accumulate=self.accumulate, weight_decay=1e-5,
                            clip=1.0, schedule="restarts"),
            method=("scale", "task_arithmetic"),
            turns=True,
            pull=self.pull,
            exclude=self.exclude,
            matrices=True,
        )  # fmt: skip


@dataclass(frozen=True)
class ExpertMergingPp(ExpertMerging, name="expert_merging_pp"):
    """Learn as expert_merging does, then anew with several coefficients for the matrices that matter.

    Source: Expert Merging++ (Zhang et al., 2025).  A first run with one coefficient each says which matrices matter;
    the second gives them up to `most`.  The rule is a reconstruction, see `tune.importance`: the authors' code takes a
    finished table, which `chunks` is.

    most    coefficients of the most important matrix
    least   importance, of 0 to 1, below which a matrix keeps one
    chunks  globs over tensor names -> numbers of chunks, the first that fits; 0 leaves a matrix at `init`.  With such a
            table there is no first run
    """

    most: int = 16
    least: float = 0.1
    chunks: Mapping[str, int] = field(default_factory=dict)

    def setting(self, models: tuple[str, ...]) -> Setting:
        if self.most < 1 or not 0 <= self.least <= 1:
            raise RecipeError(f"preset {self.name}: most must be at least 1 and least in [0, 1]; got {self.most} and "
                              f"{self.least:g}")  # fmt: skip
        made = super().setting(models)
        if self.chunks:
            return replace(made, free=_cut(made, self.chunks))
        return replace(made, then=ByImportance(self.most, self.least))


@dataclass(frozen=True)
class ByImportance:
    """The same tuning with chunks by what the first run found."""

    most: int
    least: float

    def __call__(self, setting: Setting, found: Found) -> Setting:
        matters = importance(found.coefficients["factor"], found.inputs, found.keys)
        return replace(setting, free=_cut(setting, chunks_by(matters, self.most, self.least)))


def _cut(setting: Setting, chunks: Mapping[str, int]) -> Mapping[str, Free]:
    return {"factor": replace(setting.free["factor"], parts=chunks)}
