"""The router of routed experts: a small network from a sample's mean hidden state to the experts, and its training.

As in Twin-Merging (arXiv:2406.15479): linear layers to 1024, 1024 and T with batch norm and ReLU between them, and
dropout before the last; cross-entropy on the name of the expert that a sample belongs to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightsmith.core.errors import PlanError, SourceError, some
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json
from weightsmith.io.write.output import check_output
from weightsmith.observe.data import Example, batches
from weightsmith.train.loop import Pace, Row, fit
from weightsmith.train.save import save_folder

if TYPE_CHECKING:
    from weightsmith.runtime.routed import Routed

__all__ = ["Router", "TrainedRouter", "named_files", "train_router"]

CONFIG = "router.json"
_LIMIT = 1 << 20


class Router(nn.Module):
    """Features [samples, width] -> logits [samples, experts], in the order of `experts`.

    prototypes  [experts, width]: the mean feature of each expert's samples, for servers that route by distance
    """

    prototypes: Tensor

    def __init__(self, experts: Sequence[str], width: int, hidden: int = 1024) -> None:
        super().__init__()
        self.experts, self.width, self.hidden = tuple(experts), width, hidden
        self.layers = nn.Sequential(
            *(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(hidden, len(self.experts)),
        )
        self.register_buffer("prototypes", torch.zeros(len(self.experts), width))

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.layers(features)
        return found

    def save(self, out: str | Path, *, made: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
        """Write OUT/router.safetensors and OUT/router.json."""
        about = {"experts": list(self.experts), "width": self.width, "hidden": self.hidden}
        return save_folder(
            out,
            {name: value.detach() for name, value in self.state_dict().items()},
            made={**about, **(made or {})},
            how="trained on the names of experts",
            kind="router",
            name="router",
            texts={CONFIG: json.dumps(about, indent=1) + "\n"},
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, folder: str | Path, experts: Sequence[str] | None = None) -> Router:
        """Read a router; its outputs are put into the order of `experts`, which must be the ones it was trained on."""
        folder = Path(folder).expanduser()
        about = read_json(folder / CONFIG, _LIMIT)
        fields = ("experts", "width", "hidden")
        if not isinstance(about, dict) or any(field not in about for field in fields):
            raise SourceError(f"{folder / CONFIG}: expected {', '.join(fields)}; make it with weightsmith train router")
        names = about["experts"]
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise SourceError(f"{folder / CONFIG}: experts must be a list of names")
        sizes = (about["width"], about["hidden"])
        if not all(type(size) is int and 1 <= size <= 1 << 20 for size in sizes):
            raise SourceError(f"{folder / CONFIG}: width and hidden must be whole numbers, got {sizes}")
        if experts is not None and set(experts) != set(names):
            raise SourceError(f"{folder}: routes to {', '.join(names)}, but the experts are {', '.join(experts)}")
        source = SafetensorsSource(folder / "router.safetensors")
        with torch.device("meta"):
            made = cls(names, *sizes)
        wanted = {name: tuple(value.shape) for name, value in made.state_dict().items()}
        found = {name: key.shape for name, key in source.keys.items()}
        if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
            raise SourceError(f"{folder}: {some(wrong, 3)} does not fit {CONFIG}; train the router again")
        made.load_state_dict({name: source.read(name) for name in source.keys}, assign=True)
        return made._ordered(experts or names).eval()

    def _ordered(self, experts: Sequence[str]) -> Router:
        """The outputs by name, not by place."""
        order = [self.experts.index(name) for name in experts]
        last: Any = self.layers[-1]
        last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]
        self.prototypes, self.experts = self.prototypes[order], tuple(experts)
        return self


@dataclass(frozen=True)
class TrainedRouter:
    """A finished training.

    accuracy  expert -> share of its held-out samples that the router gives to it; mean: over all of them
    """

    out: Path
    seconds: float
    rows: Sequence[Row]
    examples: int
    valid: int
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / max(len(self.accuracy), 1)


def train_router(
    model: Routed,
    data: Mapping[str, Sequence[Example]],
    out: str | Path,
    settings: Settings = DEFAULT,
    *,
    steps: int = 500,
    batch: int = 64,
    lr: float = 1e-3,
    hidden: int = 1024,
    valid: float = 0.1,
    seed: int = 0,
) -> TrainedRouter:
    """Train a router on samples of each expert, and write it; the model is not changed.

    data   expert -> its samples (`observe.data.read_examples`); one list per expert
    valid  share of each expert's samples that is held out, and measured

    Errors: PlanError with everything that is in the way, before the model runs; NumericError (see `train.loop.fit`).
    """
    began, out = time.perf_counter(), Path(out)
    missing = [name for name in model.experts if not data.get(name)]
    problems = [f"no data for the expert {name}; a router knows only what it saw" for name in missing]
    problems += [f"data for {name!r}, which is not one of {', '.join(model.experts)}" for name in data
                 if name not in model.experts]  # fmt: skip
    problems += [f"{name} has one sample only; give more" for name, own in data.items() if len(own) == 1]
    problems += [problem.text for problem in check_output(out, settings.files, settings.overwrite, False, 0)]
    if problems:
        raise PlanError(problems)
    features, labels = _features(model, data, batch)
    held, used = _split(labels, valid, seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        router = Router(model.experts, features.shape[1], hidden)
    router.prototypes = torch.stack([features[labels == t].mean(0) for t in range(len(model.experts))])

    def loss(numbers: Sequence[int]) -> tuple[Tensor, int]:
        return cross_entropy(router(features[numbers]), labels[numbers], reduction="sum"), len(numbers)

    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=1e-2)
    pace = Pace(steps, min(batch, len(used)), schedule="cosine", every=max(steps // 20, 1), seed=seed)
    rows = fit(router, optimizer, loss, used, pace, valid=held, progress=settings.progress)
    router.eval()
    with torch.no_grad():
        right = router(features[held]).argmax(1) == labels[held] if held else torch.zeros(0, dtype=torch.bool)
    accuracy = {}
    for t, name in enumerate(model.experts):
        if bool((own := labels[held] == t).any()):
            accuracy[name] = float(right[own].float().mean())
    options = {"steps": steps, "batch": batch, "lr": lr, "valid": valid, "seed": seed}
    made = {**options, "model": model.label, "rows": [asdict(row) for row in rows]}
    router.save(out, made=made, overwrite=settings.overwrite)
    return TrainedRouter(out, time.perf_counter() - began, rows, len(used), len(held), accuracy)


def named_files(data: Sequence[str]) -> dict[str, Path]:
    """'math=math.jsonl' as expert -> file; PlanError with all that cannot be read so."""
    found, problems = dict[str, Path](), []
    for text in data:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            problems.append(f"--data {text!r}: expected EXPERT=FILE, for example math=math.jsonl")
        elif name in found:
            problems.append(f"--data: {name} is given twice; put its samples into one file or folder")
        else:
            found[name] = Path(file)
    if problems:
        raise PlanError(problems)
    return found


def _features(model: Routed, data: Mapping[str, Sequence[Example]], size: int) -> tuple[Tensor, Tensor]:
    """Features [samples, width] on the CPU, and the number of each one's expert."""
    found, labels = [], []
    for number, name in enumerate(model.experts):
        for part in batches(data[name], size):
            found.append(model.features(part.inputs, part.mask).cpu())
            labels += [number] * len(part.inputs)
    return torch.cat(found), torch.tensor(labels)


def _split(labels: Tensor, valid: float, seed: int) -> tuple[list[int], list[int]]:
    """Held-out samples, a share of each expert's, and the others."""
    noise = torch.Generator().manual_seed(seed)
    held: list[int] = []
    for label in sorted(set(labels.tolist())):
        own = (labels == label).nonzero()[:, 0]
        order = own[torch.randperm(len(own), generator=noise)].tolist()
        held += order[: min(max(int(valid * len(order)), 1 if valid else 0), len(order) - 1)]
    chosen = set(held)
    return sorted(held), [i for i in range(len(labels)) if i not in chosen]
