"""From a recipe to a folder that `bench` takes as its joint model, with the curve of every task."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.read.source import tensor_to_bits
from weightsmith.io.url import output_of
from weightsmith.io.write.output import check_output
from weightsmith.train.checkpoints import Checkpoints
from weightsmith.train.loop import Loss, Pace, Row, Store, fit
from weightsmith.train.multitask.build import INFO, OWN, build, digest, open_body
from weightsmith.train.multitask.data import Pair, Task, Tasks, read_tasks
from weightsmith.train.multitask.mtadamw import MTAdamW
from weightsmith.train.multitask.pages import curves
from weightsmith.train.multitask.recipe import MultiTaskRecipe
from weightsmith.train.multitask.sampler import MultiTaskSampler
from weightsmith.train.multitask.system import System
from weightsmith.train.run import CURVE, kept_bytes, optimizer_of, save_model
from weightsmith.train.save import save_folder

__all__ = ["MultiTrained", "fit_system", "train_multitask"]


@dataclass(frozen=True)
class MultiTrained:
    """A finished run.

    scores   task -> its metric on the test examples
    rows     the curve; `figures` of a row: "task/loss", "task/valid" and "task/score"
    trained  numbers that trained; kept: bytes of the optimizer's state
    skipped  task -> steps without a usable gradient
    """

    out: Path
    seconds: float
    rows: Sequence[Row]
    scores: Mapping[str, float]
    examples: Mapping[str, int]
    trained: int
    kept: int
    skipped: Mapping[str, int]
    told: Mapping[str, Any]
    notes: Sequence[str]


@dataclass(frozen=True)
class _MultiPace(Pace):
    """Which examples a step takes, from a sampler."""

    sampler: MultiTaskSampler | None = None

    def micro_batches(self, step: int, count: int) -> Any:
        assert self.sampler is not None
        return iter(self.sampler.micro_batches(step))


@dataclass
class _Ledger:
    """Training losses of each task since the last row of the curve."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, task: str, value: float, count: int) -> None:
        own = self.sums.setdefault(task, [0.0, 0.0])
        own[0] += value
        own[1] += count

    def taken(self) -> dict[str, float]:
        found = {f"{task}/loss": value / max(count, 1) for task, (value, count) in self.sums.items()}
        self.sums.clear()
        return found


def train_multitask(
    recipe: MultiTaskRecipe,
    out: str | Path,
    settings: Settings = DEFAULT,
    *,
    module: nn.Module | None = None,
    device: str = "auto",
) -> MultiTrained:
    """Train and write OUT; beside it OUT.training has the last checkpoint while the run goes on.

    module    in place of the recipe's model: any that gives features of images [batch, d] or [batch, d, H, W]
    settings  of them count: resume, overwrite, files and progress, as in `train.run.train`

    Errors: RecipeError, SourceError or PlanError before anything trains, NumericError (see `loop.fit`).
    """
    began, out = time.perf_counter(), Path(out)
    if output_of(out) is not None:
        raise PlanError([f"{out}: training writes to a folder of this machine; upload it afterwards"])
    places = [
        *settings.files,
        *(Path(p) for task in recipe.tasks.values() for p in (task.data, task.valid, task.test) if p),
    ]
    if recipe.model is not None and Path(recipe.model).is_dir():
        places.append(Path(recipe.model))
    if problems := check_output(out, places, settings.overwrite, False, 0):
        raise PlanError(problems)
    tasks = read_tasks(recipe)
    body = open_body(recipe, tasks, at=module, device=device)
    tasks = body.prepared(tasks)
    base = digest(body.module)
    system = build(recipe, body, tasks)
    if not any(p.requires_grad and p.numel() for p in system.parameters()):
        raise RecipeError("nothing trains: the model is frozen and its prompt has no vectors; raise n_ctx")
    start = digest(system.own)
    asked = json.loads(recipe.model_dump_json(exclude_none=True))
    identity = {"recipe": asked, "examples": _hashed(tasks), "model": digest(system)}
    checkpoints = Checkpoints(out, identity, resume=settings.resume, overwrite=settings.overwrite)
    rows, optimizer = fit_system(recipe, system, store=checkpoints, progress=settings.progress)
    with torch.no_grad():
        scores = {n: system.score(t, t.parts["test"], recipe.batch) for n, t in tasks.items() if t.parts["test"]}
    notes = [*(note for task in tasks.values() for note in task.notes), *system.notes]
    info = {
        "recipe": asked, "base": base, "start": start, "trains_base": system.trains_base, "scores": scores,
        "tasks": {n: {"kind": t.kind, "classes": t.classes, "metric": t.metric} for n, t in tasks.items()},
        "told": system.told(), "notes": notes,
    }  # fmt: skip
    _save(
        system,
        out,
        asked,
        {INFO: json.dumps(info, indent=1), CURVE: curves(rows, tasks, scores, info)},
        settings.overwrite,
    )
    checkpoints.clear()
    return MultiTrained(
        out=out, seconds=time.perf_counter() - began, rows=rows, scores=scores,
        examples={name: len(task.parts["train"]) for name, task in tasks.items()},
        trained=sum(p.numel() for p in system.parameters() if p.requires_grad), kept=kept_bytes(optimizer),
        skipped=getattr(optimizer, "skipped", {}), told=system.told(), notes=notes,
    )  # fmt: skip


