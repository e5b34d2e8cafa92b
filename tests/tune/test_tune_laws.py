"""Laws of the presets: what special numbers give, and where learning ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from tune.test_tune import DATA, EXPERTS, TAUGHT, fresh, learn, pairs, recipe, with_states
from tune.toy import Net
from weightsmith.tune.api import tune
from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.objectives.labels import Labels
from weightsmith.tune.presets.expert_merging import ExpertMerging
from weightsmith.tune.space import Free
from weightsmith.tune.work import prepared

STILL = Descent("adam", steps=0)


def entropy_of(module: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(Entropy().loss(module(x), None)) for batches in DATA.values() for x, _ in batches)


@pytest.mark.parametrize("one", [0, 1])
def test_one_hot_numbers_are_that_expert(one: int):
    module = fresh()
    start = {f"e{i}": float(i == one) for i in range(2)}
    learn({"weight": Free(start=start)}, Entropy(), module=module, descent=STILL)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), EXPERTS[f"e{one}"][name], rtol=1e-5, atol=1e-6)


class Sides(nn.Module):
    """Two classes from two pairs of inputs, a weight vector each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, :2] @ self.left + x[:, 2:] @ self.right
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_learning_raises_the_accuracy_above_that_of_even_numbers():
    """Each expert is right about one pair of inputs and reads noise from the other: the entropy tells which."""
    right, noise = torch.tensor([8.0, 0.0]), torch.tensor([0.0, 8.0])
    experts = {"a": {"left": right, "right": noise}, "b": {"left": noise, "right": right}}
    draw = torch.Generator().manual_seed(0)
    data, labels = {}, {}
    for task, place in (("a", 0), ("b", 2)):
        labels[task] = torch.randint(2, (200,), generator=draw)
        data[task] = [torch.zeros(200, 4)]
        data[task][0][:, place] = 1.0 - 2 * labels[task]
        data[task][0][:, place + 1] = 0.7 * torch.randn(200, generator=draw)
    base = {"left": torch.zeros(2), "right": torch.zeros(2)}
    found = []
    for steps in (0, 40):
        module = Sides()
        tune(data=data, module=module, models=experts, base=base, lr=0.02, steps=steps)
        with torch.no_grad():
            found.append([float((module(data[t][0]).argmax(1) == labels[t]).double().mean()) for t in data])
    assert all(learned > even + 0.02 for even, learned in zip(*found, strict=True))


@pytest.mark.parametrize(("partition", "parameter", "per"), [(0, "weight", 1), (3, "factor", 3)])
def test_only_so_many_numbers_are_learned(tmp_path: Path, partition: int, parameter: str, per: int):
    from weightsmith.tune.presets.atlas import Atlas

    work = prepared(recipe(tmp_path), None, Atlas(partition=partition).setting(tuple(EXPERTS)), fresh())
    tensors = [p for p in fresh().parameters() if p.ndim == 2 or not partition]
    assert {one.name: one.count for one in work.numbers} == {parameter: 2 * per * len(tensors)}


def test_excluded_tensors_keep_the_bytes_of_the_base(tmp_path: Path):
    preset = ExpertMerging(exclude=("head*",), steps=3, accumulate=2)
    tune(recipe(tmp_path), preset, data=TAUGHT, module=fresh(), function=with_states, out=tmp_path / "out")
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    merged, base = ws.open_source(tmp_path / "merged"), ws.open_source(tmp_path / "base.safetensors")
    kept = {name for name in base.keys if torch.equal(merged.read(name), base.read(name))}
    assert kept == {name for name in base.keys if name.startswith("head") or name.endswith("bias")}


# --- Concrete ------------------------------------------------------------------------------------


def test_a_learned_mask_is_surer_than_no_mask_and_a_seed_gives_its_bits():
    plain, modules = fresh(), [fresh(), fresh()]
    learn("concrete", module=plain, descent=STILL)
    found = [learn("concrete", module=m, descent=Descent("adam", lr=0.1, steps=25)).coefficients for m in modules]
    assert entropy_of(modules[0]) < entropy_of(plain)
    assert all(torch.equal(v, found[1]["factor"][n]) for n, v in found[0]["factor"].items())


