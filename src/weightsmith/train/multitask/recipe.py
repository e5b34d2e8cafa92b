"""What `weightsmith train multitask` is to do: tasks, a model, and how one model is made to do them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from weightsmith.recipe.fields import Located, Words, named
from weightsmith.recipe.grammar import Fault, Grammar, Reading, mapping
from weightsmith.recipe.load import read_file, read_text
from weightsmith.recipe.reader import Location
from weightsmith.train.recipe import AdamW, OneOf, Optimizer, Timing, null_clip

__all__ = ["By", "MultiTaskRecipe", "NetSpec", "TaskSpec", "load", "loads"]


class ShownSpec(Grammar):
    """An example inside an instruction."""

    input: str = Field(description="its input")
    output: str = Field(description="its answer")
    explanation: str = Field(default="", description="why")


class InstructionSpec(Grammar):
    """A task in words; a text stands for the definition."""

    SHORT: ClassVar[str] = "definition"

    definition: str = Field(description="what the task is")
    prompt: str = Field(default="", description="what to do with the input")
    examples: tuple[ShownSpec, ...] = Field(default=(), strict=False, description="shown before the input")


def _in_one_line(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One message for both forms; YAML's .nan is nan, too."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"should be a number, or nan; is {value!r}") from None


Missing = Annotated[Annotated[float, Field(allow_inf_nan=False)] | Literal["nan"], WrapValidator(_in_one_line)]


class TaskSpec(Grammar):
    """One task: its data, and how it is answered and scored."""

    data: Located = Field(description=".jsonl (input, output or label) or .npz (x, y or target)", examples=["FILE"])
    valid: Located | None = Field(default=None, description="validation data; default: a share of data")
    test: Located | None = Field(default=None, description="what the finished model is scored on; default: validation")
    metric: str | None = Field(default=None, description="default: accuracy of labels, exact of texts, psnr of maps")
    candidates: Words | None = Field(default=None, description="the answers to choose among; labels number them")
    weight: float = Field(default=1.0, gt=0, description="of its loss, or of its gradient (uni_perceiver)")
    rate: float | None = Field(default=None, gt=0, le=1, description="how often it is drawn; all tasks sum to one")
    instruction: InstructionSpec | None = Field(default=None, description="for by: instruct")
    prior: Literal["background", "shading", "gradient", "sauvola", "coordinates", "none", "noise", "fixed"] = Field(
        default="none", description="for by: conditioned"
    )
    invalid: Missing | None = Field(default=None, description="the value of pixels of a map that have no label")
    legal: tuple[float, float] | None = Field(default=None, strict=False, description="range of labels of a map")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        invalid, legal = tree.get("invalid"), tree.get("legal")
        if not isinstance(legal, (list, tuple)) or [*map(_is_number, legal)] != [True, True]:
            return
        if not legal[0] < legal[1]:
            yield Fault(("legal",), f"is {legal[0]:g} .. {legal[1]:g}; write the least value first", "value")
        elif _is_number(invalid) and legal[0] <= invalid <= legal[1]:
            text = f"is {invalid:g}, which is a legal value of {legal[0]:g} .. {legal[1]:g}; choose another"
            yield Fault(("invalid",), text, "value")


class Plain(Grammar):
    """Shared weights; a linear head for each task that has labels or maps."""


class UniPerceiver(Grammar):
    """Answers by likelihood among candidates that the same model encodes."""

    tau: float = Field(default=0.07, ge=0.01, description="first temperature; it trains")
    grad_norm: Literal["global", "none"] = Field(default="global", description="none: gradients as they are")


class TaskExpert(Grammar):
    """A decoder of shared experts with gates and a memory for each task."""

    experts: int = Field(default=5, ge=1, description="expert networks of a level")
    levels: int = Field(default=4, ge=1, description="hidden states that it reads, spread over the model")
    width: int | None = Field(default=None, ge=1, description="of the experts; default: half of the model's")
    gate: Literal["dynamic", "static"] = Field(default="dynamic", description="static: one mixture per task")
    memory: bool = Field(default=True, description="carry task features from level to level")
    freeze: bool = Field(default=False, description="train the decoder alone")
    init_experts_from: Words = Field(default=(), description="fine-tuned models: one expert each, then frozen")


class Instruct(Grammar):
    """Text to text; a task's instruction before each input is all that tells tasks apart."""

    mode: Literal["none", "instruction", "instruction+examples"] = Field(
        default="instruction+examples", description="what stands before an input"
    )
    examples: int = Field(default=2, ge=0, description="examples of the instruction that are shown")


class Prompt(Grammar):
    """The model is frozen; one prompt for all tasks trains."""

    kind: Literal["text", "visual", "unified"] = Field(default="text", description="where vectors go; LMs: text")
    n_ctx: int = Field(default=16, ge=0, description="vectors")
    position: Literal["front", "middle", "end"] = Field(default="middle", description="of class names")
    deep: bool = Field(default=False, description="vectors of their own for every layer; kind text or visual")
    init: Located | None = Field(default=None, description="the result of an earlier run to adapt")


class Conditioned(Grammar):
    """Channels computed from each image by an operator of its task tell one network what to do."""


