"""Which way round each adapted weight is stored: [out, in] (Linear) or [in, out] (Conv1D, embeddings, some experts).

peft asks the class of the layer, which a file does not tell.  Where shapes leave it open (square weights), what is
known decides, module by module: other weights of the same kind, then the architecture; else the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key, layer_of
from weightsmith.io.read.lora import Adapter, Module
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.updates import Experts

__all__ = ["Layer", "kind_of", "orientations"]


@dataclass(frozen=True)
class Layer:
    """An adapted module and the base's weight that it belongs to."""

    module: Module
    weight: Key

    @property
    def flips(self) -> tuple[bool, ...]:
        """Orientations that the shapes allow: False for [out, in], True for [in, out]; embeddings are the latter."""
        shape, stored = self.module.update.shape, self.weight.shape
        if len(shape) != len(stored):  # a LoHa or LoKr of a convolution, whose kernel is flattened
            alike = len(stored) > 2 == len(shape) and (shape[0], prod(shape)) == (stored[0], prod(stored))
            return (False,) if alike else ()
        turned = (*shape[:-2], shape[-1], shape[-2])
        may_turn = len(shape) == 2 or isinstance(self.module.update, Experts)
        straight = (False,) if shape == stored and not self.module.embedding else ()
        return (*straight, True) if may_turn and turned == stored else straight


def kind_of(weight: str) -> tuple[str, str]:
    """What weights of one kind have in common: the stack of blocks and the module's last name."""
    module = weight.rpartition(".")[0]
    stack = layer_of(weight)
    return stack[0] if stack else module.rpartition(".")[0], module.rpartition(".")[2]


def orientations(layers: Iterable[Layer], modules: Modules, adapter: Adapter) -> dict[str, bool]:
    """Module -> whether its weight is stored [in, out]."""
    layers = list(layers)
    seen: dict[tuple[str, str], set[bool]] = {}
    for layer in layers:
        if len(layer.flips) == 1 and not layer.module.embedding:
            seen.setdefault(kind_of(layer.weight.name), set()).add(layer.flips[0])
    turned = {kind[0] for kind, flips in seen.items() if True in flips}
    alike = len({kind_of(layer.weight.name)[1] for layer in layers if not layer.module.embedding}) == 1
    found = {}
    for layer in layers:
        flip: bool | None = layer.flips[0]
        if len(layer.flips) == 2:
            known = seen.get(kind_of(layer.weight.name), set())
            if len(known) == 1:
                (flip,) = known
            elif isinstance(layer.module.update, Experts):
                flip = modules.experts_turned(layer.weight)
            else:
                flip = modules.flipped(layer.weight.name.rpartition(".")[0])
                if flip is False and not modules.config and kind_of(layer.weight.name)[0] in turned:
                    flip = None  # other layers beside it are stored [in, out]
                if flip is None and alike:  # peft notes it for the last layer it adapted, and all are of one kind
                    flip = bool(adapter.config.get("fan_in_fan_out"))
        if flip is None:
            raise SourceError(
                f"{adapter.label}: {layer.weight.name!r} is square, and nothing tells whether it is stored [out, in] "
                "or [in, out]: put the base's config.json (with its model_type) beside its weights"
            )
        found[layer.module.name] = flip
    return found
