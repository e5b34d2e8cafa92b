"""What a mixture of experts is to be built of: a frozen value, from YAML in our words or in mergekit-moe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.recipe.files import exists, expanded, text_of
from weightsmith.recipe.override import override
from weightsmith.recipe.reader import Document, read
from weightsmith.recipe.schema import Output

__all__ = ["ROUTERS", "Expert", "MoeRecipe", "Prompt", "from_mergekit", "load", "loads"]

Prompt = str | tuple[int, ...]
"""A text, or the numbers of its tokens."""

ROUTERS = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
PROMPTED = ROUTERS[:4]
"""Routers that are made from prompts; the others are drawn."""


def _prompts(value: Any) -> Any:
    """A text, a list of texts, or a list of lists of token numbers."""
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"should be a text or a list of texts, is {value!r}")
    for prompt in found:
        ids = isinstance(prompt, (list, tuple)) and prompt and all(type(i) is int and i >= 0 for i in prompt)
        if not ids and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(f"should be texts, or lists of token numbers, is {prompt!r}")
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in found)


Prompts = Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Expert(_Frozen):
    """One donor of MLPs: a dense model, and the prompts that its row of the router is made from."""

    model: str = Field(description="path, hub id[@revision], or a LoRA adapter on `base`")
    prompts: Prompts = Field(default=(), description="what this expert is for: texts, or lists of token numbers")
    avoid: Prompts = Field(default=(), description="what it is not for")
    noise: float = Field(default=0.0, ge=0, description="standard deviation of noise added to its MLPs")
    residual: float = Field(default=1.0, description="factor on its down projections")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class MoeRecipe(_Frozen):
    """Dense models of one shape in, one mixture of experts out.

    Attention, norms and embeddings come from `base`, the MLPs from `experts`, always-on MLPs from `shared`.
    """

    base: str = Field(description="the dense model that all but the MLPs is taken from")
    experts: dict[str, Expert] = Field(description="name -> expert, in order")
    shared: dict[str, Expert] = Field(default_factory=dict, description="experts that every token goes through")
    router: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        default="hidden", description="how the rows of the routers are made"
    )
    site: Literal["residual", "mlp_input"] = Field(
        default="residual", description="which states the hidden routers are made from"
    )
    experts_per_token: int = Field(default=2, ge=1, description="how many experts a token goes through")
    architecture: Literal["mixtral", "qwen", "qwen3", "deepseek", "glm4_moe"] | None = Field(
        default=None, description="of the result; default: the first that can hold the inputs"
    )
    for_training: bool = Field(default=False, description="allow experts or prompts that are all alike")
    output: Output = Field(default_factory=Output, description="how the result is stored")
    seed: int = Field(default=0, description="of noise and of random routers")


def load(path: str | Path, overrides: Sequence[str] = ()) -> MoeRecipe:
    """Read a recipe file; `overrides` are texts like 'experts_per_token=1'.

    Raises RecipeError with every problem: file, line, what is wrong, the nearest valid word.
    """
    file = Path(path)
    return loads(text_of(file), str(file), overrides, file.absolute().parent)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> MoeRecipe:
    """Read a recipe from text; `where` is what messages call it, `folder` what its paths are relative to."""
    document = read(text, where)
    for assignment in overrides:
        override(document, assignment)
    if not isinstance(document.tree, dict):
        raise RecipeError(f"{document.at(())}: a recipe of a mixture is a mapping with base and experts")
    tree = {key: value for key, value in document.tree.items() if value is not None}
    if {"base_model", "gate_mode"} & tree.keys() or isinstance(tree.get("experts"), list):
        tree = from_mergekit(tree, document)
    for wrong, verb in (("method", "merge"), ("merge_method", "merge"), ("models", "merge")):
        if wrong in tree and "experts" not in tree:
            raise RecipeError(f'{document.at((wrong,))}: this recipe merges models; run it with "weightsmith {verb}"')
    try:
        recipe = MoeRecipe.model_validate(tree)
    except ValidationError as error:
        lines = [_told(document, detail) for detail in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
    if not recipe.experts:
        raise RecipeError(f"{document.at(('experts',))}: experts is empty; name at least one")
    return recipe if folder is None else _located(recipe, folder)


def _told(document: Document, detail: Any) -> str:
    """What pydantic found, in the recipe's words."""
    place = tuple(detail["loc"])
    at, name = document.at(place), ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        inner = place[0] in ("experts", "shared")
        known = Output.model_fields if place[0] == "output" else (Expert if inner else MoeRecipe).model_fields
        return f"{at}: unknown key {name!r}{did_you_mean(str(place[-1]), known)}"
    if detail["type"] == "missing":
        return f"{at}: the recipe has no {name!r}; write {place[-1]}: ..."
    said = str(detail["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    shown = "" if detail["type"] == "value_error" else f", is {detail.get('input')!r}"[:80]
    return f"{at}: {name} {said}{shown}"


def _located(recipe: MoeRecipe, folder: Path) -> MoeRecipe:
    """The same recipe, with paths that exist relative to its folder made absolute."""

    def located(text: str) -> str:
        path = expanded(text)
        here = folder / path
        return str(here.absolute()) if not path.is_absolute() and exists(here) else str(path) if "~" in text else text

    def each(experts: Mapping[str, Expert]) -> dict[str, Expert]:
        return {n: e.model_copy(update={"model": located(e.model)}) for n, e in experts.items()}

    update = {"base": located(recipe.base), "experts": each(recipe.experts), "shared": each(recipe.shared)}
    return recipe.model_copy(update=update)


# --- mergekit-moe ----------------------------------------------------------------------------------

_TOP = {
    "base_model": "base",
    "gate_mode": "router",
    "experts_per_token": "experts_per_token",
    "architecture": "architecture",
    "seed": "seed",
}
_EXPERT = {
    "source_model": "model",
    "positive_prompts": "prompts",
    "negative_prompts": "avoid",
    "noise_scale": "noise",
    "residual_scale": "residual",
}


def from_mergekit(tree: Mapping[str, Any], document: Document) -> dict[str, Any]:
    """A mergekit-moe config in this project's words; experts are named after their folders."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if key in _TOP:
            out[_TOP[key]] = value
        elif key == "dtype":
            out["output"] = {"dtype": value}
        elif key in ("experts", "shared_experts"):
            out["shared" if key == "shared_experts" else key] = _experts(key, value, document)
        else:
            known = [*_TOP, "dtype", "experts", "shared_experts"]
            raise RecipeError(f"{document.at((key,))}: unknown key {key!r} in a mergekit-moe config"
                              f"{did_you_mean(key, known)}")  # fmt: skip
    return out


def _experts(key: str, value: Any, document: Document) -> dict[str, Any]:
    if not isinstance(value, list):
        raise RecipeError(f"{document.at((key,))}: {key} should be a list of experts, each with a source_model")
    out: dict[str, Any] = {}
    for i, entry in enumerate(value):
        if not isinstance(entry, dict) or not isinstance(entry.get("source_model"), str):
            raise RecipeError(f"{document.at((key, i))}: expert {i} has no source_model; write source_model: path")
        for word in entry:
            if word not in _EXPERT:
                raise RecipeError(f"{document.at((key, i, word))}: unknown key {word!r}{did_you_mean(word, _EXPERT)}")
        stem = Path(entry["source_model"].partition("@")[0]).name or f"expert{i}"
        name = next(n for n in (stem, *(f"{stem}-{j}" for j in range(2, len(value) + 2))) if n not in out)
        out[name] = {_EXPERT[word]: found for word, found in entry.items() if found is not None}
    return out
