"""Calibration statistics of one model, written once and read by the methods that need them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightsmith.core.errors import OutputError, WeightsmithError, did_you_mean
from weightsmith.core.keys import layer_of
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.observe.blockwise import routing_by_block
from weightsmith.observe.data import Example, read_examples
from weightsmith.observe.files import Statistic, stat_path, write_statistic
from weightsmith.observe.fisher import MODES, choose_mode
from weightsmith.observe.fisher import fisher as take_fisher
from weightsmith.observe.gram import gram as take_gram
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel, identity, load_model, pick_device, unweighted
from weightsmith.observe.moments import SECOND_MOMENT, second_moment, what_moments_say
from weightsmith.observe.routing import routing as take_routing
from weightsmith.observe.tangents import refuse_tangent

__all__ = ["STATISTICS", "asked", "observe", "said"]

_log = logging.getLogger(__name__)

STATISTICS = ("gram", "fisher", "routing", "routed")
_MIXTURES = ("routing", "routed")
"""Those of mixtures of experts, taken in one pass."""
NOTHING = "nothing to observe; give {} (or --optimizer FILE for second moments)"


def said(model: str, out: Path, names: Sequence[str]) -> list[str]:
    """What there is to say of statistics that were written, a line each."""
    shrink = f"weightsmith moe shrink {model} OUT --stats {out}"
    after = shrink if "routing" in names else f'add "stats: {out}" to this model in the recipe'
    return [f"wrote {', '.join(names)} to {out}", *what_moments_say(out, names), f"next: {after}"]


def asked(stat: str, data: object, optimizer: object) -> list[str]:
    """The statistics that a command line asks for: names separated by commas, or the optimizer's second moments."""
    if optimizer is not None:
        if data is not None or stat:
            raise WeightsmithError("--optimizer takes the place of --data and --stat; give one or the other")
        return [SECOND_MOMENT]
    names = [name.strip() for name in stat.split(",") if name.strip()]
    if data is None or not names:
        raise WeightsmithError(NOTHING.format("--data FILE" if data is None else "--stat gram, fisher or routing"))
    return names


