"""What the user should know of the inputs that a plan is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from weightsmith.io.gguf import GgufSource
from weightsmith.io.peft import AdapterSource
from weightsmith.io.untied import UntiedSource
from weightsmith.keys import Key
from weightsmith.method import Stage
from weightsmith.run.inputs import Inputs

__all__ = ["TensorRemarks", "twins", "what_inputs_say"]


class TensorRemarks:
    """What stages say of single tensors, gathered to a line per text."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[str]] = {}

    def add(self, key: Key, stages: Iterable[Stage], count: int) -> None:
        for stage in stages:
            if text := stage.remark_on(key, count):
                self._tensors.setdefault(f"{stage.name}: {text}", []).append(key.name)

    def lines(self) -> Iterator[str]:
        """The text, the first tensor it holds for, and how many more there are."""
        for text, names in self._tensors.items():
            yield f"{text}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def what_inputs_say(inputs: Inputs) -> Iterator[str]:
    """A line each: no config.json to lend, heads that are untied, entries of pickles that are no tensors, adapters
    that are unlike."""
    yield from _unlike_adapters({n: s for n, s in inputs.experts.items() if isinstance(s, AdapterSource)})
    for i, (name, source) in enumerate(inputs.models):
        if i == 0 and isinstance(source, GgufSource):
            yield (
                f"{name} is a GGUF file, so the result has no config.json and no tokenizer; for them give a Hugging "
                "Face folder as the base or first model"
            )
        if isinstance(source, UntiedSource):
            head, embedding = next(iter(source.heads.items()))
            yield (
                f"{name}: tied to {embedding}, {head} becomes a tensor of its own, as another model has it "
                "(tie_word_embeddings: false)"
            )
        if extras := getattr(source, "extras", ()):
            shown = ", ".join(extras[:5]) + (f" and {len(extras) - 5} more" if len(extras) > 5 else "")
            yield f"{name}: entries that are no tensors are left out: {shown}"


def _unlike_adapters(adapters: Mapping[str, AdapterSource]) -> Iterator[str]:
    """Adapters that leave alone what others change, or that say they were trained on unlike models."""
    changed = {name: dict.fromkeys(source.changed) for name, source in adapters.items()}
    every = list(dict.fromkeys(tensor for own in changed.values() for tensor in own))
    for name, own in changed.items():
        if lacking := [tensor for tensor in every if tensor not in own]:
            yield (
                f"{name} does not change {len(lacking)} of {len(every)} tensors that other adapters change "
                f"({lacking[0]}): its task vector is zero there"
            )
    bases = {name: source.trained_on for name, source in adapters.items() if source.trained_on}
    if len(set(bases.values())) > 1:
        yield (
            f"adapters name unlike base models ({', '.join(f'{n}: {b}' for n, b in bases.items())}); all are put on "
            "the one given here"
        )


def twins(fingerprints: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for every model that, as far as size, header and samples of its files say, is another one of them.

    A task vector of zeros is no error, but it draws means, norms and softmaxes towards the base.
    """
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    for name, found in fingerprints.items():
        files = found.get("files", {}).values()
        if not files or not all("sample" in file for file in files):
            continue
        known = tuple(sorted((file["size"], file.get("header", ""), file["sample"]) for file in files))
        other = first.setdefault(known, name)
        if other == name:
            continue
        what = "its task vector is zero" if other == "base" else "the two count twice"
        yield f"{name} seems to hold the weights of {other} (size, header and samples of its files agree): {what}"
