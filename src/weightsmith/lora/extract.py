"""A LoRA adapter out of a fine-tuned model: the best low-rank approximation of what each weight has changed by.

Per matrix T = W_tuned - W_base in float32, T = U S V^T; B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, alpha = r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import NumericError, PlanError, RecipeError
from weightsmith.core.keys import DTYPES
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Code, told
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.lora import PREFIX
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.open import open_source
from weightsmith.io.read.prefixes import named_like
from weightsmith.io.read.source import Source
from weightsmith.lora.changes import find_changes
from weightsmith.lora.naming import config_of
from weightsmith.lora.targets import Target, Targets
from weightsmith.lora.tried import tried
from weightsmith.lora.write import Description, Writer, Written
from weightsmith.ops.lowrank import Factors, rank_for, signed, split, widened
from weightsmith.ops.spectral import NOISE, top_svd
from weightsmith.report.units import size

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rank", "extract"]


def extract(
    model: str | Path | Source,
    base: str | Path | Source,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 128,
    epsilon: float = 0.0,
    uniform: bool = False,
    whole_embeddings: bool = False,
    skip: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fan_in_fan_out: bool | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the LoRA that turns `base` into (almost) `model` into the PEFT folder `out`.

    rank        at most this rank for every matrix; default: max_rank
    energy      per matrix the smallest rank whose squared singular values make up this share, up to max_rank
    epsilon     singular values up to this are left out
    uniform     one rank for all modules (missing columns are zero), for programs that read no rank_pattern
    whole_embeddings  changed embeddings in full, instead of as LoRA; those of positions and types are so anyway where
                a model looks them up in a way of its own, or transformers and peft are not there to tell
    skip        leave out changed tensors that are no matrices, or cannot be stored, instead of keeping or refusing them
    include/exclude  globs over tensor names; what they leave out is not in the adapter
    fan_in_fan_out   whether weights are stored [in, out]; default: by the class of each layer
    dtype       of the factors; default: as the base stores the weight

    `Written.modules` has per module the rank, the energy kept, and the relative error of what was stored.
    Raises SourceError or PlanError, one line, before anything is written.
    """
    check_rank(rank, energy, max_rank)
    tuned, origin = packed_like_memory(open_source(model)), packed_like_memory(open_source(base))
    origin = named_like(origin, tuned)
    for source in (tuned, origin):
        source.prepare()
    shell = Modules(tuned).shell if find_spec("peft") is not None else None
    plain = (lambda name: False) if shell is None else shell.looks_up_plainly
    chosen = find_changes(tuned, origin, include, exclude, whole_embeddings, plain)
    if skip:
        chosen = chosen.without_whole()
    chosen.refuse_lost()
    if not (chosen.low or chosen.saved or chosen.biases):
        raise PlanError([f"{tuned} and {origin} differ in nothing that an adapter could hold"])
    notes = [*origin.origin.remarks, *chosen.notes]
    targets = Targets(chosen, tuned, origin, fan_in_fan_out)
    cap = rank if rank is not None else max_rank
    with Writer(Path(out), (*tuned.origin.locations, *origin.origin.locations), overwrite=overwrite) as writer:
        widest = _widest(targets.low, tuned, origin, cap, energy, epsilon) if uniform else 0
        for done, target in enumerate(targets.low):
            found = [_factors(delta, cap, energy, epsilon) for delta in _deltas(tuned, origin, target)]
            most = max(factors.rank for factors, _, _ in found)
            if not most and len(found) == 1:
                notes.append(f"{target.key.name} changed by nothing above epsilon: left out")
                continue
            square = sum(total for _, _, total in found)
            key = target.key
            pieces = [widened(factors, max(widest, most, 1)) for factors, _, _ in found]
            ends = [(target, pieces)]
            if target.twin is not None:
                turned = [Factors(part.a.T, part.b.T) for part in pieces]
                ends.append((Target(key, target.twin, not target.flip), turned))
            for end, own in ends:
                writer.add(
                    end.module,
                    own,
                    _deltas(tuned, origin, end),
                    dtype=dtype or (origin.key(key.name).dtype if DTYPES[key.dtype].itemsize > 1 else "bfloat16"),
                    energy=sum(kept for _, kept, _ in found) / square if square else 1.0,
                    how=f"extracted from {tuned} - {origin}",
                )
            if progress:
                progress(done + 1, len(targets.low))
        for stored, key in targets.whole.items():
            writer.add_whole(f"{PREFIX}{stored}", tuned.read(key.name), key.dtype, f"copied from {tuned}")
        place = _place(base, origin)
        like = {
            "base_model_name_or_path": place,
            "bias": "all" if any(".base_layer." in name for name in targets.whole) else "none",
            "fan_in_fan_out": any(target.turned for target in targets.low),
            "task_type": targets.task,
        }
        made_of = {
            "model": str(tuned), "base": str(origin), "rank": rank, "energy": energy, "max_rank": max_rank,
            "epsilon": epsilon, "uniform": uniform, "whole_embeddings": whole_embeddings, "skip": skip,
            "include": list(include), "exclude": list(exclude), "dtype": dtype,
        }  # fmt: skip
        about = Description(
            made={k: v for k, v in made_of.items() if v not in (None, False, [], 0.0)},
            inputs={"base": origin.fingerprint(), "model": tuned.fingerprint()},
            folders={"base": origin.origin.folder, "model": tuned.origin.folder},
            how="Low-rank approximation of what fine-tuning changed, by singular values, module by module.",
            command="weightsmith lora extract MODEL --base BASE OUT",
            base=place,
        )
        modules = {target.module.name: target.module for target in targets.low}
        config = config_of(writer.ranks, like, modules=modules, parameters=targets.parameters, saved=targets.saved)
        result = writer.finish(config, about, saved=targets.saved, warnings=notes)
    said, failed = tried(result, targets)
    full = sum(key.nbytes for key in tuned.keys.values())
    if result.nbytes >= full:
        failed.append(
            f"the adapter takes {size(result.nbytes)}, the model itself {size(full)}: choose a lower rank "
            "(--rank 16), or a share of each change (--energy 0.9)"
        )
    return replace(result, tried=said, warnings=(*result.warnings, *told(Code.ADAPTER, failed)))


