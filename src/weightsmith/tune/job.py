"""A tuning from a file: transformers models, data by their paths, a folder of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io import system
from weightsmith.io.disk import replace_file
from weightsmith.observe.data import Example, batches, read_examples
from weightsmith.observe.model import LoadedModel, load_model
from weightsmith.recipe.table import digest
from weightsmith.report.html import page
from weightsmith.tune.api import Tuned, tune
from weightsmith.tune.objective import Batch, Objective
from weightsmith.tune.objectives.imitate import Imitate
from weightsmith.tune.report import sections
from weightsmith.tune.schema import TuneFile
from weightsmith.tune.setting import Setting

__all__ = ["Job", "activations", "job", "memory", "resident"]


@dataclass(frozen=True, eq=False)
class Job:
    """A tuning whose model and data are read, and fit."""

    file: TuneFile
    setting: Setting
    loaded: LoadedModel
    data: dict[str, list[Batch]]
    validation: dict[str, list[Batch]]

    def run(
        self,
        out: Path,
        settings: Settings = DEFAULT,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Tuned:
        """Learn, and write recipe.yaml, coefficients.safetensors, curve.csv and report.html into `out`."""
        made = tune(
            self.file.recipe, self.setting, data=self.data, module=self.loaded.module, function=self.function,
            validation=self.validation, out=out, settings=replace(settings, progress=None), every=self.file.every,
            progress=progress, controls=self.file.controls,
        )  # fmt: skip
        title = "Learned coefficients"
        replace_file(out / "report.html", page(title, sections(made, tuple(self.file.recipe.models))).encode())
        return made

    def function(self, module: nn.Module, batch: Batch) -> Any:
        """What the model gives for a batch: scores, of a language model those of the next tokens."""
        objective = self.setting.objective
        if isinstance(objective, Imitate) and objective.layers:
            mask = None if batch.mask is None else batch.mask.to(self.loaded.device, torch.int64)
            name = "pixel_values" if batch.inputs.is_floating_point() else "input_ids"
            more = {} if mask is None else {"attention_mask": mask}
            return module(**{name: batch.inputs.to(self.loaded.device)}, **more, output_hidden_states=True)
        scores = self.loaded.logits(batch.inputs, batch.mask)
        return scores[:, :-1] if self._shifted else scores

    @property
    def _shifted(self) -> bool:
        return self.loaded.kind == "causal-lm" and self.setting.objective.labelled

    def predicted(self) -> dict[str, int]:
        """Bytes: the module, its largest gradient, activations of the first batch (by running it), and the rest."""
        firsts = [found[0] for found in self.data.values()]
        found = memory(self.loaded.module, [partial(self.function, self.loaded.module, first) for first in firsts])
        if self.setting.gather:
            found |= {"largest gradient": found["module"], "in all": found["in all"] + found["module"]}
            found["in all"] -= max(p.numel() * p.element_size() for p in self.loaded.module.parameters())
        return found


def memory(module: nn.Module, runs: Sequence[Callable[[], Any]]) -> dict[str, int]:
    """Bytes that learning takes: the module, its largest gradient, activations (by these forward passes), the rest."""
    weights = sum(t.numel() * t.element_size() for t in _each_once(module))
    largest = max(p.numel() * p.element_size() for p in module.parameters())
    process = max(resident() - weights, 150 << 20)  # libraries and data, as far as they are loaded
    module.eval().requires_grad_(True)
    most = max((activations(module, run) for run in runs), default=0)
    found = {"module": weights, "largest gradient": largest, "activations": most, "process": process}
    return found | {"in all": sum(found.values())}


def _each_once(module: nn.Module) -> Iterable[Tensor]:
    return {t.data_ptr(): t for t in module.state_dict().values()}.values()


def activations(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward one, parameters apart, and of its scores."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()  # held until the sum is taken: what is freed gives its address away
        if isinstance(scores := getattr(outputs, "logits", outputs), Tensor):
            pack(scores)
        total = sum(kept.values())
    del outputs
    return total


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        return int(system.read_file(Path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def job(file: TuneFile, settings: Settings = DEFAULT) -> Job:
    """Read the base model and all data, and refuse what does not fit, before anything is learned.

    Raises RecipeError or SourceError with one line.
    """
    setting = file.setting()
    base = file.recipe.base
    if base is None or not isinstance(base.model, str):
        raise RecipeError("tune needs a base that is a model's folder or hub id: the module is built from it")
    if missing := [t for t in file.data if isinstance(setting.objective, Imitate) and t not in file.recipe.models]:
        raise RecipeError(f"data: {missing[0]} is no model of the recipe; tasks bear the names of their experts")
    loaded = load_model(base.model, kind=file.kind, device=settings.device)
    data, validation = {}, {}
    for task, paths in file.data.items():
        if paths.validation is not None and _same(Path(paths.train), Path(paths.validation)):
            raise SourceError(f"data of {task}: {paths.validation} is the data that is learned from; give other data")
        examples = _examples(file, loaded, paths.train, paths.field)
        held = _examples(file, loaded, paths.validation, paths.field) if paths.validation is not None else []
        if file.held_back and not held:
            count = max(1, round(len(examples) * file.held_back))
            if count >= len(examples):
                raise SourceError(f"data of {task}: {len(examples)} examples leave none beside those held back")
            examples, held = examples[:-count], examples[-count:]
        data[task] = _batches(examples, file.batch, loaded, setting.objective, task)
        if held:
            validation[task] = _batches(held, file.batch, loaded, setting.objective, task)
    return Job(file, setting, loaded, data, validation)


def _examples(file: TuneFile, loaded: LoadedModel, path: str, field: str | None) -> list[Example]:
    return read_examples(path, loaded, examples=file.examples, length=file.length, seed=file.seed, field=field)


def _batches(
    examples: Sequence[Example], size: int, loaded: LoadedModel, objective: Objective, task: str
) -> list[Batch]:
    made = []
    for i, batch in enumerate(batches(examples, size)):
        made.append(Batch(batch.inputs, batch.mask))
        if objective.labelled and loaded.kind == "causal-lm":
            tokens = batch.inputs if batch.mask is None else batch.inputs.masked_fill(~batch.mask, -100)
            made[-1] = replace(made[-1], labels=tokens[:, 1:])
        elif objective.labelled:
            labels = [example.label for example in examples[i * size : (i + 1) * size]]
            if missing := [label for label in labels if label is None]:
                raise SourceError(
                    f"data of {task}: {len(missing)} examples have no label, which {objective.name} needs"
                )
            made[-1] = replace(made[-1], labels=torch.tensor(labels))
    return made


def _same(one: Path, other: Path) -> bool:
    """Whether two paths hold the same bytes."""
    if one.resolve() == other.resolve():
        return True
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    return digest(one) == digest(other)
