"""From a recipe to a model that has learned from several: read, cache, train by the shared loop, write."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, WeightsmithError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.url import absolute, output_of
from weightsmith.io.write.output import check_output
from weightsmith.observe.data import Example, read_texts
from weightsmith.observe.model import LoadedModel, identity, load_model, unweighted
from weightsmith.report.figures import Curve, Curves
from weightsmith.report.html import Text, page
from weightsmith.report.table import Column, Table
from weightsmith.train.checkpoints import Checkpoints
from weightsmith.train.fuse.cache import Cached, cached_bytes, kept, make
from weightsmith.train.fuse.gate import Gate, balance, best, by_loss, uniform
from weightsmith.train.fuse.loss import IGNORED, Fusion
from weightsmith.train.fuse.recipe import FuseRecipe
from weightsmith.train.fuse.recipe import Trained as TrainedGate
from weightsmith.train.fuse.texts import Tokenizer, Tokens
from weightsmith.train.loop import Loss, Pace, Row, fit
from weightsmith.train.run import (
    CURVE,
    curve_sections,
    identify,
    kept_bytes,
    optimizer_of,
    padded,
    save_model,
    train_all,
)

__all__ = ["GATE", "Candidate", "Fused", "train_fused"]

GATE = "gate.safetensors"
"""The trained gate, beside the model that does not need it: for diagnosis."""

_RULES = {"average": uniform, "min_ce": best, "avg_ce": by_loss}
_BALANCED = 8  # sequences over which a balance says something


@dataclass(frozen=True)
class Candidate:
    """A model that was learned from.

    loss     its mean loss in nats per byte of text
    matched  share of the target's positions where it speaks itself; elsewhere the target's own distribution stands in
    weight   mean over the training texts at the end; chosen: share of the texts that it has any weight for
    """

    name: str
    loss: float
    matched: float
    weight: float
    chosen: float


@dataclass(frozen=True)
class Fused:
    """A finished run.

    candidates  the target as it was before, then the sources
    left_out    texts of fewer than two tokens
    trained     numbers that trained, those of the gate among them; kept: bytes of the optimizer's state
    """

    out: Path
    seconds: float
    rows: Sequence[Row]
    candidates: Sequence[Candidate]
    examples: int
    valid: int
    left_out: int
    trained: int
    kept: int
    notes: Sequence[str]


@dataclass
class _Ledger:
    """Losses since the last row of the curve."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, count: int, **values: float) -> None:
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def taken(self) -> dict[str, float]:
        found = {name: value / max(self.count, 1) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return found


def train_fused(
    recipe: FuseRecipe, out: str | Path, settings: Settings = DEFAULT, *, device: str | torch.device = "auto"
) -> Fused:
    """Train and write OUT; beside it OUT.training has the last checkpoint, and the cache, while the run goes on.

    settings  of them count: resume, overwrite, files, and progress, which is called with forward passes

    Errors: PlanError, SourceError or OutputError before anything trains, NumericError (see `loop.fit`).
    """
    began, out = time.perf_counter(), Path(out)
    if output_of(out) is not None:
        raise PlanError([f"{out}: training writes to a folder of this machine; upload it afterwards"])
    described, tokenizers = _described(recipe)
    texts, left_out = _texts(recipe, tokenizers[0])
    places = [*settings.files, Path(recipe.data), *filter(None, (model.folder for model in described))]
    places += [] if recipe.cache is None else [Path(recipe.cache).expanduser()]
    need = len(tokenizers) * cached_bytes([len(text.ids) for text in texts], recipe.k)
    if problems := check_output(out, places, settings.overwrite, False, need):
        raise PlanError(problems)
    target = load_model(recipe.target, device=device)
    asked = json.loads(recipe.model_dump_json(exclude_none=True))
    run = identify(asked, target, [Example(text.ids) for text in texts])
    run["sources"] = [identity(model) for model in described[1:]]
    checkpoints = Checkpoints(out, run, resume=settings.resume, overwrite=settings.overwrite)
    progress = _Progress(settings, recipe, len(texts), len(described))
    cache = checkpoints.folder / "candidates" if recipe.cache is None else absolute(Path(recipe.cache).expanduser())
    found = _cached(recipe, cache, described, tokenizers, texts, target, run, progress)
    mute = [tokenizer.label for tokenizer, one in zip(tokenizers, found, strict=True) if not one.matched]
    if mute:
        raise PlanError([f"{label}: none of its tokens covers the same text as one of the target's" for label in mute])
    train_all(target)
    held = _Held(recipe, target, texts, found)
    rows, optimizer, valid = held.fit(checkpoints, progress)
    names = _names(recipe)
    weights = held.weights(held.used)
    candidates = [
        Candidate(name, float(one.losses.nanmean()), one.matched, float(w.mean()), float((w > 0).float().mean()))
        for name, one, w in zip(names, found, weights.T, strict=True)
    ]
    blobs = {GATE: _gate_bytes(held.fusion.gate)} if isinstance(held.fusion.gate, Gate) else {}
    curve = _page(recipe, rows, candidates)
    save_model(target, out, asked, {CURVE: curve}, blobs=blobs, overwrite=settings.overwrite)
    checkpoints.clear()
    return Fused(
        out=out, seconds=time.perf_counter() - began, rows=rows, candidates=candidates, examples=len(held.used),
        valid=valid, left_out=left_out, kept=kept_bytes(optimizer), notes=_notes(recipe),
        trained=sum(p.numel() for p in held.system.parameters() if p.requires_grad),
    )  # fmt: skip


# --- what is read ----------------------------------------------------------------------------------


def _described(recipe: FuseRecipe) -> tuple[list[LoadedModel], list[Tokenizer]]:
    """Target and sources without weights, and their tokenizers; PlanError with all that is wrong with them."""
    models, tokenizers, problems = [], [], []
    for model in (recipe.target, *recipe.sources):
        try:
            models.append(unweighted(model))
            tokenizers.append(Tokenizer.of(models[-1], recipe.length))
            if recipe.k > tokenizers[-1].rows:
                problems.append(f"{model}: k is {recipe.k}, its vocabulary {tokenizers[-1].rows}; lower k")
            if len(tokenizers) > 1:
                tokenizers[-1].to(tokenizers[0])
        except WeightsmithError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(problems)
    return models, tokenizers


def _texts(recipe: FuseRecipe, target: Tokenizer) -> tuple[list[Tokens], int]:
    """The texts in the target's tokens, and how many were too short; lines are cut, files are cut into pieces."""
    pieces = [target.cut(text, recipe.length) for text in read_texts(recipe.data, recipe.field)]
    flat = [piece for own in pieces for piece in (own[:1] if Path(recipe.data).suffix == ".jsonl" else own)]
    draw = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(flat), generator=draw)[: recipe.examples].sort().values.tolist()
    read = [target.read(flat[i], recipe.length) for i in chosen]
    texts = [text for text in read if text.scored]
    if not texts:
        raise PlanError([f"{recipe.data}: no text has two tokens of {target.label}, so nothing can be predicted"])
    return texts, len(read) - len(texts)


