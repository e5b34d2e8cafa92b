"""Adam's second moments, read from what a trainer saved: the statistic "second_moment".

Five forms are read: safetensors (`NAME` or `NAME.exp_avg_sq`), torch's optimizer state under the parameters' names
(distributed training), torch's numbered state (`optimizer.pt`), folders of torch.distributed.checkpoint, and
DeepSpeed's universal checkpoints, which its `ds_to_universal.py` makes of ZeRO's shards.  Numbers have names only
through the order in which the optimizer got the parameters: that of `param_names` where torch (2.6 or later) noted it,
else that of the model's parameters, in one group or in transformers' two (decayed or not; older versions
know few norms, by their class).
Whatever fits neither is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import OutputError, SourceError, some
from weightsmith.core.keys import DTYPES, role_of
from weightsmith.io import system
from weightsmith.io.read.dcp import METADATA, Checkpoint
from weightsmith.io.read.pickle import PICKLES, load_pickle
from weightsmith.io.read.prefixes import unwrapped
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.io.read.stats import SIDES, StatsSource
from weightsmith.observe.files import Statistic, stat_path, write_statistic
from weightsmith.observe.model import LoadedModel, identity, load_model
from weightsmith.ops.moments import low_rank, product, rank_one

__all__ = ["SECOND_MOMENT", "second_moment", "what_moments_say"]

SECOND_MOMENT = "second_moment"
MOMENT = "exp_avg_sq"
WRAPPERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_state")
PARTS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
"""What transformers' Trainer and accelerate call the optimizer's part of a checkpoint's folder."""
VANISHED = 0.01
"""A greater share of zeros in float16 moments: below 6e-8 that dtype has none, and language models' are smaller."""


@dataclass(frozen=True, eq=False)
class _Moment:
    """One parameter's moment; divided by 1 - beta2^step it does not depend on how long the training took."""

    values: Tensor
    step: float | None = None
    beta2: float | None = None

    @property
    def unbiased(self) -> Tensor:
        wide = self.values.float()
        if not self.step or self.beta2 is None:
            return wide
        unbiased: Tensor = wide / (1 - self.beta2**self.step)
        return unbiased


