"""Routing of models larger than memory: block by block, each loaded by itself, with the activations on the disk.

A block is run as a model of one layer, so that masks, positions and what else its family does are transformers' own;
the next one reads what it gave.  In memory: one block in float32 and one batch; of the first one also the embedding.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.core.keys import layer_of
from weightsmith.io import system
from weightsmith.io.disk import remove, write_file, writing
from weightsmith.io.read.files import File
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.layers import blocks_held, config_of, counted_blocks
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import RenamedSource, SliceSource
from weightsmith.observe.data import Batch, Example, batches
from weightsmith.observe.files import Statistic
from weightsmith.observe.gram import full_precision
from weightsmith.observe.mixtures import Mixture, mixtures
from weightsmith.observe.model import LoadedModel, block_model
from weightsmith.observe.routing import Layer, Sums, refuse_large, sample_of, seen, statistics

__all__ = ["routing_by_block"]


def routing_by_block(
    loaded: LoadedModel,
    examples: Sequence[Example],
    work: Path,
    *,
    batch: int = 8,
    moments: bool = False,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Statistic]:
    """As `routing.routing`, of a model that is known from its folder alone: `loaded` has no weights.

    work    an existing folder; the activations, 4 bytes x tokens x hidden size, lie in a folder inside it meanwhile
    device  where the blocks are run

    Raises SourceError for a model whose blocks cannot be run one after the other.
    """
    if loaded.folder is None:
        raise WeightsmithError(f"{loaded.label}: a module in memory is not read block by block; give its folder")
    source, stack, count = _stack(FolderSource(loaded.folder), loaded.label)
    first, last = layers or (0, count)
    last = min(last, count)
    if first >= count:
        raise WeightsmithError(f"{loaded.label}: blocks from {first} on were asked for; it has {count}")
    parts, sample, found = list(batches(examples, batch)), sample_of(examples, seed), list[Layer]()
    with _folder(work) as place, torch.no_grad(), full_precision():
        for block in range(last):
            one = _block(loaded, source, stack, block, device)
            here = [Sums(m, moments) for m in _mixtures(one, f"{stack}.0", f"{stack}.{block}")]
            here = here if block >= first else []
            refuse_large([sums.mixture for sums in here], moments)
            _run(one, here, parts, sample, place, block)
            found += [sums.finish() for sums in here]
            if progress is not None:
                progress(block + 1, last)
    if not found:
        raise WeightsmithError(f"{loaded.label}: no layer with experts among blocks {first} to {last - 1}")
    return statistics(found)


def _run(
    one: LoadedModel, sums: Sequence[Sums], parts: Sequence[Batch], sample: Sequence[Tensor], place: Path, block: int
) -> None:
    """Send all batches through one block: from the token ids, or from what the block before has left in `place`."""
    done = 0
    with _ends(one.module) as ends:
        for number, part in enumerate(parts):
            file = place / f"{number}.activations"
            attention = None if part.mask is None else part.mask.to(one.device, torch.int64)
            given = {"input_ids": part.inputs.to(one.device)}
            if block:
                given = {"inputs_embeds": _read(file, part.inputs.shape).to(one.device)}
            with seen(sums, part, sample[done : done + len(part.inputs)]):
                one.module(**given, attention_mask=attention, use_cache=False)
            if block and not torch.equal(ends["in"], given["inputs_embeds"]):
                raise SourceError(f"{one.label}: its blocks read something else than what the block before gives; "
                                  "observe it without stream")  # fmt: skip
            write_file(file, ends["out"].cpu().contiguous().numpy().tobytes())
            done += len(part.inputs)


# --- one block as a model --------------------------------------------------------------------------


def _stack(source: Source, label: str) -> tuple[Source, str, int]:
    """The source without blocks that config.json does not count (multi-token prediction), its stack, their number."""
    text = config_of(source)
    said = counted_blocks(json.loads(text)) if text is not None else None
    held = blocks_held(name for name in source.keys if ".experts." in name)
    if said is None or len(held) != 1:
        raise SourceError(f"{label}: no single stack of blocks with experts whose number config.json says")
    (stack,), count = held, min(said[1])
    names = [n for n in source.keys if (p := layer_of(n)) is None or p[0] != stack or p[1] < count]
    return RenamedSource(source, dict(zip(names, names, strict=True))), stack, count


def _block(loaded: LoadedModel, source: Source, stack: str, block: int, device: torch.device) -> LoadedModel:
    """Block `block` as a model of one layer, in float32; the first with the embedding, the others with one of a row."""
    cut = SliceSource(source, block, block + 1, stack)
    text = cut.origin.config
    assert text is not None
    config = json.loads(text)
    inside = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    embeddings = ("embed_tokens.weight",)
    names = [n for n in cut.keys if layer_of(n) is not None or (not block and n.endswith(embeddings))]
    if block:
        inside |= {"vocab_size": 1, "pad_token_id": None}
    shown = RenamedSource(cut, dict(zip(names, names, strict=True)))
    return block_model(loaded, config, shown, device)


def _mixtures(one: LoadedModel, here: str, there: str) -> list[Mixture]:
    """The mixtures of a block, under the names of the whole model; none in a dense block."""
    if not any(isinstance(getattr(m, "experts", None), nn.Module) for m in one.module.modules()):
        return []
    return mixtures(one, lambda name: there + name.removeprefix(here))


@contextlib.contextmanager
def _ends(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What goes into the only block and comes out of it, of the run before."""
    found: dict[str, Tensor] = {}
    block = next(m for n, m in module.named_modules() if layer_of(f"{n}.x") == (n[:-2], 0))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["in"] = args[0] if args else kwargs["hidden_states"]

    def after(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
        found["out"] = (out[0] if isinstance(out, tuple) else out).float()

    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# --- activations on the disk -----------------------------------------------------------------------


@contextlib.contextmanager
def _folder(work: Path) -> Iterator[Path]:
    """A folder of one's own in `work`, gone at the end."""
    with writing(work):
        place = Path(system.call(tempfile.mkdtemp, prefix=".activations-", dir=work))
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):  # there may be an error to report already
            remove(place)


def _read(file: Path, shape: torch.Size) -> Tensor:
    stored = File(file)
    values = stored.read(0, stored.size).view(np.float32)
    return torch.from_numpy(values.reshape(*shape, -1).copy())
