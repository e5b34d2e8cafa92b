"""A model that runs without holding its large matrices: linear layers and embeddings read theirs while they work.

What is read comes from any source of the same tensors.  So one model runs with its weights as they were, as a view
calculates them and as a folder holds them, and each weight is read, block by block, where it is multiplied, while it
is in the cache.  What other modules have (norms, biases, experts in one tensor) is held in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key, role_of
from weightsmith.core.settings import cores
from weightsmith.engine.runner import one_thread_each
from weightsmith.io.disk import gigabytes
from weightsmith.io.package.tangent import tangent_of
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source
from weightsmith.observe.memory import available_memory
from weightsmith.observe.model import LoadedModel, load_model

__all__ = ["Running", "memory_of", "running"]

_BLOCK = 1 << 18  # entries that are read at once: they stay in the cache until they are used
_HEADS = 128  # rows that are read together at least, so that few heads are cut
_HELD = 1.4  # memory of a model that is held and run, in sizes in float32
_AT_ONCE = 4  # matrices that a view keeps or reads whole at once, in float32
_FEW = 8  # tokens up to which x W^T is the faster product, and W x^T beyond


class Running:
    """A model that is loaded, and where its weights come from.

    loaded    the model, on the CPU in float32
    streamed  the tensors that it does not hold
    """

    def __init__(self, loaded: LoadedModel, source: Source, layers: Iterable[tuple[nn.Module, str]] = ()) -> None:
        self.loaded, self._source, self.streamed = loaded, source, frozenset(stored for _, stored in layers)
        self._workers: ThreadPoolExecutor | None = None
        self._rooms = threading.local()
        for layer, stored in layers:
            work: Callable[..., Tensor] = self._looked_up if isinstance(layer, nn.Embedding) else self._multiplied
            layer.forward = partial(work, layer, stored)

    @contextmanager
    def at_work(self) -> Iterator[LoadedModel]:
        """The model, with as many threads at its products as there are processors."""
        if not self.streamed:
            yield self.loaded
            return
        with one_thread_each(), ThreadPoolExecutor(cores()) as self._workers:
            yield self.loaded

    def take(self, view: Source, names: Iterable[str]) -> bool:
        """Let the model have the tensors of a view, as they are calculated or stored, in place of its own.

        names  those that differ from the ones that it has
        False where its parameters are not those of the view one by one: then it is of no use any more.
        """
        changed, packed = set(names), packed_like_memory(view)
        if any(stored not in view.keys for stored in self.streamed):
            return False
        self._source = view
        changed -= self.streamed
        with torch.no_grad():
            for name, parameter in chain(self.loaded.module.named_parameters(), self.loaded.module.named_buffers()):
                known = self.loaded.names.name(name) if isinstance(parameter, nn.Parameter) else None
                stored = known if known in changed else name if name in changed else None
                if stored is not None and packed.key(stored).shape == tuple(parameter.shape):
                    _fill(parameter, packed, stored)
                    changed.discard(stored)
        return not changed

    # -- layers

    def _multiplied(self, layer: nn.Linear, stored: str, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out], as the layer does."""
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty(len(flat), layer.out_features)
        turned = flat.T.contiguous()
        rows = -(-max(1, _BLOCK // layer.in_features) // _HEADS) * _HEADS

        def part(low: int) -> None:
            weight = self._floats(self._source.read(stored, low, min(low + rows, layer.out_features)), flat.dtype)
            out[:, low : low + rows] = flat @ weight.T if len(flat) <= _FEW else (weight @ turned).T

        starts = range(0, layer.out_features, rows)
        list(map(part, starts) if self._workers is None or len(starts) < 2 else self._workers.map(part, starts))
        out = out if layer.bias is None else out + layer.bias
        return out.reshape(*x.shape[:-1], -1)

    def _floats(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers of another dtype, in memory of this thread that is used again for the next ones."""
        if weight.dtype == dtype:
            return weight
        room = getattr(self._rooms, "room", None)
        if room is None or room.numel() < weight.numel() or room.dtype != dtype:
            room = self._rooms.room = torch.empty(weight.numel(), dtype=dtype)
        filled: Tensor = room[: weight.numel()].view(weight.shape).copy_(weight)
        return filled

    def _looked_up(self, layer: nn.Embedding, stored: str, ids: Tensor) -> Tensor:
        """Rows of a table of float32, [.., width]."""
        rows = [self._source.read(stored, int(i), int(i) + 1) for i in ids.reshape(-1)]
        return torch.cat(rows).float().reshape(*ids.shape, -1)


def memory_of(source: Source, *, hold: bool = False) -> int:
    """About how many bytes `running` takes, as far as names tell which layers are streamed."""
    packed, modules = packed_like_memory(source), Modules(source)

    def held(key: Key) -> bool:
        # Embeddings may be scaled by a class of their own, and a layer that stores [in, out] is none of torch's.
        rest = len(key.shape) != 2 or role_of(key.name) in ("embed", "head")
        return hold or rest or modules.flipped(key.name.removesuffix(".weight")) is not False

    sizes = {key.name: (4 * key.numel, held(key)) for key in packed.keys.values()}
    streamed = max((size for size, stays in sizes.values() if not stays), default=0)
    return int(_HELD * sum(size for size, stays in sizes.values() if stays)) + _AT_ONCE * streamed


def running(source: Source, *, hold: bool = False) -> Running:
    """The model of a source's folder, ready to run.

    hold  all of its weights, for a model that does not run without
    Raises SourceError for a source without a folder, and where holding them takes more memory than there is.
    """
    folder = source.origin.folder
    if folder is None:
        raise SourceError(f"{source}: no folder with a config.json, so the model cannot be run before and after")
    need, room = memory_of(source, hold=True), available_memory(torch.device("cpu"))
    if hold and room is not None and need > room:
        raise SourceError(
            f"{source}: its class uses weights in a way of its own, so all are held to run it, which takes about "
            f"{gigabytes(need)} of memory, and {gigabytes(room)} are there; use a larger machine, or pass --no-compare"
        )
    made = None if hold or tangent_of(folder) is not None else _streaming(source, folder)
    return made or Running(load_model(folder, device="cpu"), source)


def _streaming(source: Source, folder: Path) -> Running | None:
    """A model whose linear layers and embeddings are streamed; None where its class does not tell its weights apart.

    It is loaded with numbers that are none in place of all matrices: a layer that uses one in a way of its own gives
    no number either, and nothing that is wrong.
    """
    matrices = {name for name, key in source.keys.items() if len(key.shape) == 2 and key.floating}
    absent = torch.full((), float("nan"))
    state = {
        name: absent.expand(source.key(name).shape) if source.key(name).name in matrices else _held(source, name)
        for name in (*source.keys, *source.aliases)
    }
    loaded = load_model(folder, device="cpu", state=state)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in loaded.module.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            holders.setdefault(id(parameter), []).append((module, name))
    packed, layers = packed_like_memory(source), list[tuple[nn.Module, str]]()
    for parameter in loaded.module.parameters():
        own = holders[id(parameter)]
        stored = loaded.names.name(*(name for _, name in own))
        if stored in matrices and all(_plain(module) for module, _ in own):
            layers += [(module, stored) for module, _ in own]
        elif stored in matrices:
            parameter.data = _held(source, stored)
        elif parameter.is_floating_point() and bool(parameter.isnan().any()):  # made of several tensors
            stored = next((name for _, name in own if name in packed.keys), None)
            if stored is None or packed.key(stored).shape != tuple(parameter.shape):
                return None
            parameter.data = _held(packed, stored)
    return Running(loaded, source, layers)


def _plain(module: nn.Module) -> bool:
    """Whether a module does with its weight what torch's own do, and nothing else."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear


def _held(source: Source, name: str) -> Tensor:
    value = source.read(name)
    return value.float() if source.key(name).floating else value


def _fill(parameter: Tensor, source: Source, name: str) -> None:
    key = source.key(name)
    if not parameter.ndim:
        parameter.copy_(source.read(name))
        return
    rows = max(1, _BLOCK // max(1, key.numel // max(1, key.rows)))
    for low in range(0, key.rows, rows):
        high = min(key.rows, low + rows)
        parameter[low:high].copy_(source.read(name, low, high))