def second_moment(
    model: str | Path, optimizer: str | Path, out: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> Path:
    """Write OUT/second_moment.safetensors: float32, shaped like the weights, under the checkpoint's names.

    model      folder or hub id[@revision] of the checkpoint that the optimizer made
    optimizer  a .safetensors or torch file, a folder of torch.distributed.checkpoint, a universal checkpoint of
               DeepSpeed, or a Trainer's checkpoint folder, with the state of Adam or another with `exp_avg_sq`
    rank       keep matrices as products: 1: of row and column sums (Adafactor's); more: of that many singular
               directions, but for embeddings and heads, with negative entries read as 0.  None: all entries

    Moments are divided by 1 - beta2^step where the file says both, so that models of different length compare.

    Raises SourceError where a moment cannot be given a name, has another shape than its weights, is negative, not
    finite, or was rounded to zero by float16.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise OutputError(f"rank = {rank!r}; expected a whole number from 1 on")
    path, folder = Path(optimizer), Path(out)
    if stat_path(folder, SECOND_MOMENT).exists() and not overwrite:
        where = stat_path(folder, SECOND_MOMENT)
        raise OutputError(f"{where} exists; choose another folder, or overwrite it with --overwrite")
    loaded = load_model(model, device="cpu")
    found = _read(path, loaded)
    for name, moment in found.items():
        _check(path, name, moment.values)
    tensors, lost = loaded.names.convert(_plain(found, loaded))
    if not tensors:
        raise SourceError(f"{path}: none of its {len(found)} moments belongs to {loaded.label}: {some(list(found), 3)}")
    stored = loaded.names.source
    missing = {} if stored is None else {n: "not in the optimizer's state" for n in stored.keys if n not in tensors}
    corrected = all(m.step and m.beta2 is not None for m in found.values())
    story = {"examples": 0, "model": loaded.label, "optimizer": path.name, "bias_corrected": corrected, "lost": lost}
    factored: list[str] = []
    if rank is not None:
        tensors, factored, missed = _as_products(tensors, rank)
        story |= {"rank": rank, "missed": missed}
    story |= identity(loaded)
    write_statistic(folder, SECOND_MOMENT, Statistic(tensors, rows=0, skipped=missing, factored=factored), story)
    return folder


def what_moments_say(out: Path, written: Sequence[str]) -> Iterator[str]:
    """What a user should know of second moments, a line each, where they are among the statistics written."""
    if SECOND_MOMENT not in written:
        return
    notes = StatsSource(stat_path(out, SECOND_MOMENT)).origin.metadata
    if not notes.get("bias_corrected"):
        yield (
            "moments are as they were saved, since the file does not say step and beta2 of all parameters; beside "
            "a model that was trained for longer, take normalize: mean"
        )
    if "rank" in notes:
        count, missed = len(notes.get("factored", ())), notes["missed"]
        yield f"{count} matrices are kept as products of rank {notes['rank']}, which miss {missed:.1%} of their norm"


def _as_products(tensors: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], list[str], float]:
    """What is kept of moments, which of them as products, and the share of their norm that these miss."""
    kept: dict[str, Tensor] = {}
    factored: list[str] = []
    squares = missed = 0.0
    for name, values in tensors.items():
        whole = values.ndim != 2 or rank * sum(values.shape) >= values.numel()
        if whole or (rank > 1 and role_of(name) in ("embed", "head")):
            kept[name] = values
            continue
        sides = rank_one(values) if rank == 1 else low_rank(values, rank)
        kept |= {f"{name}.{side}": part.contiguous() for side, part in zip(SIDES, sides, strict=True)}
        factored.append(name)
        squares += float(values.double().square().sum())
        missed += float((product(*sides).double() - values).square().sum())
    return kept, factored, (missed / squares) ** 0.5 if squares else 0.0


def _read(path: Path, loaded: LoadedModel) -> dict[str, _Moment]:
    """Parameter name, as the file or the module has it -> its moment."""
    if path.is_dir():
        return _of_folder(path, loaded)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix not in PICKLES:
        raise SourceError(f"{path}: expected a .safetensors file or a torch file ({', '.join(PICKLES)})")
    state = load_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return _of_state(path, state, loaded)


def _of_state(path: Path, state: Any, loaded: LoadedModel) -> dict[str, _Moment]:
    """The moments in an optimizer's state_dict."""
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise SourceError(f"{path}: not an optimizer's state; expected the entries 'state' and 'param_groups'")
    groups = state.get("param_groups") or []
    names = _names(path, state["state"], groups, loaded)
    # Adafactor's decay is 1 - step^decay_rate, 0 at first: its moments have no bias.
    known = [group for group in groups if "betas" in group or "decay_rate" in group]
    betas = {n: g["betas"][1] if "betas" in g else 0.0 for g in known for n in g.get("params", ())}
    moments = {}
    for number, entry in state["state"].items():
        if (values := _values(entry)) is not None:
            step = entry.get("step")
            moments[names[number]] = _Moment(values, None if step is None else float(step), betas.get(number))
    if not moments:
        raise SourceError(f"{path}: no parameter has {MOMENT!r}; only Adam and its relatives keep second moments")
    return moments


def _of_folder(path: Path, loaded: LoadedModel) -> dict[str, _Moment]:
    if (path / METADATA).is_file():
        return _of_state(path, _distributed(path), loaded)
    for zero in (path, path / "zero"):
        if found := _universal(zero):
            return found
    for part in PARTS:
        if (path / part).exists():
            return _read(path / part, loaded)
    if any(system.call(list, path.glob(f"{where}*zero_pp_rank_*optim_states.pt")) for where in ("", "*/")):
        raise SourceError(
            f"{path}: shards of ZeRO, whose parts have no names; consolidate them with DeepSpeed's ds_to_universal.py "
            "and give the folder that it writes"
        )
    raise SourceError(
        f"{path}: neither a folder of torch.distributed.checkpoint ({METADATA}), nor a universal checkpoint of "
        f"DeepSpeed (zero/NAME/{MOMENT}.pt), nor a trainer's with {PARTS[0]}; give one of these, or a file"
    )


def _distributed(path: Path) -> dict[str, Any]:
    """The optimizer's state in a folder of torch.distributed.checkpoint, as its state_dict was."""
    checkpoint = Checkpoint(path)
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[Any, dict[str, Any]] = {}
    for full, (place, _, pieces) in checkpoint.tensors.items():
        match _steps(place):
            case [*_, "state", parameter, ("exp_avg_sq" | "exp_avg_sq_row" | "exp_avg_sq_col" | "step") as kind]:
                whole = np.empty(checkpoint.shapes[full], np.dtype(f"u{DTYPES[checkpoint.tensors[full][1]].itemsize}"))
                for piece in pieces:
                    spot = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))
                    whole[spot] = checkpoint.rows(full, piece, 0, piece.shape[0] if piece.shape else 1)
                values = bits_to_tensor(whole, checkpoint.tensors[full][1])
                state.setdefault(_number(parameter), {})[kind] = values
    for full, (place, _) in checkpoint.values.items():
        match _steps(place):
            case [*_, "param_groups", number, ("params" | "betas" | "decay_rate" | "param_names") as what]:
                entry = groups.setdefault(_number(number), {} if number.isdecimal() else {"params": [number]})
                entry[what] = checkpoint.value(full)
    if not state:
        raise SourceError(f"{path}: the checkpoint has no optimizer's state with {MOMENT!r}; it was saved without one")
    return {"state": state, "param_groups": [groups[number] for number in sorted(groups)]}


def _steps(place: Sequence[Any]) -> list[str]:
    """The way to an entry; that of the plain state where it is flattened (`state.NAME.exp_avg_sq`: torchtitan)."""
    *way, last = map(str, place)
    first, _, rest = last.partition(".")
    name, _, kind = rest.rpartition(".")
    return [*way, first, name, kind] if first in ("state", "param_groups") and name else [*way, last]


