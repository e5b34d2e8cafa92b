"""An adapter at a lower rank: the best approximation of every module's B A, from its QR core."""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import RecipeError
from weightsmith.io.read.lora import Module
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.lora.compare import combinable
from weightsmith.lora.extract import check_rank
from weightsmith.lora.kernels import described
from weightsmith.lora.naming import config_of
from weightsmith.lora.write import Description, Writer, Written
from weightsmith.ops.lowrank import Factors, rank_for, split, svd_of_factors, widened

__all__ = ["resize"]


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the adapter at no more than `rank`, or per module at the smallest rank that keeps the share `energy`.

    The rank of a convolution in groups is that of all groups together, as peft counts it, and that of fused experts is
    one expert's.  A convolution keeps one direction per group at least, and a warning says so.

    The scale goes into the factors (alpha = r).  Tensors kept in full are copied.  Raises SourceError or PlanError.
    """
    if rank is None and energy is None:
        raise RecipeError("give a rank or an energy")
    check_rank(rank, energy, 1)
    found = combinable(read_adapter(adapter))
    notes: list[str] = []
    modules = described({"adapter": found}, [*found.modules], found.config.get("base_model_name_or_path"))
    with Writer(Path(out), [found.path], overwrite=overwrite, kind=found.kind) as writer:
        for name, module in modules.items():
            wanted = [Factors(b * module.scale, a) for b, a in found.factors(name)]
            cut = [svd_of_factors(part) for part in wanted]
            squares = [float(part.s.square().sum()) for part in cut]
            most, more = _rank_of_one(module, rank)
            notes += more
            counts = [rank_for(p.s, square, rank=most, energy=energy) for p, square in zip(cut, squares, strict=True)]
            kept = sum(float(p.s[:n].square().sum()) for p, n in zip(cut, counts, strict=True))
            writer.add(
                module,
                [widened(split(p, n, even=True), max(*counts, 1)) for p, n in zip(cut, counts, strict=True)],
                wanted,
                dtype=dtype or found.file.key(module.update.stored[0]).dtype,
                energy=min(kept / sum(squares), 1.0) if sum(squares) else 1.0,
                how="resized",
            )
        for rows in found.rows.values():
            value = found.file.read(rows.stored)
            writer.add_whole(rows.stored, value, str(value.dtype).removeprefix("torch."), "copied")
        for target, stored in found.whole.items():
            value = found.tensor(target)
            writer.add_whole(stored, value, str(value.dtype).removeprefix("torch."), "copied")
        config = config_of(
            writer.ranks,
            found.config,
            modules=found.modules,
            targets=found.config.get("target_modules"),
            saved=found.config.get("modules_to_save") or (),
        )
        if indices := found.config.get("trainable_token_indices"):
            config["trainable_token_indices"] = indices
        about = Description(
            made={"adapter": str(adapter), "rank": rank, "energy": energy},
            inputs={"adapter": found.fingerprint()},
            folders={"adapter": found.path},
            how="The best approximation of the adapter at a lower rank.",
            command="weightsmith lora resize ADAPTER OUT",
            base=config["base_model_name_or_path"],
        )
        return writer.finish(config, about, saved=tuple(found.whole), warnings=notes)


def _rank_of_one(module: Module, rank: int | None) -> tuple[int | None, list[str]]:
    """The rank of each group of a convolution, and what to say of it; of all other modules the rank itself."""
    groups = module.groups
    if rank is None or groups == 1:
        return rank, []
    if rank < groups:
        return 1, [f"{module.name} is a convolution in {groups} groups: of rank {groups}, one direction for each"]
    return rank // groups, []