def fit_system(
    recipe: MultiTaskRecipe, system: System, *, store: Store | None = None, progress: Any = None
) -> tuple[list[Row], torch.optim.Optimizer]:
    """Train a system in place by the shared loop."""
    tasks, ledger = system.tasks, _Ledger()
    if system.trains_base:
        _prepare(system)
    balanced = recipe.chosen_optimizer.chosen[0] == "mt_adamw"
    given = recipe.by.uni_perceiver
    more = {"grad_norm": given.grad_norm} if balanced and given is not None else {}
    optimizer, _ = optimizer_of(recipe.chosen_optimizer, system, **more)
    sampler = MultiTaskSampler(
        {name: len(task.parts["train"]) for name, task in tasks.items()}, recipe.rates, steps=recipe.steps,
        batch=recipe.batch, how=recipe.sampling, temperature=recipe.temperature,
        accumulation=recipe.accumulation, seed=recipe.seed,
    )  # fmt: skip
    examples = [(task, pair) for task in tasks.values() for pair in task.parts["train"]]
    same = ("steps", "batch", "accumulation", "schedule", "warmup", "every", "seed", "clip")
    pace = _MultiPace(**{name: getattr(recipe, name) for name in same}, sampler=sampler)

    def update(step: int) -> None:
        if not isinstance(optimizer, MTAdamW):
            optimizer.step()
            return
        name = sampler.task(step)
        assert name is not None
        optimizer.step(task=name, rate=sampler.rates[name], weight=tasks[name].spec.weight)

    def watch() -> dict[str, float]:
        return {**ledger.taken(), **_validated(recipe, system)}

    loss = _loss_of(recipe, system, examples, ledger, weighted=not balanced)
    options: dict[str, Any] = {
        "store": store,
        "bf16": recipe.bf16,
        "progress": progress,
        "watch": watch,
        "update": update,
    }
    return fit(system, optimizer, loss, range(len(examples)), pace, **options), optimizer


def _loss_of(
    recipe: MultiTaskRecipe, system: System, examples: Sequence[tuple[Task, Pair]], ledger: _Ledger, *, weighted: bool
) -> Loss:
    """The loss of numbered examples: the mean over them all; of `mixed` batches the sum of each task's mean."""

    def loss(numbers: Sequence[int]) -> tuple[Tensor, int]:
        groups: dict[str, tuple[Task, list[Pair]]] = {}
        for number in numbers:
            task, pair = examples[number]
            groups.setdefault(task.name, (task, []))[1].append(pair)
        values: list[Tensor] = []
        total = 0
        for task, pairs in groups.values():
            value, count = system.loss(task, pairs)
            ledger.add(task.name, float(value.detach()), count)
            value = value * (task.spec.weight if weighted else 1.0)
            values.append(value / max(count, 1) if recipe.sampling == "mixed" else value)
            total += count
        return torch.stack(values).sum(), 1 if recipe.sampling == "mixed" else total

    return loss


def _validated(recipe: MultiTaskRecipe, system: System) -> dict[str, float]:
    """Loss and metric of each task's validation examples."""
    found = {}
    for name, task in system.tasks.items():
        if pairs := task.parts["valid"][: recipe.examples]:
            parts = [system.loss(task, pairs[i : i + recipe.batch]) for i in range(0, len(pairs), recipe.batch)]
            count = sum(own for _, own in parts)
            found[f"{name}/valid"] = sum(float(value) for value, _ in parts) / max(count, 1)
            found[f"{name}/score"] = system.score(task, pairs, recipe.batch)
    return found


def _prepare(system: System) -> None:
    """Parameters that the checkpoint does not hold (a pooler that nobody uses) stay as they are."""
    names, module = system.body.loaded.names, system.body.module
    _, lost = names.convert({name: p.detach() for name, p in module.named_parameters()})
    if lost:
        for name, p in module.named_parameters():
            if names.convert({name: p.detach()})[1]:
                p.requires_grad_(False)


def _hashed(tasks: Tasks) -> str:
    """A hash of all examples."""
    found = xxhash.xxh3_128()
    for task in tasks.values():
        for part, pairs in task.parts.items():
            found.update(f"{task.name} {part} {len(pairs)}".encode())
            for pair in pairs:
                for value in (pair.input, pair.answer):
                    found.update(tensor_to_bits(value).tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


def _save(system: System, out: Path, asked: Mapping[str, Any], texts: Mapping[str, str], overwrite: bool) -> None:
    from safetensors.torch import save

    own: Any = system.own
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.state_dict().items()}
    if system.trains_base:
        blobs = {OWN: save(tensors)} if tensors else {}
        save_model(system.body.loaded, out, asked, texts, blobs=blobs, overwrite=overwrite)
    else:
        name = OWN.removesuffix(".safetensors")
        save_folder(
            out, tensors, made=asked, how="trained", kind="training", name=name, texts=texts, overwrite=overwrite
        )
