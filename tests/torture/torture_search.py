"""Searches by lm_eval itself, and Frank-Wolfe through pools of image experts with irrelevant ones among them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from study.data import Data, Task, load
from study.vision import Network, Training, fit
from torch import Tensor, nn

from torture.environments import python_of
from weightsmith.cli.main import main
from weightsmith.io.read.open import open_source
from weightsmith.search.pool import Options, Walk
from weightsmith.tune.objectives.labels import Labels

sys.path.insert(0, str(Path(__file__).parent.parent / "study"))
from harness_toy import language_model, own_task

ROOT = Path(__file__).parent.parent.parent
DATA = next((place for place in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data") if place.exists()), None)
SETTINGS = Training(base_steps=120, expert_steps=80)
RELEVANT, IRRELEVANT, ITERATIONS = 4, 16, 10

# --- lm_eval -----------------------------------------------------------------------------------------

SEARCH = """\
recipe: {base: base, models: {one: one, two: two}, method: task_arithmetic}
space: {weight: {low: -1, high: 2, per: model}}
score:
  lm_eval: {tasks: {sums: {search: own_sums, report: own_more}}, include: tasks, python: PYTHON, metric: acc_norm}
sampler: {tpe: {startup: 3}}
evaluations: 5
batch: 3
rescore: 1
"""


def test_a_search_by_lm_eval_itself(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        language_model(tmp_path / name, seed)
    data = own_task(tmp_path / "tasks")
    lines = data.read_text().splitlines()
    more = data.with_name("more.jsonl")
    more.write_text("".join(line.replace("+", "-") + "\n" for line in lines[:7]))
    task = (tmp_path / "tasks" / "own_sums.yaml").read_text()
    (tmp_path / "tasks" / "own_more.yaml").write_text(
        task.replace("own_sums", "own_more").replace(str(data), str(more))
    )
    (tmp_path / "search.yaml").write_text(SEARCH.replace("PYTHON", python_of("lm_eval")))
    assert main(["search", str(tmp_path / "search.yaml"), str(tmp_path / "out"), "--quiet"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["cost"]["failed"] == 0
    assert result["candidates"] == 5
    known = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    counts = {len(one["items"]["sums"]) for line in known if (one := line.get("value", line)).get("items")}
    assert counts == {len(lines), 7}  # each item of both tasks has its score, so that there are intervals
    table = {line["name"]: line for line in result["table"]}
    assert set(table) >= {"incumbent", "recipe as it is", "random search, 5 candidates"}
    assert all(0 <= line["report"]["value"] <= 1 for line in table.values())
    assert main(["merge", str(tmp_path / "out" / "recipe.yaml"), str(tmp_path / "best"), "--quiet"]) == 0


# --- Frank-Wolfe -------------------------------------------------------------------------------------


def expert(model: Network, base: dict[str, Tensor], task: Task, seed: int) -> dict[str, Tensor]:
    model.load_state_dict(base)
    fit(model, (task,), 64, SETTINGS.expert_steps, SETTINGS.expert_rate, seed, base, SETTINGS.displacement)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def images() -> tuple[Data, dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Data, base, an expert for each of four tasks, and sixteen of other tasks."""
    data = load(DATA)  # without one, digits under lenses
    torch.manual_seed(0)
    model = Network(SETTINGS, {task.name: task.classes for task in data.all})
    fit(model, data.all, SETTINGS.base_batch, SETTINGS.base_steps, SETTINGS.base_rate, 0)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.heads.requires_grad_(False)
    wanted, others = data.tasks[:RELEVANT], data.tasks[RELEVANT:]
    own = {task.name: expert(model, base, task, at) for at, task in enumerate(wanted)}
    strange = {
        f"{task.name} {seed}": expert(model, base, task, 100 + seed)
        for seed in range(IRRELEVANT)
        for task in [others[seed % len(others)]]
    }
    return data, base, own, strange


def accuracy(data: Data, base: dict[str, Tensor], state: dict[str, Tensor]) -> float:
    """Mean percent over the four tasks."""
    model = Network(SETTINGS, {task.name: task.classes for task in data.all})
    model.load_state_dict({**base, **state})
    found = []
    for task in data.tasks[:RELEVANT]:
        model.task, part = task.name, task.splits["test"]
        with torch.no_grad():
            found.append(float((model(part.images).argmax(1) == part.labels).double().mean()))
    return 100 * sum(found) / len(found)


def walked(data: Data, base: dict[str, Tensor], pool: dict[str, dict[str, Tensor]], options: Options) -> float:
    model = Network(SETTINGS, {task.name: task.classes for task in data.all})
    model.load_state_dict(base)
    tree = {"base": "base", "models": {name: name for name in pool}, "exclude": ["heads.*"]}
    given = {name: open_source(dict(state)) for name, state in {"base": base, **pool}.items()}
    batches = {
        task.name: [{"images": part.images[:100], "labels": part.labels[:100], "task": task.name}]
        for task in data.tasks[:RELEVANT]
        for part in [task.splits["train"]]
    }

    def call(module: nn.Module, batch: Any) -> Any:
        module.task = batch["task"]
        return module(batch["images"])

    walk = Walk(tree, given, model, batches, call, Labels(), options)
    for t in range(ITERATIONS):
        walk.step(t)
    walk.loss()  # puts the last iterate into the module
    return accuracy(data, base, {name: p.detach() for name, p in walk.resident.module.named_parameters()})


def test_sixteen_irrelevant_checkpoints_change_little(images: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data, base, own, strange = images
    both = {**own, **strange}
    names = [name for name in base if not name.startswith("heads.")]

    def summed(pool: dict[str, dict[str, Tensor]], share: float) -> dict[str, Tensor]:
        return {n: base[n] + share * sum(state[n] - base[n] for state in pool.values()) for n in names}

    told = {"base": (accuracy(data, base, {}),) * 2}
    for share in (0.3, 1.0):
        told[f"sum, {share}"] = tuple(accuracy(data, base, summed(pool, share)) for pool in (own, both))
    told["mean"] = tuple(accuracy(data, base, summed(pool, 1 / len(pool))) for pool in (own, both))
    for granularity in ("task", "layer"):
        for score in ("inner_delta", "cosine"):
            options = Options(granularity=granularity, score=score, start="base", step_size=1.0, scaling=1.0)
            told[f"Frank-Wolfe, {granularity}, {score}"] = tuple(
                walked(data, base, pool, options) for pool in (own, both)
            )
    options = Options("soft", "layer", "inner_delta", start="base", step_size=1.0)
    told["Frank-Wolfe, soft"] = tuple(walked(data, base, pool, options) for pool in (own, both))
    with capsys.disabled():
        for name, (few, many) in told.items():
            print(
                f"{name}: {few:.1f}% with {len(own)} relevant checkpoints, {many:.1f}% with {len(strange)} others too"
            )
    fallen = told["mean"][0] - told["mean"][1]
    for name, (few, many) in told.items():
        if name.startswith("Frank-Wolfe"):
            assert few > told["base"][0]
            assert few - many < max(1.0, fallen / 2), name
