"""Instructions before inputs (In-BoXBART, arXiv 2204.07600), cut to a budget so that nothing that matters is lost.

The same text goes to the multi-task model and to the merges that `bench` compares it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.core.errors import RecipeError

__all__ = ["Instruction", "Mode", "Shown", "render", "without_shown"]

Mode = Literal["none", "instruction", "instruction+examples"]

_CUT = " ... "


@dataclass(frozen=True)
class Shown:
    """An example inside an instruction."""

    input: str
    output: str
    explanation: str = ""


@dataclass(frozen=True)
class Instruction:
    """A task in words: its definition, a prompt, and positive examples."""

    definition: str
    prompt: str = ""
    examples: tuple[Shown, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Instruction:
        """From plain values, as a template file holds them."""
        shown = tuple(Shown(**one) for one in given.get("examples", ()))
        return cls(given["definition"], given.get("prompt", ""), shown)


def render(
    instruction: Instruction | None,
    text: str,
    *,
    limit: int,
    length: Callable[[str], int] = len,
    mode: Mode = "instruction+examples",
    examples: int = 2,
    task: str = "",
) -> str:
    """The model's input of one example, of at most `limit` tokens.

        {definition}
        {prompt}
        Input: ... Output: ... Explanation: ...
        Input: {text}
        Output:

    length    tokens of a text
    examples  how many of the instruction's examples are shown

    What is too long is cut in this order: explanations, examples (the last first), the middle of the text; never the
    definition and the prompt.  Errors: RecipeError where these alone are too long, or there is no instruction.
    """
    if mode == "none":
        head, shown = "", []
    elif instruction is None or not instruction.definition.strip():
        raise RecipeError(f"task {task!r} has no instruction; write its definition, or choose the mode none")
    else:
        head = "".join(f"{part}\n" for part in (instruction.definition, instruction.prompt) if part)
        shown = list(instruction.examples[:examples]) if mode == "instruction+examples" else []

    def whole(kept: Sequence[Shown], text: str, explained: int) -> str:
        lines = [
            f"Input: {one.input} Output: {one.output}"
            + (f" Explanation: {one.explanation}" if one.explanation and i < explained else "")
            for i, one in enumerate(kept)
        ]
        return head + "".join(f"{line}\n" for line in lines) + f"Input: {text}\nOutput:"

    cuts = [(len(shown), n) for n in range(len(shown), -1, -1)] + [(n, 0) for n in range(len(shown) - 1, -1, -1)]
    for kept, explained in cuts:
        if length(made := whole(shown[:kept], text, explained)) <= limit:
            return made
    if length(whole((), "", 0)) > limit:
        raise RecipeError(
            f"task {task!r}: its instruction alone takes {length(whole((), '', 0))} of {limit} tokens; "
            "shorten the definition and the prompt, or allow more"
        )
    low, high = 0, len(text)  # characters of the text that are kept; low always fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(whole((), _middle(text, middle), 0)) <= limit else (low, middle - 1)
    return whole((), _middle(text, low), 0)


def _middle(text: str, kept: int) -> str:
    """The text with its middle left out; `kept` characters stay."""
    if kept >= len(text):
        return text
    tail = kept // 2
    return text[: kept - tail] + _CUT + text[len(text) - tail :] if kept else ""


def without_shown(instruction: Instruction | None, inputs: Sequence[str]) -> list[int]:
    """Numbers of the inputs that the instruction does not show with their answer."""
    seen = {" ".join(one.input.split()) for one in instruction.examples} if instruction else set()
    return [i for i, text in enumerate(inputs) if " ".join(text.split()) not in seen]
