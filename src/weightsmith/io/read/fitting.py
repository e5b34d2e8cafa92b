"""Fitting an adapter to a base: which tensor each part of it belongs to, in which shape and orientation.

Every tensor of the adapter is used, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import Key
from weightsmith.io.read.changes import Change, Changes
from weightsmith.io.read.headed import is_classifier, of_tokens
from weightsmith.io.read.lora import Adapter, Module
from weightsmith.io.read.lora_names import finder_of, placed
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.orientation import Layer, orientations
from weightsmith.io.read.source import Source
from weightsmith.io.read.targets import Targets
from weightsmith.io.read.updates import Product, Rows

__all__ = ["fitted"]


def fitted(adapter: Adapter, base: Source) -> Changes:
    """What an adapter does to a base.  Raises SourceError for what does not belong to it, or does not fit."""
    found = Changes(says=list(adapter.says))
    targets = Targets(adapter, base, Modules(base))
    for target, stored in adapter.whole.items():
        _replace(found, adapter, base, targets, target, stored)
    for name, rows in adapter.rows.items():
        key = targets.weight(name, "weight", rows.stored)
        _enter(found, key.name, rows=rows)
        if max(rows.indices, default=0) >= _key(found, base, targets, key.name).rows:
            raise SourceError(f"{adapter.label}: {rows.stored!r} is for token {max(rows.indices)}, which {key.name!r} "
                              f"in {base} has no row for")  # fmt: skip
    for (name, leaf), stored in adapter.shifts.items():
        _shift(found, adapter, base, targets, name, leaf, stored)
    layers = list(_layers(found, adapter, base, targets))
    flips = orientations(layers, targets.modules, adapter)
    for layer in layers:
        _add(found, adapter, base, targets, layer, flips[layer.module.name])
    if not found.tensors:
        raise SourceError(f"{adapter.label}: the adapter changes none of the {len(base.keys)} tensors of {base}")
    targets.settle(found)
    if found.heads:
        _as_classifier(found, adapter, base, targets.modules)
    return found


def _as_classifier(found: Changes, adapter: Adapter, base: Source, modules: Modules) -> None:
    """Leave out the output layer over tokens, where the adapter makes a classifier of the model."""
    heads = some(found.heads)
    if not is_classifier(adapter):
        found.says.append(f"trained {heads}, which the base lacks: added, with config.json as it is")
        return
    found.dropped = of_tokens(base, modules)
    less = f", without {some(sorted(found.dropped))}" if found.dropped else ""
    found.says.append(f"trained {heads}, which the base lacks: the result is a classifier with that head{less}")


def _enter(found: Changes, name: str, **what: Any) -> None:
    found.tensors[name] = replace(found.tensors.get(name, Change()), **what)


def _key(found: Changes, base: Source, targets: Targets, name: str) -> Key:
    """A target's key, which a replacement may have made larger."""
    return found.keys.get(name) or base.keys.get(name) or targets.virtual[name]


def _replace(found: Changes, adapter: Adapter, base: Source, targets: Targets, target: str, stored: str) -> None:
    """Enter a tensor that is kept in full: in the place of the base's, or as a new one."""
    key = adapter.file.key(stored)
    known = targets.whole(target, stored)
    if known is None:
        found.heads = (*found.heads, target)
        found.keys[target] = Key(target, key.shape, key.dtype)
        found.tensors[target] = Change(replacement=stored)
        return
    if key.shape != known.shape:
        tokens = known.role in ("embed", "head") and key.shape[1:] == known.shape[1:] and bool(key.shape)
        if not tokens:
            raise SourceError(
                f"{adapter.label}: {stored!r} is {list(key.shape)}, but {known.name!r} in {base} is {list(known.shape)}"
            )
        found.keys[known.name] = Key(known.name, key.shape, known.dtype)
    twin = found.tensors.get(known.name)
    if twin and twin.replacement and not np.array_equal(adapter.file.bits(twin.replacement), adapter.file.bits(stored)):
        raise SourceError(f"{adapter.label}: {stored!r} is stored twice, differently (two adapters in one file?)")
    _enter(found, known.name, replacement=stored)


def _shift(found: Changes, adapter: Adapter, base: Source, targets: Targets, name: str, leaf: str, stored: str) -> None:
    """Enter a difference that is added as it is."""
    _, keys = finder_of(adapter, base, targets.modules).find(name)
    known = f"{keys[0].name.rpartition('.')[0]}.{leaf}" if keys else ""
    if known not in base.keys:
        raise SourceError(f"{adapter.label}: {stored!r} belongs to no {leaf} of {base}")
    key = base.keys[known]
    if (shape := adapter.file.key(stored).shape) != key.shape:
        raise SourceError(
            f"{adapter.label}: {stored!r} is {list(shape)}, but {key.name!r} in {base} is {list(key.shape)}"
        )
    _enter(found, key.name, bias=stored)


