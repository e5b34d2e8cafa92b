"""What the experts themselves answer: asked once, kept on disk, so that no expert is in memory while others learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError, did_you_mean
from weightsmith.io import system
from weightsmith.io.disk import replace_file
from weightsmith.io.read.source import Source
from weightsmith.tokens.vocabulary import vocabulary_of
from weightsmith.tune.objective import logits_of

__all__ = ["Lesson", "Lessons", "hidden_of", "refuse_other_tokens", "taught"]

Function = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch, and what its expert answers.

    scores  log-probabilities at temperature 1, [..., classes], or of the `top` classes and, last, of all others
    top     the classes that `scores` are of, [..., k]; None: of all
    hidden  the chosen hidden states
    """

    batch: Any
    scores: Tensor
    top: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()

    @property
    def mask(self) -> Any:
        """The batch's own."""
        return getattr(self.batch, "mask", None)


def hidden_of(outputs: Any, layers: Sequence[int]) -> tuple[Tensor, ...]:
    """The chosen hidden states among what a model gives: `hidden_states`, of which 0 is the embeddings' output.

    Raises SourceError where they are not given, or a layer is not among them.
    """
    if not layers:
        return ()
    states = outputs.get("hidden_states") if isinstance(outputs, Mapping) else getattr(outputs, "hidden_states", None)
    if states is None:
        raise SourceError(
            "imitate: the model gives no hidden states; let the function ask for output_hidden_states=True"
        )
    for layer in layers:
        if not -len(states) <= layer < len(states):
            raise SourceError(f"imitate: hidden state {layer} is outside [0, {len(states) - 1}]")
    return tuple(states[layer] for layer in layers)


def scores_of(outputs: Any) -> Tensor:
    """The scores of what a model gives, also of a mapping."""
    return logits_of(outputs["logits"] if isinstance(outputs, Mapping) else outputs)


class Lessons(Sequence[Lesson]):
    """The lessons of one task: batches here, answers here or in a folder, a file for each batch."""

    def __init__(self, batches: Sequence[Any], folder: Path | None, task: str) -> None:
        self.batches, self._folder, self._task = batches, folder, task
        self._held: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Lesson: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Lesson]: ...
    def __getitem__(self, index: int | slice) -> Lesson | Sequence[Lesson]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0 or index >= len(self):
            raise IndexError(index)
        found = self._held[index] if self._folder is None else self._read(index)
        states = tuple(found[f"hidden.{i}"] for i in range(sum(name.startswith("hidden.") for name in found)))
        return Lesson(self.batches[index], found["scores"], found.get("top"), states)

    def keep(self, index: int, answers: dict[str, Tensor]) -> None:
        """Note what the expert answers to a batch."""
        answers = {name: tensor.detach().cpu().contiguous() for name, tensor in answers.items()}
        if self._folder is None:
            self._held[index] = answers
            return
        from safetensors.torch import save

        replace_file(self._path(index), save(answers))

    def missing(self) -> list[int]:
        """Batches without an answer."""
        return [i for i in range(len(self)) if not (i in self._held or (self._folder and self._path(i).is_file()))]

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._task}-{index}.safetensors"

    def _read(self, index: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return system.call(load_file, self._path(index))


def taught(
    data: Mapping[str, Sequence[Any]],
    experts: Mapping[str, Source],
    module: nn.Module,
    places: Mapping[str, Tensor],
    functions: Mapping[str, Function],
    folder: Path | None,
    *,
    top: int,
    layers: Sequence[int],
) -> dict[str, Lessons]:
    """Ask each expert about the batches of the task that bears its name; the module holds one expert after another.

    Raises SourceError for a task without an expert.
    """
    found: dict[str, Lessons] = {}
    for task, batches in data.items():
        if task not in experts:
            raise SourceError(f"imitate: no model is called {task!r}, the name of a task{did_you_mean(task, experts)}")
        found[task] = lessons = Lessons(batches, folder, task)
        if not (missing := lessons.missing()):
            continue
        module.eval()
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(experts[task].read(name))
            for i in missing:
                outputs = functions[task](module, batches[i])
                answers = _answers(scores_of(outputs), top)
                answers |= {f"hidden.{j}": state.float() for j, state in enumerate(hidden_of(outputs, layers))}
                lessons.keep(i, answers)
    return found


def refuse_other_tokens(base: Source | None, experts: Mapping[str, Source], tasks: Iterable[str]) -> None:
    """Raise SourceError where an expert's tokenizer numbers tokens otherwise: it would be asked about another text."""
    own = None if base is None else vocabulary_of(base)
    for task in tasks:
        theirs = vocabulary_of(experts[task]) if own is not None and task in experts else None
        if own is None or theirs is None:
            continue
        for token, number in own.ids.items():
            if (there := theirs.ids.get(token, number)) != number:
                raise SourceError(
                    f"imitate: {task} has another tokenizer than the base: {token!r} is {there} there and {number} "
                    "here; its answers would be about another text"
                )


def _answers(logits: Tensor, top: int) -> dict[str, Tensor]:
    scores = logits.float().log_softmax(dim=-1)
    if not top or top >= scores.shape[-1] - 1:
        return {"scores": scores}
    best = scores.topk(top, dim=-1)
    rest = (-best.values.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-7)).log1p()
    return {"scores": torch.cat([best.values, rest], dim=-1), "top": best.indices}
