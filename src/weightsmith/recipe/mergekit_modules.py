"""mergekit's names for the parts of a model, as globs over tensor names: words of the trade, not of architectures."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["globs_of"]

# The more special first: a projector may lie inside the vision tower.  A word stands for a component of the name.
_WORDS: dict[str, tuple[str, ...]] = {
    "multi_modal_projector": (
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "visual.merger",
        "visual.deepstack*",
    ),
    "vision_tower": ("vision_tower", "vision_model", "vision_encoder", "visual"),
    "vision_model": ("vision_tower", "vision_model", "vision_encoder", "visual"),
    "audio_tower": ("audio_tower", "audio_encoder", "audio_model"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
_REST = ("text_decoder", "shared", "default")
"""Modules that are what is left."""


def globs_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Module -> globs, in the order in which they are to be asked.

    A name that is no known word is taken as the beginning of its tensors' names, as mergekit makes them up for
    architectures that it does not know.
    """
    wanted = list(names)
    order = [n for n in wanted if n not in _WORDS and n not in _REST]
    order += [n for n in _WORDS if n in wanted]
    found = {n: _globs(_WORDS.get(n, (n,))) for n in order}
    return found | {n: ["*"] for n in wanted if n in _REST}


def _globs(words: Iterable[str]) -> list[str]:
    return [glob for word in words for glob in (f"{word}.*", f"*.{word}.*")]