def _layers(found: Changes, adapter: Adapter, base: Source, targets: Targets) -> Iterator[Layer]:
    """Every module beside the weight that it belongs to; several where a fused matrix is stored in parts."""
    if adapter.kind == "peft":
        yield from (_layer(found, adapter, base, targets, module) for module in adapter.modules.values())
        return
    places, says = placed(adapter, base, targets.modules)
    found.says += says
    for module, keys in places:
        if len(keys) == 1:
            yield _checked(adapter, base, Layer(module, keys[0]))
            continue
        if module.magnitude is not None:
            raise SourceError(f"{adapter.label}: {module.name!r} is DoRA of a matrix that {base} stores in parts")
        first = 0
        for key in keys:
            part = replace(module, name=key.name, update=Rows(module.update, first, first + key.rows))
            first += key.rows
            yield _checked(adapter, base, Layer(part, key))


def _layer(found: Changes, adapter: Adapter, base: Source, targets: Targets, module: Module) -> Layer:
    """A module beside the base's weight that it belongs to, once the two fit each other."""
    some = module.update.stored[0]
    key = targets.weight(module.name, module.parameter, some)
    weight = _key(found, base, targets, key.name)
    if not weight.floating:
        raise SourceError(
            f"{adapter.label}: {weight.name!r} in {base} is {weight.dtype} (quantised?); give the full model"
        )
    return _checked(adapter, base, Layer(_attention(found, targets, module, weight), weight))


def _attention(found: Changes, targets: Targets, module: Module, weight: Key) -> Module:
    """The output projection of torch's MultiheadAttention as a running peft model has it (as of peft 0.21.2)."""
    attention = weight.name.removesuffix(".out_proj.weight")
    if attention == weight.name or f"{attention}.in_proj_weight" not in targets.base.keys:
        return module
    if ".base_layer." in module.name:
        found.says.append(f"{attention}.out_proj: its change counts twice, as it does in a running peft model")
        return replace(module, scale=2 * module.scale)
    found.says.append(
        f"{attention}.out_proj is adapted without its in_proj: merged as peft merges it, though it has no effect in a "
        "running peft model"
    )
    return module


def _checked(adapter: Adapter, base: Source, layer: Layer) -> Layer:
    module, weight = layer.module, layer.weight
    if not layer.flips:
        shape = list(module.update.shape)
        if isinstance(module.update, Product) and module.update.groups > 1:
            raise SourceError(
                f"{adapter.label}: {module.name!r} adapts a grouped convolution; its change takes in the inputs of all "
                f"groups, so no weight of {list(weight.shape)} can hold it; keep it as an adapter"
            )
        raise SourceError(
            f"{adapter.label}: {module.name!r} adapts a weight of shape {shape}, but {weight.name!r} in {base} "
            f"is {list(weight.shape)}"
        )
    lengths = 0 if module.magnitude is None else prod(adapter.file.key(module.magnitude).shape)
    full = module.update.shape if len(module.update.shape) == len(weight.shape) else weight.shape
    outputs, inputs = full[0], full[1]  # of a convolution: whatever its kernel
    if module.magnitude is not None and lengths != (inputs if module.inward else outputs):
        raise SourceError(
            f"{adapter.label}: {module.magnitude!r} is {list(adapter.file.key(module.magnitude).shape)}, "
            f"but {module.name!r} has {outputs} outputs and {inputs} inputs"
        )
    return layer


def _add(found: Changes, adapter: Adapter, base: Source, targets: Targets, layer: Layer, flip: bool) -> None:
    """Enter one module's update, on top of a replacement that may be there."""
    module = layer.module
    before = found.tensors.get(layer.weight.name)
    if before is not None and before.update is not None:
        raise SourceError(f"{adapter.label}: {module.name!r} adapts {layer.weight.name!r}, as another module does")
    _enter(
        found,
        layer.weight.name,
        update=module.update,
        scale=module.scale,
        flip=flip,
        magnitude=module.magnitude,
        inward=module.inward,
    )
    if module.bias is not None:
        name = f"{layer.weight.name.rpartition('.')[0]}.bias"
        key = base.keys.get(name) or targets.weight(module.name, "bias", module.bias)
        shape = adapter.file.key(module.bias).shape
        if key.shape != shape:
            raise SourceError(f"{adapter.label}: {module.bias!r} is {list(shape)}, but {key.name!r} in {base} is "
                              f"{list(key.shape)}")  # fmt: skip
        _enter(found, key.name, bias=module.bias, scale=module.bias_scale)