def observe(
    model: str | Path | nn.Module,
    data: str | Path | Iterable[Any] | None,
    stats: Sequence[str],
    out: str | Path,
    *,
    examples: int = 256,
    batch: int = 8,
    length: int = 512,
    kind: str = "auto",
    fisher: str = "auto",
    seed: int = 0,
    field: str | None = None,
    skip_first: bool = False,
    share: bool = True,
    layers: tuple[int, int] | None = None,
    stream: bool = False,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    optimizer: str | Path | None = None,
    rank: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Run a model over calibration data and write OUT/STAT.safetensors for each statistic; returns OUT.

    model       a folder, a hub id[@revision], or a module (used where and as it is)
    data        .txt, .jsonl, .npz, a folder of .txt or images, or an iterable of examples; see `read_examples`
    stats       'gram': inputs of each linear layer, X^T X / rows, [d_in, d_in], under the weight's name;
                'fisher': diagonal Fisher information, shaped like each parameter;
                'routing': what the routers of a mixture of experts do, and 'routed': second moments of what each of
                its experts reads, see `routing`.  All float32.
    examples    how many to use; length: tokens per example; batch: examples per forward pass (gram)
    kind        see `kinds.KINDS`, or 'auto': from the configuration's architectures
    fisher      'exact', 'sampled', 'empirical', or 'auto': exact up to 10 classes, else sampled; of kinds that give
                probabilities
    skip_first  gram: leave out the first token of each text
    share       gram: one matrix for layers with the same input
    layers      blocks [start, end) only; tensors outside the blocks go with the range that starts at 0
    stream      routing, routed: load one block at a time, with activations on the disk in OUT meanwhile
    optimizer   the optimizer's state, for 'second_moment'; no data then, see `moments.second_moment`; rank: likewise
    progress    called with (statistic, examples done, examples in all)

    Raises WeightsmithError and its kinds for bad input; nothing is written then.
    """
    if optimizer is not None:
        if isinstance(model, nn.Module):
            raise WeightsmithError("second moments are written under a checkpoint's names; give its folder")
        return second_moment(model, optimizer, out, rank=rank, overwrite=overwrite)
    if rank is not None:
        raise WeightsmithError("rank is for the second moments of an optimizer; give one, or leave rank out")
    if data is None:
        raise WeightsmithError(NOTHING.format("--data FILE"))
    wanted = _check(stats, examples, batch, length, fisher, layers)
    folder = Path(out)
    for stat in wanted:
        if stat_path(folder, stat).exists() and not overwrite:
            raise OutputError(
                f"{stat_path(folder, stat)} exists; choose another folder, or overwrite it with --overwrite"
            )
    if stream:
        loaded = _streamed(model, wanted, kind, trust_remote_code)
    else:
        loaded = load_model(model, kind=kind, device=device, trust_remote_code=trust_remote_code)
        refuse_tangent(loaded)
    if loaded.kind == "seq2seq-lm":
        raise WeightsmithError(
            f"{loaded.label}: nothing can be observed of an encoder with a decoder: its data would be pairs of texts"
        )
    if skip_first and "text" not in KINDS[loaded.kind].reads:
        raise WeightsmithError(f"skip_first is for texts; {loaded.label} is for {loaded.kind}")
    if "fisher" in wanted:
        choose_mode(fisher, loaded.kind, getattr(loaded.config, "vocab_size", 0))  # refuse before reading data
    found = read_examples(
        data, loaded, examples=examples, length=length, seed=seed, field=field, trust_remote_code=trust_remote_code
    )
    if len(found) < examples:
        _log.info("%s: %d examples, fewer than the %d asked for", data, len(found), examples)
    story: dict[str, Any] = {
        "examples": len(found),
        "model": loaded.label,
        **identity(loaded),
        "data": str(data) if isinstance(data, (str, Path)) else f"{type(data).__name__} in memory",
        "kind": loaded.kind,
        "length": loaded.clip_length(length),
        "seed": seed,
        "layers": layers,
    }
    for stat in (stat for stat in wanted if stat not in _MIXTURES):
        report = None if progress is None else _labelled(progress, stat)
        if stat == "gram":
            statistic = take_gram(
                loaded,
                found,
                batch=batch,
                skip_first=skip_first,
                share=share,
                selected=_in_range(layers),
                progress=report,
            )
            write_statistic(folder, stat, statistic, {**story, "skip_first": skip_first})
        elif stat == "fisher":
            statistic, mode = take_fisher(
                loaded, found, mode=fisher, seed=seed, selected=_in_range(layers), progress=report
            )
            write_statistic(folder, stat, statistic, {**story, "fisher": mode})
    if mixed := [stat for stat in wanted if stat in _MIXTURES]:
        report = None if progress is None else _labelled(progress, mixed[0])
        taken = _routing(loaded, found, folder, stream, layers, device, batch=batch, moments="routed" in mixed,
                         seed=seed, progress=report)  # fmt: skip
        for stat in mixed:
            write_statistic(folder, stat, taken[stat], story)
    return folder


def _streamed(model: str | Path | nn.Module, wanted: Sequence[str], kind: str, trust_remote_code: bool) -> LoadedModel:
    """A model that is to be read block by block, without its weights."""
    if other := [stat for stat in wanted if stat not in _MIXTURES]:
        raise WeightsmithError(f"stream is for {' and '.join(_MIXTURES)}; observe {', '.join(other)} without it")
    if isinstance(model, nn.Module):
        raise WeightsmithError("stream reads a checkpoint block by block; give its folder")
    return unweighted(model, kind=kind, trust_remote_code=trust_remote_code)


def _routing(
    loaded: LoadedModel,
    examples: Sequence[Example],
    folder: Path,
    stream: bool,
    layers: tuple[int, int] | None,
    device: str | torch.device,
    **options: Any,
) -> Mapping[str, Statistic]:
    """'routing', and 'routed' if asked for, in one pass."""
    if "text" not in KINDS[loaded.kind].reads:
        raise WeightsmithError(f"routing is observed of language models; {loaded.label} is for {loaded.kind}")
    if not stream:
        return take_routing(loaded, examples, selected=_in_range(layers), **options)
    with writing(folder):
        system.call(folder.mkdir, parents=True, exist_ok=True)
    return routing_by_block(loaded, examples, folder, layers=layers, device=pick_device(device), **options)


def _check(
    stats: Sequence[str], examples: int, batch: int, length: int, fisher: str, layers: tuple[int, int] | None
) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys([stats] if isinstance(stats, str) else stats))
    if not wanted:
        raise WeightsmithError(f"no statistic asked for; known: {', '.join(STATISTICS)}")
    for stat in wanted:
        if stat not in STATISTICS:
            raise WeightsmithError(f"statistic {stat!r} is not known{did_you_mean(stat, STATISTICS)}")
    for name, value in (("examples", examples), ("batch", batch), ("length", length)):
        if value < 1:
            raise WeightsmithError(f"{name} = {value} must be at least 1")
    if fisher not in ("auto", *MODES):
        choose_mode(fisher, "", 0)
    if layers is not None and not 0 <= layers[0] < layers[1]:
        raise WeightsmithError(f"layers = {layers} is not a range of blocks [start, end) with 0 <= start < end")
    return wanted


def _in_range(layers: tuple[int, int] | None) -> Callable[[str], bool]:
    def selected(name: str) -> bool:
        if layers is None:
            return True
        place = layer_of(name)
        return layers[0] == 0 if place is None else layers[0] <= place[1] < layers[1]

    return selected


def _labelled(progress: Callable[[str, int, int], None], stat: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stat, done, total)
