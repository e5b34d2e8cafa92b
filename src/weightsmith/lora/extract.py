"""A LoRA adapter out of a fine-tuned model: the best low-rank approximation of what each weight has changed by.

Per matrix T = W_tuned - W_base in float32, T = U S V^T; B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, alpha = r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import NumericError, PlanError, RecipeError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.lora import PREFIX, Module
from weightsmith.io.read.open import open_source
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Source
from weightsmith.io.read.updates import Product
from weightsmith.lora.changes import Changes, find_changes
from weightsmith.lora.naming import config_of, stored_name
from weightsmith.lora.write import Description, Writer, Written
from weightsmith.ops.lowrank import Factors, rank_for, signed, split, widened
from weightsmith.ops.spectral import NOISE, top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rank", "extract"]

_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"),
          ("ForTokenClassification", "TOKEN_CLS"), ("ForQuestionAnswering", "QUESTION_ANS"),
          ("ForConditionalGeneration", "SEQ_2_SEQ_LM"))  # fmt: skip
HEAD = "lm_head"
"""The output layer of every causal language model in transformers whose weight may be tied to the embedding's."""
_CONFIG_LIMIT = 10_000_000


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
    embeddings: bool = False,
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
    embeddings  changed embeddings as LoRA too, instead of in full
    skip        leave out changed tensors that are no matrices, or cannot be stored, instead of keeping or refusing them
    include/exclude  globs over tensor names; what they leave out is not in the adapter
    fan_in_fan_out   whether weights are stored [in, out]; default: as the biases' lengths say
    dtype       of the factors; default: as the base stores the weight

    `Written.modules` has per module the rank, the energy kept, and the relative error of what was stored.
    Raises SourceError or PlanError, one line, before anything is written.
    """
    check_rank(rank, energy, max_rank)
    tuned, origin = open_source(model), open_source(base)
    for source in (tuned, origin):
        source.prepare()
    chosen = find_changes(tuned, origin, include, exclude, embeddings)
    if skip:
        chosen = chosen.without_whole()
    chosen.refuse_lost()
    if not (chosen.low or chosen.saved or chosen.biases):
        raise PlanError([f"{tuned} and {origin} differ in nothing that an adapter could hold"])
    notes = list(chosen.notes)
    facts = _facts(origin)
    tied = _tied(facts, origin)
    head = _tied_head(chosen, _facts(tuned) or facts) if tied else None
    flip = _flipped(chosen, origin) if fan_in_fan_out is None else fan_in_fan_out
    cap = rank if rank is not None else max_rank
    with Writer(Path(out), (*tuned.origin.locations, *origin.origin.locations), overwrite=overwrite) as writer:
        widest = _widest(chosen, tuned, origin, cap, energy, epsilon) if uniform else 0
        for done, (module, key) in enumerate(chosen.low.items()):
            embedding = key.role == "embed"
            delta = _delta(tuned, origin, key, turned=embedding or flip)
            factors, kept = _factors(delta, cap, energy, epsilon)
            if not factors.rank:
                notes.append(f"{key.name} changed by nothing above epsilon: left out")
                continue
            kind = dtype or (origin.key(key.name).dtype if DTYPES[key.dtype].itemsize > 1 else "bfloat16")
            writer.add(
                _module(module, delta, embedding=embedding),
                [widened(factors, max(widest, factors.rank))],
                [delta],
                dtype=kind,
                energy=kept,
                how=f"extracted from {tuned} - {origin}",
            )
            if progress:
                progress(done + 1, len(chosen.low))
        for key in (*(k for keys in chosen.saved.values() for k in keys), *chosen.biases):
            writer.add_whole(_peft_name(key, chosen), tuned.read(key.name), key.dtype, f"copied from {tuned}")
        saved = [*chosen.saved]
        if head is not None:
            saved.append(HEAD)
            writer.add_whole(f"{PREFIX}{HEAD}.weight", tuned.read(head.name), head.dtype, f"tied to {head.name}")
        place = _place(base, origin)
        like = {
            "base_model_name_or_path": place,
            "bias": "all" if chosen.biases else "none",
            "fan_in_fan_out": flip,
            "task_type": _task(facts),
            **({"ensure_weight_tying": True} if tied and any(k.role == "embed" for k in chosen.low.values()) else {}),
        }
        made_of = {
            "model": str(tuned), "base": str(origin), "rank": rank, "energy": energy, "max_rank": max_rank,
            "epsilon": epsilon, "uniform": uniform, "embeddings": embeddings, "skip": skip,
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
        return writer.finish(config_of(writer.ranks, like, saved=saved), about, saved=tuple(saved), warnings=notes)


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


def _flipped(chosen: Changes, origin: Source) -> bool:
    """Whether weights are stored [in, out]: a bias is as long as there are outputs."""
    votes = 0
    for module, key in chosen.low.items():
        bias = origin.keys.get(f"{module}.bias")
        if bias is not None and key.shape[0] != key.shape[1] and key.role != "embed":
            votes += 1 if bias.shape == key.shape[1:] else -1
    return votes > 0


def _delta(tuned: Source, origin: Source, key: Key, *, turned: bool) -> Tensor:
    """What a matrix changed by, [outputs, inputs] in float32."""
    delta = tuned.read(key.name).float() - origin.read(key.name).float()
    if not bool(torch.isfinite(delta).all()):
        raise NumericError(f"{key.name} holds NaN or Inf in {tuned} or {origin}")
    return delta.T.contiguous() if turned else delta


def _factors(delta: Tensor, cap: int, energy: float | None, epsilon: float) -> tuple[Factors, float]:
    """The factors of a matrix, and the share of its squared singular values that they keep."""
    square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    found = signed(top_svd(delta, min(cap, *delta.shape), NOISE))
    rank = rank_for(found.s, square, rank=cap, energy=energy, floor=epsilon)
    kept = min(float(found.s[:rank].square().sum()) / square, 1.0) if square else 1.0
    return split(found, rank, even=True), kept


def _module(name: str, delta: Tensor, *, embedding: bool) -> Module:
    """A module as an adapter describes it, whose change has the shape of `delta` [outputs, inputs]."""
    outputs, inputs = delta.shape
    a, b = (stored_name(name, part, embedding) for part in "AB")
    return Module(name, Product(a, b, (0, inputs), (outputs, 0)), 1.0)


def _widest(chosen: Changes, tuned: Source, origin: Source, cap: int, energy: float | None, epsilon: float) -> int:
    """The largest rank of all modules: an extra pass where it is not clear before."""
    if energy is None and epsilon == 0:
        full = [key for key in chosen.low.values() if min(key.shape) >= cap]
        if full:
            return cap
    ranks = (
        _factors(_delta(tuned, origin, key, turned=False), cap, energy, epsilon)[0].rank for key in chosen.low.values()
    )
    return max(ranks, default=0)


# --- the adapter's configuration ---------------------------------------------------------------------


def _peft_name(key: Key, chosen: Changes) -> str:
    """A bias of an adapted module lies beneath peft's wrapper."""
    module, _, leaf = key.name.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{leaf}" if leaf == "bias" and module in chosen.low else key.name)


