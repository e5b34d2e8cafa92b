"""From a recipe, a loaded model and examples to a folder: a fine-tuned model, or an adapter of singular values.

Models and examples are given (`weightsmith.observe` reads them); this file knows what each kind of model is scored by.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import NumericError, PlanError, SourceError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.disk import write_file
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.read.source import tensor_to_bits
from weightsmith.io.url import output_of
from weightsmith.io.write.output import check_output
from weightsmith.recipe.grammar import Grammar
from weightsmith.report.figures import Curve, Curves
from weightsmith.report.html import Section, Text, page
from weightsmith.report.table import Column, Table
from weightsmith.train import svfit
from weightsmith.train.checkpoints import Checkpoints
from weightsmith.train.linear import linearized, save_linear
from weightsmith.train.loop import Loss, Pace, Row, fit
from weightsmith.train.multitask.mtadamw import MTAdamW
from weightsmith.train.optim import DCTAdamW, Trion
from weightsmith.train.recipe import Linear, Optimizer, Svfit, TrainRecipe
from weightsmith.train.save import save_folder

__all__ = ["CURVE", "Trained", "curve_sections", "identify", "kept_bytes", "optimizer_of", "padded", "save_model",
           "train", "train_all"]  # fmt: skip

CURVE = "training.html"


@dataclass(frozen=True)
class Trained:
    """A finished run.

    trained     numbers that trained; kept: bytes of the optimizer's state
    projected   matrices whose moments the optimizer keeps in a subspace
    """

    out: Path
    seconds: float
    rows: Sequence[Row]
    examples: int
    valid: int
    trained: int
    kept: int
    projected: int


def train(
    recipe: TrainRecipe,
    loaded: Any,
    examples: Sequence[Any],
    out: str | Path,
    settings: Settings = DEFAULT,
) -> Trained:
    """Train and write OUT; beside it OUT.training has the last checkpoint while the run goes on.

    loaded    what `observe.model.load_model` gives; examples: what `observe.data.read_examples` gives
    settings  of them count: resume (go on from the last checkpoint, of the same recipe, model and examples), overwrite,
              files, and progress, which is called with steps

    Errors: PlanError with everything that is in the way before anything trains, NumericError (see `loop.fit`).
    """
    began, out = time.perf_counter(), Path(out)
    if output_of(out) is not None:
        raise PlanError([f"{out}: training writes to a folder of this machine; upload it afterwards"])
    if problems := check_output(out, (*settings.files, *filter(None, [loaded.folder])), settings.overwrite, False, 0):
        raise PlanError(problems)
    asked = json.loads(recipe.model_dump_json(exclude_none=True))
    identity = identify(asked, loaded, examples)
    checkpoints = Checkpoints(out, identity, resume=settings.resume, overwrite=settings.overwrite)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held = int(recipe.valid * len(examples))
    valid, used = sorted(order[:held]), sorted(order[held:])
    _, what = recipe.tune.chosen
    if isinstance(what, Linear):
        loaded = linearized(loaded, what.modules, what.rank, recipe.seed, examples[used[0]].inputs)
    loss = _loss_of(loaded, examples)
    tuned = _prepared(what, loaded)
    optimizer, projected = optimizer_of(recipe.optimizer, loaded.module)
    pace = Pace(**{name: getattr(recipe, name) for name in Pace.__dataclass_fields__})
    options: dict[str, Any] = {"store": checkpoints, "bf16": recipe.bf16, "progress": settings.progress}
    rows = fit(loaded.module, optimizer, loss, used, pace, valid=valid, **options)
    curve = _curve(rows, recipe)
    if isinstance(what, Linear):
        save_linear(loaded, out, asked, {CURVE: curve}, overwrite=settings.overwrite)
    elif tuned is not None:
        assert isinstance(what, Svfit)
        tuned.save(out, bases=what.bases, overwrite=settings.overwrite, texts={CURVE: curve})
    else:
        save_model(loaded, out, asked, {CURVE: curve}, overwrite=settings.overwrite)
    checkpoints.clear()
    return Trained(
        out=out,
        seconds=time.perf_counter() - began,
        rows=rows,
        examples=len(used),
        valid=len(valid),
        trained=sum(p.numel() for p in loaded.module.parameters() if p.requires_grad),
        kept=kept_bytes(optimizer),
        projected=projected,
    )


def identify(asked: Mapping[str, Any], loaded: Any, examples: Sequence[Any]) -> dict[str, Any]:
    """What decides the run, bit for bit."""
    data = xxhash.xxh3_128()
    for example in examples:
        data.update(f"{tuple(example.inputs.shape)} {example.inputs.dtype} {example.label}".encode())
        data.update(tensor_to_bits(example.inputs).tobytes())
    weights = xxhash.xxh3_128()
    for name, p in loaded.module.named_parameters():
        weights.update(name.encode())
        weights.update(tensor_to_bits(p.detach().cpu()).tobytes())
    return {"recipe": asked, "examples": data.hexdigest(), "model": weights.hexdigest()}


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    return sum(v.nbytes for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor))


def optimizer_of(asked: Optimizer, module: nn.Module, **more: Any) -> tuple[torch.optim.Optimizer, int]:
    """The optimizer of what trains, and how many matrices it projects; `more` goes to its constructor.

    Matrices with a smaller side below `rank` get plain AdamW; vectors get no weight decay.
    """
    name, given = asked.chosen
    options = given.model_dump() | more
    decay, rank = options.pop("weight_decay"), options.pop("rank", None)
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for label, p in module.named_parameters():
        if p.requires_grad:
            fits = p.ndim > 1 and rank is not None and min(p.shape[0], p[0].numel()) >= rank
            groups.setdefault((p.ndim > 1, fits), []).append((label, p))
    made: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay if matrices else 0.0}
        | ({"rank": rank if fits else None} if name in _PROJECTING else {})
        for (matrices, fits), params in groups.items()
    ]
    if name not in _PROJECTING:
        return {"adamw": torch.optim.AdamW, "mt_adamw": MTAdamW}[name](made, **options), 0
    optimizer = _PROJECTING[name](made, rank=rank, **options)
    sides = (max(p.shape[0], p[0].numel()) for _, p in groups.get((True, True), ()))
    return optimizer, sum(side < optimizer.defaults["max_size"] for side in sides)


_PROJECTING: Mapping[str, type[DCTAdamW] | type[Trion]] = {"dct_adamw": DCTAdamW, "trion": Trion}


def _prepared(what: Grammar, loaded: Any) -> svfit.SVFit | None:
    """Freeze what does not train; None where it is frozen, or everything trains."""
    if not isinstance(what, Svfit):
        if not isinstance(what, Linear):
            train_all(loaded)
        return None
    options = what.model_dump(exclude={"bases", "target_modules"})
    return svfit.wrap(loaded.module, target_modules=what.target_modules or svfit.TARGETS, **options)


def train_all(loaded: Any) -> None:
    """Let every parameter train; PlanError where one could not be saved."""
    loaded.module.requires_grad_(True)
    _, lost = loaded.names.convert({name: p.detach() for name, p in loaded.module.named_parameters()})
    if lost:
        raise PlanError([f"{loaded.label}: {', '.join(lost[:3])} would train, but its files have no such tensor"])


# --- losses ----------------------------------------------------------------------------------------


def _loss_of(loaded: Any, examples: Sequence[Any]) -> Loss:
    """How models of a kind are scored."""
    if loaded.kind == "causal-lm":
        return lambda numbers: _next_tokens(loaded, [examples[i].inputs for i in numbers])
    if loaded.kind in ("image-classification", "sequence-classification"):
        classes = getattr(loaded.config, "num_labels", None) or 1 << 31
        for i, label in enumerate(example.label for example in examples):
            if label is None:
                raise SourceError(f"example {i} has no label, which {loaded.kind} needs to train")
            if not 0 <= label < classes:
                raise SourceError(f"example {i}: label {label} is none of the {classes} classes of {loaded.label}")
        return lambda numbers: _classes(loaded, [examples[i] for i in numbers])
    raise PlanError([f"{loaded.label} is for {loaded.kind}; training knows causal-lm and classification"])


def _next_tokens(loaded: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The summed cross-entropy of each next token [tokens], and their number."""
    tokens, mask = padded(inputs)
    labels = torch.where(mask, tokens, -100)[:, 1:].to(loaded.device)
    logits = loaded.logits(tokens, None if bool(mask.all()) else mask)
    value = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)
    return value, int((labels >= 0).sum())