class Two(nn.Module):
    """Class scores from four numbers: the first two say it, the last two are noise where experts conflict."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


def test_a_mask_lowers_the_entries_where_experts_conflict():
    """Both experts read the first two inputs alike; of the last two each wants what the other does not."""
    alike = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    first = {"w": torch.cat([alike, 3 * alike], 1)}
    second = {"w": torch.cat([alike, -2 * alike], 1)}
    draw = torch.Generator().manual_seed(0)
    data = {}
    for task, sign in (("a", -1.0), ("b", -1.0)):  # what is left of the conflict speaks against the common part
        x = torch.randn(32, 2, generator=draw)
        data[task] = [torch.cat([x, sign * x], 1)]
    module = Two()
    found = tune(space="concrete", data=data, module=module, models={"a": first, "b": second},
                 base={"w": torch.zeros(2, 4)}, lr=0.1, steps=60)  # fmt: skip
    mask = found.coefficients["factor"]["w"].reshape(2, 4)
    assert float(mask[:, 2:].max()) < 0.8 * float(mask[:, :2].min())


# --- Self Positioning ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance(Objective):
    """Half the squared distance of the weights from a batch."""

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        found: Tensor = 0.5 * (outputs - batch).square().sum()
        return found


class Point(nn.Module):
    """Weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


TARGETS = {"a": torch.tensor([2.0, 0.0, 0.0]), "b": torch.tensor([0.0, 2.0, 0.0]), "c": torch.tensor([0.0, 0.0, 2.0])}


def positioned(targets: dict[str, Tensor], models: dict[str, Tensor], **data: int) -> dict[str, Tensor]:
    """Weights and scale after learning where the loss is the distance from targets."""
    batches = {task: [target] * data.get(task, 1) for task, target in targets.items()}
    found = tune(space="self_positioning", objective=Distance(), data=batches, module=Point(),
                 function=lambda module, batch: module.w, models={n: {"w": t} for n, t in models.items()},
                 base={"w": torch.zeros(3)}, lr=0.02, steps=300, momentum=0.5)  # fmt: skip
    return {name: values["w"] for name, values in found.coefficients.items()}


def test_of_quadratic_losses_the_position_is_the_middle_and_the_scale_one():
    found = positioned(TARGETS, TARGETS)
    torch.testing.assert_close(found["weight"], torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    torch.testing.assert_close(found["lambda"], torch.ones(1), rtol=0, atol=0.05)


def test_more_data_of_a_task_change_nothing():
    once, twice = positioned(TARGETS, TARGETS), positioned(TARGETS, TARGETS, b=2)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_of_one_expert_the_scale_ends_where_a_scan_does():
    wanted, expert = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])
    scan = torch.linspace(0, 2, 401)
    best = scan[(scan[:, None] * expert - wanted).square().sum(1).argmin()]
    found = positioned({"a": wanted}, {"a": expert})
    torch.testing.assert_close(found["lambda"], best[None], rtol=0, atol=0.01)


def test_the_position_is_no_worse_than_the_average_on_the_probe():
    validation = {task: list(batches[2:]) for task, batches in DATA.items()}
    data = {task: list(batches[:2]) for task, batches in DATA.items()}
    found = learn("self_positioning", data=data, validation=validation, function=pairs, every=2, controls=False,
                  descent=Descent("sgd", lr=0.05, steps=12, momentum=0.9))  # fmt: skip
    assert found.best is not None
    assert found.best[0] <= found.curve[0]["validation"]


def test_equal_numbers_of_all_tensors_are_one_number_per_model():
    modules: list[Net] = [fresh(), fresh()]
    for per, module in zip(("tensor", "model"), modules, strict=True):
        learn({"weight": Free(per=per, start={"e0": 0.4, "e1": -0.2})}, Labels(), module=module, descent=STILL)
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True))
