"""An adapter at a lower rank: the best approximation of every module's B A, from its QR core."""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import RecipeError
from weightsmith.io.read.lora import Adapter, config_of
from weightsmith.lora.extract import check_rank
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

    The scale goes into the factors (alpha = r).  Tensors kept in full are copied.  Raises SourceError or PlanError.
    """
    if rank is None and energy is None:
        raise RecipeError("give a rank or an energy")
    check_rank(rank, energy, 1)
    found = Adapter(adapter)
    with Writer(Path(out), [found.path], overwrite=overwrite) as writer:
        for name, module in found.modules.items():
            b, a = found.factors(name)
            wanted = Factors(b * module.scale, a)
            cut = svd_of_factors(wanted)
            square = float(cut.s.square().sum())
            count = rank_for(cut.s, square, rank=rank, energy=energy)
            kept = min(float(cut.s[:count].square().sum()) / square, 1.0) if square else 1.0
            writer.add(
                name,
                widened(split(cut, count, even=True), max(count, 1)),
                wanted,
                dtype=dtype or found.file.key(module.a).dtype,
                energy=kept,
                how="resized",
                embedding=module.embedding,
                shapes=(module.b_shape[2:], module.a_shape[1:]),
            )
        for target, stored in found.whole.items():
            value = found.tensor(target)
            writer.add_whole(stored, value, str(value.dtype).removeprefix("torch."), "copied")
        config = config_of(
            writer.ranks,
            found.config,
            targets=found.config.get("target_modules"),
            saved=found.config.get("modules_to_save") or (),
        )
        about = Description(
            made={"adapter": str(adapter), "rank": rank, "energy": energy},
            inputs={"adapter": found.fingerprint()},
            folders={"adapter": found.path},
            how="The best approximation of the adapter at a lower rank.",
            command="weightsmith lora resize ADAPTER OUT",
            base=config["base_model_name_or_path"],
        )
        return writer.finish(config, about, saved=tuple(found.whole))
