"""What a compressed folder says of a model that runs: its shared tensors, and what each expert adds to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import some
from weightsmith.io.read.codec_folder import CodecFolder
from weightsmith.io.read.source import Source
from weightsmith.ops.spectral import svd_of

__all__ = ["Change", "changes_of", "unfit"]


@dataclass(frozen=True)
class Change:
    """A tensor of the shared model, and what the experts add to it.

    shared   as it is stored
    factors  (left [T, r, rows], right [T, r, columns]) of matrices; None elsewhere
    more     [T, *shape] of other tensors
    """

    shared: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    more: Tensor | None = None


def unfit(folder: CodecFolder, base: Source) -> Iterable[str]:
    """What about a folder cannot run."""
    if "alone" in folder.about:
        yield f"{folder.path}: holds one compressed model, and no experts of a base"
    for codec in sorted(set(folder.codecs.values()), key=lambda c: c.name):
        names = (name for name, own in folder.codecs.items() if own == codec)
        kept = {part.name for name in names for part in codec.parts(base.key(name), folder.experts)}
        if not kept <= {"u", "s", "v", "tau", "whole"}:
            yield (
                f"{folder.path}: {codec.describe()} keeps {', '.join(sorted(kept))}, no singular triplets that could "
                "run as branches; compress again with twin and strategy svd"
            )
    own = sorted({name.partition("::own.")[0] for name in folder.files.keys if "::own." in name})
    if own:
        yield f"{folder.path}: {some(own, 3)} is not in the base; one running model has no heads per expert"


def changes_of(folder: CodecFolder, base: Source) -> dict[str, Change]:
    """Stored name -> the shared tensor, and what the experts add."""
    found = {name: Change(folder.files.read(name).float()) for name in base.keys if name in folder.files.keys}
    for name, codec in folder.codecs.items():
        parts: dict[str, dict[str, Tensor]] = {}
        for part in codec.parts(base.key(name), folder.experts):
            parts.setdefault(part.expert, {})[part.name] = folder.files.read(part.key.name).float()
        own = [parts[expert] for expert in folder.experts]
        if "whole" in own[0]:
            found[name] = _of_wholes(torch.stack([part["whole"] for part in own]))
            continue
        shared = base.read(name).float()
        if "" in parts:
            shared = shared + parts[""]["tau"]
        left = torch.stack([(part["u"] * part["s"]).T for part in own])
        found[name] = Change(shared, (left, torch.stack([part["v"].T for part in own])))
    return found


def _of_wholes(wholes: Tensor) -> Change:
    """Tensors that are stored per expert, [T, *shape]: the shared one is their mean."""
    shared = wholes.mean(0)
    more = wholes - shared
    if not bool(more.any()):
        return Change(shared)
    if shared.ndim != 2:
        return Change(shared, more=more)
    factors = [svd_of(one, min(one.shape)) for one in more]
    rank = max(part.s.numel() for part in factors)

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.float(), (0, rank - x.shape[1])).T

    return Change(shared, (torch.stack([wide(p.u * p.s) for p in factors]), torch.stack([wide(p.v) for p in factors])))