def _classes(loaded: Any, chosen: Sequence[Any]) -> tuple[Tensor, int]:
    """The summed cross-entropy of labels, and their number."""
    inputs = [example.inputs for example in chosen]
    text = inputs[0].ndim == 1 and inputs[0].dtype == torch.int64
    stacked, mask = padded(inputs) if text else (torch.stack(inputs), None)
    logits = loaded.logits(stacked, mask)
    labels = torch.tensor([example.label for example in chosen], device=loaded.device)
    return cross_entropy(logits.float(), labels, reduction="sum"), len(chosen)


def padded(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [batch, longest], padded on the right with 0, and where there are some."""
    mask = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in inputs], True)
    return pad_sequence(list(inputs), True), mask


# --- results ---------------------------------------------------------------------------------------


def save_model(
    loaded: Any,
    out: Path,
    asked: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    blobs: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """The base's files with the trained values, each tensor in the dtype that it is stored in there.

    texts, blobs  more files, name -> content
    """

    def more(folder: Path) -> None:
        contents: dict[str, str | bytes] = {**texts, **(blobs or {})}
        for name, content in contents.items():
            write_file(folder / name, content)

    if (base := loaded.names.source) is None:  # a module from Python, without files
        state = loaded.module.state_dict()
        save_folder(out, state, made=asked, how="trained", kind="training", overwrite=overwrite, package=more)
        return
    found, _ = loaded.names.convert({name: p.detach().cpu() for name, p in loaded.module.named_parameters()})
    tensors = {}
    for name, key in base.keys.items():
        tensors[name] = found[name].to(getattr(torch, key.dtype)) if name in found else base.read(name)
        if name in found and not bool(torch.isfinite(tensors[name]).all()):
            raise NumericError(f"{name}: trained values do not fit into {key.dtype}, in which the base stores it")

    def package(folder: Path) -> None:
        copy_companions(loaded.folder, folder, base.origin.files)
        more(folder)

    save_folder(out, tensors, made=asked, how="trained", kind="training", overwrite=overwrite, package=package)


def _curve(rows: Sequence[Row], recipe: TrainRecipe) -> str:
    """The run as a page."""
    asked = Text("What was asked for", [recipe.model_dump_json(exclude_none=True)])
    return page("Training", [*curve_sections(rows), asked])


def curve_sections(rows: Sequence[Row]) -> list[Section]:
    """The losses, drawn and as a table."""
    columns = (
        Column("step", "Step", 0),
        Column("loss", "Training", 4, meaning="Mean loss since the row before."),
        Column("valid", "Validation", 4, meaning="Loss of the examples that were kept out."),
        Column("gradient", "Gradient", 4, meaning="Mean norm of the gradient, before it was clipped."),
        Column("rate", "Rate", 4, meaning="Share of the learning rate."),
    )
    seen = {name: [row for row in rows if getattr(row, name) is not None] for name in ("loss", "valid")}
    lines = [
        Curve(title, [row.step for row in seen[name]], [getattr(row, name) for row in seen[name]])
        for name, title in (("loss", "training"), ("valid", "validation"))
        if seen[name]
    ]
    return [Curves("Loss", lines, "step", "loss"), Table("Losses", columns, [asdict(row) for row in rows])]