def check_rank(rank: int | None, energy: float | None, max_rank: int) -> None:
    """Raise RecipeError unless the wanted ranks make sense."""
    if rank is not None and energy is not None:
        raise RecipeError("give a rank or an energy, not both; max_rank bounds what an energy asks for")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} = {value} is outside [1, inf)")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(
            f"energy = {energy:g} is outside (0, 1]" + f"; write {energy:g}% as {energy / 100:g}" * (1 < energy <= 100)
        )


# --- factors ---------------------------------------------------------------------------------------


def _deltas(tuned: Source, origin: Source, target: Target) -> Iterator[Tensor]:
    """What a matrix changed by, [outputs, inputs] in float32; fused experts one by one."""
    name = target.key.name
    ranges = [(0, None)] if len(target.key.shape) == 2 else [(e, e + 1) for e in range(target.key.shape[0])]
    for low, high in ranges:
        delta = tuned.read(name, low, high).float() - origin.read(name, low, high).float()
        if not bool(torch.isfinite(delta).all()):
            raise NumericError(f"{name} holds NaN or Inf in {tuned} or {origin}")
        delta = delta if high is None else delta[0]
        yield delta.T.contiguous() if target.flip else delta


def _factors(delta: Tensor, cap: int, energy: float | None, epsilon: float) -> tuple[Factors, float, float]:
    """The factors of a matrix, the squared singular values that they keep, and the sum of all."""
    square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    found = signed(top_svd(delta, min(cap, *delta.shape), NOISE))
    rank = rank_for(found.s, square, rank=cap, energy=energy, floor=epsilon)
    return split(found, rank, even=True), min(float(found.s[:rank].square().sum()), square), square


def _widest(
    low: Sequence[Target], tuned: Source, origin: Source, cap: int, energy: float | None, epsilon: float
) -> int:
    """The largest rank of all modules: an extra pass where it is not clear before."""
    if energy is None and epsilon == 0 and any(min(target.key.shape[-2:]) >= cap for target in low):
        return cap
    deltas = (delta for target in low for delta in _deltas(tuned, origin, target))
    return max((_factors(delta, cap, energy, epsilon)[0].rank for delta in deltas), default=0)


def _place(base: str | Path | Source, origin: Source) -> str | None:
    if isinstance(base, Source):
        return str(origin.origin.folder) if origin.origin.folder is not None else None
    path = Path(base).expanduser()
    return str(path.absolute()) if path.exists() else str(base)