def _names(recipe: FuseRecipe) -> list[str]:
    """What candidates are called: ends of their paths, numbered where two are the same."""
    ends = [Path(model).name for model in (recipe.target, *recipe.sources)]
    return [end if ends.count(end) == 1 else f"{end} ({i})" for i, end in enumerate(ends)]


class _Progress:
    """Forward passes of all candidates and of the training, as one count."""

    def __init__(self, settings: Settings, recipe: FuseRecipe, texts: int, candidates: int) -> None:
        self.tell, self.done = settings.progress, 0
        self.passes = -(-texts // recipe.batch)
        self.each = recipe.accumulation
        self.cached = candidates * self.passes
        self.total = self.cached + recipe.steps * self.each

    def forward(self, count: int = 1) -> None:
        self.done += count
        if self.tell is not None:
            self.tell(self.done, self.total)

    def step(self, step: int, _: int) -> None:
        self.done = self.cached + step * self.each
        self.forward(0)


def _cached(
    recipe: FuseRecipe,
    folder: Path,
    described: Sequence[LoadedModel],
    tokenizers: Sequence[Tokenizer],
    texts: Sequence[Tokens],
    target: LoadedModel,
    run: Mapping[str, Any],
    progress: _Progress,
) -> list[Cached]:
    """The candidates' distributions, those made now that are not there; one source is in memory at a time."""
    lengths = [len(text.ids) for text in texts]
    found: list[Cached] = []
    for number, (model, tokenizer) in enumerate(zip(described, tokenizers, strict=True)):
        label = (recipe.target, *recipe.sources)[number]
        its = {"texts": run["examples"], "k": recipe.k, "length": recipe.length, "target": run["model"],
               "source": identity(model) if number else run["model"]}  # fmt: skip
        place = folder / f"candidate-{number}"
        if kept(place, json.loads(json.dumps(its)), ours=recipe.cache is None):
            progress.forward(progress.passes)
        else:
            loaded = load_model(label, device=target.device) if number else target
            pair, own = (tokenizer, tokenizers[0]), found[0] if number else None
            sizes = {"k": recipe.k, "batch": recipe.batch}
            make(place, its, loaded, pair, texts, own, progress=progress.forward, **sizes)
            del loaded
        found.append(Cached.at(place, lengths))
    return found


# --- training --------------------------------------------------------------------------------------


class _Held:
    """The student, the gate and what they learn from."""

    def __init__(
        self, recipe: FuseRecipe, target: LoadedModel, texts: Sequence[Tokens], found: Sequence[Cached]
    ) -> None:
        self.recipe, self.target, self.texts, self.found = recipe, target, texts, found
        self.losses = torch.stack([one.losses for one in found], 1).to(target.device)
        name, given = recipe.gate.chosen
        with torch.random.fork_rng([]):
            torch.manual_seed(recipe.seed)
            gate: Any = Gate(len(found), given.threshold) if isinstance(given, TrainedGate) else _RULES[name]
        same = ("lm_weight", "feedback_weight", "teacher_temperature")
        self.fusion = Fusion(gate, kind=recipe.loss, **{name: getattr(recipe, name) for name in same})
        self.system = nn.ModuleDict({"student": target.module, "fusion": self.fusion}).to(target.device)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        held = int(recipe.valid * len(texts))
        self.valid, self.used = sorted(order[:held]), sorted(order[held:])

    @torch.no_grad()
    def weights(self, numbers: Sequence[int]) -> Tensor:
        """What the gate gives the candidates now: [texts, m]."""
        found: Tensor = self.fusion.gate(self.losses[list(numbers)])
        return found

    def fit(self, store: Checkpoints, progress: _Progress) -> tuple[list[Row], torch.optim.Optimizer, int]:
        """Train in place: the curve, the optimizer, how many texts were kept for validation."""
        ledger, names = _Ledger(), _names(self.recipe)
        optimizer, _ = optimizer_of(self.recipe.optimizer, self.target.module)
        self._with_gate(optimizer)

        def watch() -> dict[str, float]:
            shares = self.weights(self.used).mean(0).tolist()
            return {**ledger.taken(), **{f"weight/{n}": share for n, share in zip(names, shares, strict=True)}}

        def whole(numbers: Sequence[int]) -> Tensor:
            return self.fusion.feedback_weight * balance(self.fusion.gate(self.losses[list(numbers)]))

        pace = Pace(**{name: getattr(self.recipe, name) for name in Pace.__dataclass_fields__})
        rows = fit(
            self.system, optimizer, self._loss(ledger), self.used, pace, valid=self.valid, store=store,
            bf16=self.recipe.bf16, progress=progress.step, watch=watch,
            whole=whole if isinstance(self.fusion.gate, Gate) else None,
        )  # fmt: skip
        return rows, optimizer, len(self.valid)

    def _with_gate(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the gate train by plain AdamW, at its own rate."""
        _, given = self.recipe.gate.chosen
        if isinstance(given, TrainedGate):
            projecting = {"rank": None} if "rank" in optimizer.defaults else {}
            rates = {"adam_lr": given.lr} if "adam_lr" in optimizer.defaults else {}
            named = [(f"gate.{name}", p) for name, p in self.fusion.gate.named_parameters()]
            optimizer.add_param_group({"params": named, "lr": given.lr, "weight_decay": 0.0, **projecting, **rates})

    def _loss(self, ledger: _Ledger) -> Loss:
        """Of texts in training: both losses; of those kept for validation: of the next token alone."""

        def loss(numbers: Sequence[int]) -> tuple[Tensor, int]:
            tokens, mask = padded([self.texts[number].ids for number in numbers])
            labels = torch.where(mask, tokens, IGNORED).to(self.target.device)
            logits = self.target.logits(tokens, None if bool(mask.all()) else mask)
            candidates = [one.of(numbers).to(self.target.device) for one in self.found]
            weights = self.fusion.gate(self.losses[list(numbers)])
            lm, fused, count = self.fusion.parts(logits, labels, candidates, weights)
            if not self.system.training:
                return lm, count
            ledger.add(count, lm=lm.item(), fused=fused.item())
            share = self.fusion.lm_weight
            return share * lm + (1 - share) * fused, count

        return loss


# --- results ---------------------------------------------------------------------------------------


def _gate_bytes(gate: Gate) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in gate.state_dict().items()})


def _notes(recipe: FuseRecipe) -> list[str]:
    many = recipe.batch * recipe.accumulation
    if recipe.gate.trained is None or not recipe.feedback_weight or many >= _BALANCED:
        return []
    return [
        f"a step of {many} texts is few for the balance, which then keeps the gate from choosing; "
        f"batch x accumulation of {_BALANCED} or more, or feedback_weight: 0"
    ]


def _page(recipe: FuseRecipe, rows: Sequence[Row], candidates: Sequence[Candidate]) -> str:
    """The run as a page."""
    columns = (
        Column("name", "Candidate"),
        Column("loss", "Loss", 4, meaning="Nats per byte of text."),
        Column("matched", "Matched", 3, meaning="Share of the target's positions where it speaks itself."),
        Column("weight", "Weight", 3, meaning="Mean over the training texts, at the end."),
        Column("chosen", "Chosen", 3, meaning="Share of the training texts that it has a weight for."),
    )

    def drawn(title: str, axis: str, series: Mapping[str, str]) -> Curves:
        seen = {key: [row for row in rows if key in row.figures] for key in series}
        lines = [
            Curve(series[key], [row.step for row in own], [row.figures[key] for row in own])
            for key, own in seen.items()
            if own
        ]
        return Curves(title, lines, "step", axis)

    return page(
        "Training by fusion",
        [
            Table("Candidates", columns, [asdict(one) for one in candidates]),
            *curve_sections(rows),
            drawn("Parts of the training loss", "loss", {"lm": "next token", "fused": "fused distribution"}),
            drawn("Weights", "mean weight", {f"weight/{one.name}": one.name for one in candidates}),
            Text("What the validation is", ["The loss of the next token of texts that were kept out, per token."]),
            Text("What was asked for", [recipe.model_dump_json(exclude_none=True)]),
        ],
    )