class SoftTokens(Grammar):
    """One decoder writes labels and maps as tokens; codes of maps are decoded softly."""

    codes: int = Field(default=32, ge=2, description="of the codebook of each task with maps")
    patch: int = Field(default=4, ge=1, description="pixels of a side that one code stands for")
    width: int = Field(default=64, ge=4, description="of the decoder and the codes")
    mask: float = Field(default=0.5, ge=0, lt=1, description="share of patches left out when codes are learned")
    vae_steps: int = Field(default=200, ge=1, description="steps that learn a codebook")
    soft: bool = Field(default=True, description="decode the expectation over codes; false: the likeliest code")
    feedback: bool = Field(default=True, description="feed that expectation back, too")
    map_weight: float = Field(default=1.0, ge=0, description="of the error of decoded maps")


class By(OneOf):
    """How one model does several tasks."""

    plain: Plain | None = Field(default=None, description="shared weights, a head per task")
    uni_perceiver: UniPerceiver | None = Field(default=None, description="likelihood over candidates")
    task_expert: TaskExpert | None = Field(default=None, description="memorial mixture of experts")
    instruct: Instruct | None = Field(default=None, description="instructions")
    prompt: Prompt | None = Field(default=None, description="soft prompts")
    conditioned: Conditioned | None = Field(default=None, description="priors as input channels")
    soft_tokens: SoftTokens | None = Field(default=None, description="answers as tokens")


class MTAdamWSpec(AdamW):
    """`train.multitask.MTAdamW`."""

    weight_decay: float = Field(default=0.05, ge=0, description="of matrices; vectors get none")


class Optimizers(Optimizer):
    """One optimizer."""

    mt_adamw: MTAdamWSpec | None = Field(default=None, description="task-balanced AdamW; needs unmixed sampling")


class NetSpec(Grammar):
    """A small convolutional network with random weights."""

    width: int = Field(default=32, ge=1, description="channels")
    depth: int = Field(default=4, ge=1, description="residual blocks")


class MultiTaskRecipe(Timing):
    """Tasks, one model, and how long."""

    ROOT: ClassVar[str] = "the recipe"

    tasks: Annotated[dict[str, TaskSpec], named("tasks", ", e.g. tasks: {reviews: {data: reviews.jsonl}}")] = Field(
        description="name: its data, metric, candidates, weight", examples=["{NAME: {data: FILE}}"]
    )
    model: Located | None = Field(default=None, description="folder or hub id[@revision]", examples=["PATH"])
    net: NetSpec | None = Field(default=None, description="in place of model, for images")
    by: By = Field(default=By(plain=Plain()), description="the mechanism")
    sampling: Literal["unmixed", "mixed", "proportional", "temperature", "concat"] = Field(
        default="unmixed", description="which examples a step takes"
    )
    temperature: float = Field(default=2.0, gt=0, description="T of rates n^(1/T), where none are given")
    cap: int | None = Field(default=None, ge=1, description="most training examples of a task")
    optimizer: Optimizers | None = Field(default=None, description="adamw; for uni_perceiver unmixed: mt_adamw")
    valid: float = Field(default=0.05, ge=0, lt=1, description="share of data kept for validation")
    examples: int = Field(default=200, ge=1, description="most validation examples of a task during the run")
    length: int = Field(default=512, ge=2, description="tokens of an input")
    answer: int = Field(default=64, ge=1, description="tokens of an answer")
    packing: bool = Field(default=False, description="causal LMs: train on several examples in one row of tokens")
    bf16: bool = Field(default=False, description="run the model under bfloat16 autocast")
    seed: int = Field(default=0, ge=0, description="of the order, the validation set, dropout, and new weights")

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        return super().long_form(null_clip(given), reading)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        if (tree.get("model") is None) == (tree.get("net") is None) and not reading.python:
            yield Fault((), "takes model or net, one of them", "value")
        rates = {name: _rate(task) for name, task in mapping(tree.get("tasks")).items()}
        given = {name: rate for name, rate in rates.items() if isinstance(rate, (int, float))}
        if given and len(given) == len(rates) and abs(sum(given.values()) - 1) > 1e-6:
            yield Fault(("tasks",), f"rates sum to {sum(given.values()):g}, not to 1", "value")
        elif given and len(given) < len(rates):
            lacking = next(name for name in rates if name not in given)
            yield Fault(("tasks", lacking), "has no rate, but other tasks do; give all of them one, or none", "value")
        optimizer = tree.get("optimizer")
        if (optimizer == "mt_adamw" or "mt_adamw" in mapping(optimizer)) and tree.get(
            "sampling", "unmixed"
        ) != "unmixed":
            yield Fault(("optimizer",), "is mt_adamw, which needs sampling: unmixed", "value")

    @property
    def rates(self) -> dict[str, float] | None:
        """Task -> how often it is drawn, if the file says so."""
        given = {name: task.rate for name, task in self.tasks.items() if task.rate is not None}
        return given or None

    @property
    def chosen_optimizer(self) -> Optimizer:
        """The optimizer asked for, or the mechanism's own."""
        if self.optimizer is not None:
            return self.optimizer
        balanced = self.by.uni_perceiver is not None and self.sampling == "unmixed"
        return Optimizers(mt_adamw=MTAdamWSpec()) if balanced else Optimizers(adamw=AdamW())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rate(task: Any) -> Any:
    return task.rate if isinstance(task, TaskSpec) else mapping(task).get("rate")


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> MultiTaskRecipe:
    """Read a recipe; see `weightsmith.recipe.load.read_file`."""
    return read_file(MultiTaskRecipe, path, overrides, files)


def loads(
    text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None
) -> MultiTaskRecipe:
    """Read a recipe from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(MultiTaskRecipe, text, where, overrides, folder)
