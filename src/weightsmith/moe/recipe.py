"""What a mixture of experts is to be built of: a frozen value, from YAML in our words or in mergekit-moe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from weightsmith.core.errors import RecipeError
from weightsmith.recipe.fields import Located, listed, named
from weightsmith.recipe.grammar import Grammar, Reading, build
from weightsmith.recipe.load import read_file, read_text
from weightsmith.recipe.reader import Document, Location, Position
from weightsmith.recipe.schema import Output

__all__ = ["PROMPTED", "ROUTERS", "Expert", "MoeRecipe", "Prompt", "load", "loads"]

Prompt = str | tuple[int, ...]
"""A text, or the numbers of its tokens."""

ROUTERS = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
PROMPTED = ROUTERS[:4]
"""Routers that are made from prompts; the others are drawn."""


def _prompts(value: Any) -> Any:
    """A text, a list of texts, or a list of lists of token numbers."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"should be a text or a list of texts, is {value!r}")
    for prompt in found:
        ids = isinstance(prompt, (list, tuple)) and prompt and all(type(i) is int and i >= 0 for i in prompt)
        if not ids and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(f"should be texts, or lists of token numbers, is {prompt!r}")
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in found)


Prompts = Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
Router = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
Architecture = Literal["mixtral", "qwen", "qwen3", "deepseek", "glm4_moe"]


class Expert(Grammar):
    """One donor of MLPs: a dense model, and the prompts that its row of the router is made from."""

    SHORT: ClassVar[str] = "model"

    model: Located = Field(description="path, hub id[@revision], or a LoRA adapter on `base`", examples=["PATH"])
    prompts: Prompts = Field(default=(), description="what this expert is for: texts, or lists of token numbers")
    avoid: Prompts = Field(default=(), description="what it is not for")
    noise: float = Field(default=0.0, ge=0, description="standard deviation of noise added to its MLPs")
    residual: float = Field(default=1.0, description="factor on its down projections")


class MoeRecipe(Grammar):
    """Dense models of one shape in, one mixture of experts out.

    Attention, norms and embeddings come from `base`, the MLPs from `experts`, always-on MLPs from `shared`.
    """

    ROOT: ClassVar[str] = "the recipe"

    base: Located = Field(description="the dense model that all but the MLPs is taken from", examples=["PATH"])
    experts: Annotated[dict[str, Expert], named("experts", ", as math: path/to/math")] = Field(
        description="name -> expert, in order", examples=["{math: path/to/math}"]
    )
    shared: dict[str, Expert] = Field(default_factory=dict, description="experts that every token goes through")
    router: Router = Field(default="hidden", description="how the rows of the routers are made")
    site: Literal["residual", "mlp_input"] = Field(
        default="residual", description="which states the hidden routers are made from"
    )
    experts_per_token: int = Field(default=2, ge=1, description="how many experts a token goes through")
    architecture: Architecture | None = Field(
        default=None, description="of the result; default: the first that can hold the inputs"
    )
    for_training: bool = Field(default=False, description="allow experts or prompts that are all alike")
    output: Output = Field(default_factory=Output, description="how the result is stored")
    seed: int = Field(default=0, description="of noise and of random routers")

    @classmethod
    def document(cls, documents: Sequence[Document], overrides: Sequence[str] = ()) -> Document:
        document = super().document(documents, overrides)
        tree = document.tree if isinstance(document.tree, dict) else {}
        for wrong in ("method", "merge_method", "models"):
            if wrong in tree and "experts" not in tree:
                raise RecipeError(
                    f'{document.at((wrong,))}: this recipe merges models; run it with "weightsmith merge"'
                )
        foreign = {"base_model", "gate_mode"} & tree.keys() or isinstance(tree.get("experts"), list)
        return build(MergekitMoe, document, Reading()).native(document) if foreign else document


def load(path: str | Path, overrides: Sequence[str] = ()) -> MoeRecipe:
    """Read a recipe file; see `weightsmith.recipe.load.read_file`."""
    return read_file(MoeRecipe, path, overrides)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> MoeRecipe:
    """Read a recipe from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(MoeRecipe, text, where, overrides, folder)


# --- mergekit-moe ----------------------------------------------------------------------------------

_WORDS = {
    "base_model": "base",
    "gate_mode": "router",
    "shared_experts": "shared",
    "source_model": "model",
    "positive_prompts": "prompts",
    "negative_prompts": "avoid",
    "noise_scale": "noise",
    "residual_scale": "residual",
}
"""Words that are other ones here."""


class MergekitExpert(Grammar):
    source_model: str = Field(examples=["PATH"])
    positive_prompts: Any = None
    negative_prompts: Any = None
    noise_scale: Any = None
    residual_scale: Any = None


class MergekitMoe(Grammar):
    """A config of mergekit-moe's.  Its values are checked as ours, under the positions of theirs."""

    ROOT: ClassVar[str] = "the config"

    base_model: Any = Field(examples=["PATH"])
    gate_mode: Any = None
    experts_per_token: Any = None
    architecture: Any = None
    seed: Any = None
    dtype: Any = None
    experts: Annotated[tuple[MergekitExpert, ...], listed("experts", 1)] = Field(examples=["[{source_model: PATH}]"])
    shared_experts: Annotated[tuple[MergekitExpert, ...], listed("experts")] = ()

    def native(self, source: Document) -> Document:
        """The same in our words; experts are named after their folders."""
        tree: dict[str, Any] = {}
        positions: dict[Location, Position] = {(): source.at(())}
        for word, value in self.model_dump(exclude_unset=True).items():
            own = _WORDS.get(word, word)
            positions[(own,)] = source.at((word,))
            if word == "dtype":
                tree["output"], positions[("output",)] = {"dtype": value}, source.at((word,))
            elif word in ("experts", "shared_experts"):
                tree[own] = _experts(value)
                for i, (name, expert) in enumerate(zip(tree[own], value, strict=True)):
                    positions |= {(own, name, _WORDS[key]): source.at((word, i, key)) for key in expert}
            else:
                tree[own] = value
        return Document(source.where, tree, positions)


def _experts(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, expert in enumerate(given):
        stem = Path(expert["source_model"].partition("@")[0]).name or f"expert{i}"
        name = next(n for n in (stem, *(f"{stem}-{j}" for j in range(2, len(given) + 2))) if n not in found)
        found[name] = {_WORDS[word]: value for word, value in expert.items()}
    return found
