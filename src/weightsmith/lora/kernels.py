"""The kernels of convolutions, which the factors of a LoHa or LoKr leave out where they are stored flattened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.core.keys import role_of
from weightsmith.io.read.lora import Module, parameter_name
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.read.updates import Hadamard, Kronecker, Product, Rows, Update
from weightsmith.lora.compare import Adapters

__all__ = ["described"]

_CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "in_layers_2", "out_layers_3", "_op",
                 "skip_connection")  # fmt: skip
_UNKNOWN = ("embed", "norm", "other")
"""Roles of modules of which a name does not say that they are linear layers: a patch embedding is a convolution."""


def described(adapters: Adapters, modules: Sequence[str], base: str | None) -> dict[str, Module]:
    """Module -> what it is, as the first adapter that has it describes it, with the kernel that the base tells.

    base  the base model; it is looked into where it is a folder here and the names are PEFT's, which are the base's
    Raises PlanError, a line for each module that may be a convolution of unknown kernel.
    """
    found = {name: next(a.modules[name] for a in adapters.values() if name in a.modules) for name in modules}
    shapes, problems = _Base(base), []
    peft = all(adapter.kind == "peft" for adapter in adapters.values())
    for name in (name for name, module in found.items() if _flat(module.update)):
        flat = found[name].update.shape
        shape = shapes.of(name) if peft else None
        if shape is not None and len(shape) == 2:
            continue
        if shape is not None and (shape[0], prod(shape[1:])) == flat:
            rank = found[name].rank
            found[name] = replace(found[name], update=Product("", "", (rank, *shape[1:]), (shape[0], rank)))
        elif shape is not None or name.endswith(_CONVOLUTIONS) or "conv" in name.rpartition(".")[2]:
            problems.append(f"{name} is a convolution, whose kernel a flattened LoHa or LoKr does not tell; {_DO}")
        elif peft and role_of(name) in _UNKNOWN:
            problems.append(
                f"{name} may be a linear layer or a convolution, which a flattened LoHa or LoKr does not tell; name "
                f"the base's folder (base, or base_model_name_or_path in adapter_config.json), or {_DO}"
            )
    if problems:
        shown = problems[:5] + ([f"and {len(problems) - 5} more of this kind"] if len(problems) > 5 else [])
        raise PlanError(shown)
    return found


_DO = 'merge it into its base with "weightsmith merge"'


def _flat(update: Update) -> bool:
    """Whether a kernel may have been left out: a second factor of a LoKr that is stored whole keeps it."""
    if isinstance(update, Rows):
        return _flat(update.of)
    thin = isinstance(update, Hadamard) or (isinstance(update, Kronecker) and not update.two.whole)
    return thin and len(update.shape) == 2


class _Base:
    """The shapes of a base's weights, if it lies here."""

    def __init__(self, base: str | None) -> None:
        self._base = base

    @cached_property
    def _opened(self) -> tuple[Source, Modules] | None:
        if not self._base or not Path(self._base).is_dir():
            return None
        try:
            source = open_source(self._base)
        except SourceError:
            return None
        return source, Modules(source)

    def of(self, module: str) -> tuple[int, ...] | None:
        """[outputs, inputs, *kernel] of a module's weight; None where it is not known."""
        if self._opened is None:
            return None
        source, modules = self._opened
        stored = modules.stored(f"{parameter_name(module, 'weight')}.weight")
        return None if stored is None else source.key(stored).shape
