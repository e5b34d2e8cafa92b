"""Tensors that the base, or first model, lacks: whose are carried over into the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import Source

__all__ = ["carried_reason", "has", "own_key", "ownerless", "owners"]


def has(source: Source, name: str) -> bool:
    return name in source.keys or name in source.aliases


def owners(inputs: Inputs, name: str) -> list[str]:
    """The experts that have a tensor, in recipe order."""
    return [expert for expert, source in inputs.experts.items() if has(source, name)]


def own_key(key: Key, owner: str) -> Key:
    """As what a compressed folder stores a tensor that only experts have."""
    from weightsmith.io.read.codec_folder import own_name  # loaded for compressed folders only

    return Key(own_name(key.name, owner), key.shape, key.dtype)


def carried_reason(inputs: Inputs, name: str, owner: str, label: str) -> str:
    """Why `owner`'s is taken; label: how the base, or first model, is called."""
    others = [expert for expert in owners(inputs, name) if expert != owner]
    if not others:
        return f"only in {owner}, kept from there"
    return f"not in {label}; {owner} is the first that has it, {', '.join(others)} dropped"


def ownerless(inputs: Inputs, names: Iterable[str], label: str) -> Iterator[Problem]:
    """A problem for the tensors that several models have and others lack: whose is meant, nobody said."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if len(found := tuple(owners(inputs, name))) > 1:
            shared.setdefault(found, []).append(name)
    for found, tensors in shared.items():
        lacking = dict.fromkeys([label, *(name for name in inputs.experts if name not in found)])
        what = f"{tensors[0]} and {len(tensors) - 1} more are" if len(tensors) > 1 else f"{tensors[0]} is"
        text = (
            f"{what} in {', '.join(found)} but not in {', '.join(lacking)}: give them other names in all models but "
            f'one, or take those of {found[0]} with "extra: first"'
        )
        yield Problem(Code.SURPLUS, tensors[0], text)