def _number(key: str) -> int | str:
    """A parameter's or group's number, which torch saves as a text; a name stays one."""
    return int(key) if key.isdecimal() else key


def _universal(zero: Path) -> dict[str, _Moment]:
    """The moments of a universal checkpoint: a folder for each parameter, under its name."""
    files = {file.parent.name: file for file in sorted(system.call(list, zero.glob(f"*/{MOMENT}.pt")))}
    if not files:
        return {}
    kept = zero / "optimizer_state.pt"
    noted = load_pickle(kept) if kept.is_file() else {}
    groups = noted.get("param_groups") if isinstance(noted, Mapping) else None
    betas = {g["betas"][1] for g in groups or () if isinstance(g, Mapping) and "betas" in g}
    beta2 = betas.pop() if len(betas) == 1 else None
    found = {}
    for name, file in files.items():
        step = _alone(file.with_name("step.pt")) if file.with_name("step.pt").is_file() else None
        values = _alone(file)
        if not isinstance(values, Tensor):
            raise SourceError(f"{file}: expected one tensor, got a {type(values).__name__}")
        found[name] = _Moment(values, None if step is None else float(step), beta2)
    return found


def _alone(file: Path) -> Any:
    """The value in a file of a universal checkpoint, which may stand under 'param'."""
    value = load_pickle(file)
    return value.get("param") if isinstance(value, Mapping) else value


def _of_safetensors(path: Path) -> dict[str, _Moment]:
    source = SafetensorsSource(path)
    named = {key: key.removesuffix(f".{MOMENT}") for key in source.keys if key.endswith(f".{MOMENT}")}
    return {name: _Moment(source.read(key)) for key, name in (named or {key: key for key in source.keys}).items()}


def _names(
    path: Path, state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], loaded: LoadedModel
) -> Mapping[Any, str]:
    """What the parameters are called that the state numbers."""
    if all(isinstance(number, str) for number in state):
        return {number: number for number in state}
    if groups and all("param_names" in group for group in groups):
        return {n: name for g in groups for n, name in zip(g["params"], g["param_names"], strict=True)}
    for order in _orders(loaded):
        if [len(names) for names in order] != [len(group.get("params", ())) for group in groups]:
            continue
        pairs = [zip(g["params"], names, strict=True) for g, names in zip(groups, order, strict=True)]
        named = {number: name for pair in pairs for number, name in pair}
        shapes = {name: tuple(p.shape) for name, p in loaded.module.named_parameters()}
        found = {number: _values(entry) for number, entry in state.items()}
        if all(n in named and (v is None or tuple(v.shape) == shapes[named[n]]) for n, v in found.items()):
            return named
    raise SourceError(
        f"{path}: its {len(state)} states are numbered, and neither the order of {loaded.label}'s parameters nor "
        f"transformers' groups fit them; save it with names: torch.optim.AdamW(model.named_parameters())"
    )


def _orders(loaded: LoadedModel) -> Iterator[list[list[str]]]:
    """Ways in which trainers hand over the parameters: names by group."""
    names = [name for name, p in loaded.module.named_parameters() if p.requires_grad]
    yield [names]
    if loaded.config is None:
        return
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_parameter_names

    older = {n for n in get_parameter_names(loaded.module, [torch.nn.LayerNorm]) if "bias" not in n}
    for decayed in (set(Trainer.get_decay_parameter_names(None, loaded.module)), older):
        yield [[n for n in names if n in decayed], [n for n in names if n not in decayed]]


def _values(entry: Any) -> Tensor | None:
    """The second moment in one parameter's state; Adafactor keeps means of rows and columns, whose product it is."""
    if not isinstance(entry, Mapping):
        return None
    if isinstance(values := entry.get(MOMENT), Tensor):
        return values
    rows, columns = entry.get(f"{MOMENT}_row"), entry.get(f"{MOMENT}_col")
    if not (isinstance(rows, Tensor) and isinstance(columns, Tensor)):
        return None
    rows, columns = rows.float(), columns.float()
    shares = torch.where(rows > 0, rows / rows.mean(-1, keepdim=True), 0.0)
    return shares[..., None] * columns[..., None, :]


def _plain(found: Mapping[str, _Moment], loaded: LoadedModel) -> dict[str, Tensor]:
    """Moments under the module's names: wrappers (DataParallel, FSDP, torch.compile) put a prefix before them."""
    known = {name for name, _ in loaded.module.named_parameters(remove_duplicate=False)}
    made = {}
    for name, moment in found.items():
        short = unwrapped(name)
        made[short if short in known else name] = moment.unbiased
    return made


def _check(path: Path, name: str, values: Tensor) -> None:
    if values.numel() and not (torch.isfinite(values).all() and values.amin() >= 0):
        raise SourceError(f"{path}: the second moment of {name} is negative, infinite or not a number")
    zeros = float((values == 0).float().mean()) if values.dtype == torch.float16 and values.numel() else 0.0
    if zeros > VANISHED:
        raise SourceError(
            f"{path}: {zeros:.0%} of the float16 second moments of {name} are 0; save them as bfloat16 or float32"
        )