def _facts(origin: Source) -> Mapping[str, Any]:
    path = None if origin.origin.folder is None else origin.origin.folder / "config.json"
    facts = read_json(path, _CONFIG_LIMIT) if path is not None and path.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def _task(facts: Mapping[str, Any]) -> str | None:
    names = [name for name in facts.get("architectures") or () if isinstance(name, str)]
    return next((task for name in names[:1] for ending, task in _TASKS if name.endswith(ending)), None)


def _tied(facts: Mapping[str, Any], origin: Source) -> bool:
    """Whether input and output embeddings are one tensor."""
    return bool(facts.get("tie_word_embeddings")) or any("head" in alias for alias in origin.aliases)


def _tied_head(chosen: Changes, facts: Mapping[str, Any]) -> Key | None:
    """The embedding, kept in full, that the output layer shares: peft unties what it wraps, so that one is kept too."""
    embeds = [key for keys in chosen.saved.values() for key in keys if key.role == "embed" and len(key.shape) == 2]
    if not embeds or HEAD in chosen.saved:
        return None
    task = _task(facts)
    tokens = [key for key in embeds if key.shape[0] == facts.get("vocab_size")]  # positions are embedded too
    shared = max(tokens or embeds, key=lambda key: key.shape[0])
    if task == "SEQ_2_SEQ_LM":
        raise PlanError([
            f"{shared.name} changed and is shared by several layers, which an adapter would untie; leave it out with "
            f"--exclude {shared.name}"
        ])  # fmt: skip
    return shared if task == "CAUSAL_LM" else None


def _place(base: str | Path | Source, origin: Source) -> str | None:
    if isinstance(base, Source):
        return str(origin.origin.folder) if origin.origin.folder is not None else None
    path = Path(base).expanduser()
    return str(path.absolute()) if path.exists() else str(base)
