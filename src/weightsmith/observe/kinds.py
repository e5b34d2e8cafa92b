"""What kinds of model there are to run: what they read, and what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import SourceError

__all__ = ["KINDS", "Kind", "UnknownKind", "class_of", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    reads     'text', 'image', 'text or image' (one encoder for each) or 'sound'
    classes   whether it gives probabilities of classes or tokens, which a Fisher information needs
    tokens    whether it gives them at every token
    endings   of the architectures' names; () where the class tells
    """

    reads: str
    classes: bool = False
    tokens: bool = False
    endings: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    "causal-lm": Kind("text", classes=True, tokens=True, endings=("ForCausalLM", "LMHeadModel")),
    "image-classification": Kind("image", classes=True, endings=("ForImageClassification",)),
    "sequence-classification": Kind("text", classes=True, endings=("ForSequenceClassification",)),
    "token-classification": Kind("text", classes=True, tokens=True, endings=("ForTokenClassification",)),
    "masked-lm": Kind("text", endings=("ForMaskedLM",)),
    "seq2seq-lm": Kind("text"),
    "encoder": Kind("text"),
    "image-encoder": Kind("image"),
    "image-text": Kind("text or image"),
    "speech": Kind("sound"),
}


class UnknownKind(SourceError):
    """Nothing says how a model is run; `why` leaves out what to do about it."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; {_CHOOSE}")
        self.why = why

    def __reduce__(self) -> tuple[type[UnknownKind], tuple[str]]:
        return UnknownKind, (self.why,)


def kind_of(architectures: Sequence[str], label: str, made: type | None = None) -> str:
    """The kind of a model with these `architectures` in its config.json, or of a class.

    The class of that name in transformers decides; a checkpoint's own code is not looked at.
    Raises UnknownKind.
    """
    classes = [made] if made is not None else [found for name in architectures if (found := class_of(name))]
    for name in architectures:
        for kind, about in KINDS.items():
            if name.endswith(about.endings or ("?",)):
                return kind
    for one in classes:
        if kind := _of_class(one):
            return kind
    if not architectures:
        raise UnknownKind(f"{label}: no architectures in config.json: nothing says how it is run")
    raise UnknownKind(f"{label}: transformers has no model called {' or '.join(map(repr, architectures))}")


_CHOOSE = f"pass kind= (--kind of observe): {', '.join(KINDS)}"


def class_of(architecture: str) -> type | None:
    """The class of transformers that is called so, if there is one that can be loaded."""
    import transformers

    found = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    return found if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel) else None


def _of_class(made: type) -> str:
    """By what its forward pass takes; '' for what is no model of transformers."""
    main = getattr(made, "main_input_name", "")
    takes: Any = inspect.signature(getattr(made, "forward", made)).parameters
    if hasattr(made, "get_text_features") and hasattr(made, "get_image_features") and "pixel_values" in takes:
        return "image-text"
    if main in ("input_values", "input_features"):
        return "speech"
    if main == "pixel_values":
        return "image-encoder"
    if main != "input_ids" or "input_ids" not in takes:
        return ""
    if "decoder_input_ids" in takes:
        return "seq2seq-lm"
    # With pictures or without, a decoder that writes text is a language model.
    return "causal-lm" if made.__name__.endswith("ForConditionalGeneration") else "encoder"
