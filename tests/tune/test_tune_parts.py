"""Parts of presets: a budget of task vectors, views of images, a merge beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from tune.test_tune import BASE, DATA, EXPERTS, TAUGHT, Killed, fresh, learn, recipe
from tune.test_tune_levels import go
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.engine.gradient import Pullback
from weightsmith.io.read.source import MemorySource
from weightsmith.tune.api import Tuned, tune
from weightsmith.tune.descent import Descent
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.objectives.pseudo import Pseudo
from weightsmith.tune.presets.expert_merging import ExpertMergingPp
from weightsmith.tune.registry import make
from weightsmith.tune.report import summary
from weightsmith.tune.setting import Preset
from weightsmith.tune.space import Free
from weightsmith.tune.teachers import refuse_other_tokens
from weightsmith.tune.views import Viewed, Views, viewed

# --- a budget ------------------------------------------------------------------------------------


def slopes() -> dict[str, Tensor]:
    """<gradient, tau_k> at the base, summed over the tasks' batches: tensor -> [models]."""
    module = fresh().eval()
    for batches in DATA.values():
        for x, y in batches:
            nn.functional.cross_entropy(module(x), y).backward()
    base = BASE.state_dict()
    return {name: torch.stack([(parameter.grad * (state[name] - base[name])).sum() for state in EXPERTS.values()])
            for name, parameter in module.named_parameters() if parameter.grad is not None}  # fmt: skip


def test_a_budget_learns_the_task_vectors_with_the_largest_gradients(tmp_path: Path):
    found = go(recipe(tmp_path), None, {"space": "atlas", "data": DATA, "budget": 1, "lr": 0.05, "steps": 4})
    for name, slope in slopes().items():
        chosen = int(slope.abs().argmax())
        values = found.coefficients["weight"][name]
        assert float(values[chosen]) != 0, name
        assert float(values[1 - chosen]) == 0, name


def test_a_budget_of_groups_counts_models_and_weight_decay_moves_no_others(tmp_path: Path):
    how = {"space": "atlas", "data": DATA, "budget": 1, "partition": 3, "init": 0.2, "lr": 0.05, "steps": 3}
    for values in go(recipe(tmp_path), None, how).coefficients["factor"].values():
        still = (values == 0.2).all(dim=1)
        assert still.tolist() in ([True, False], [False, True])


def test_a_budget_is_kept_through_a_kill(tmp_path: Path):
    given = recipe(tmp_path)
    how = {"space": "atlas", "data": DATA, "budget": 1, "lr": 0.05, "steps": 4}

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 2:
            raise Killed

    whole = go(given, tmp_path / "whole", how)
    with pytest.raises(Killed):
        go(given, tmp_path / "out", how, progress=kill)
    again = go(given, tmp_path / "out", how, resume=True)
    assert all(torch.equal(again.coefficients["weight"][n], v) for n, v in whole.coefficients["weight"].items())


# --- views of images -----------------------------------------------------------------------------


class Seer(nn.Module):
    """Classes by the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x.mean(dim=(2, 3)))
        return found


def seen() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, list[Tensor]]]:
    """A base that is a little right, an expert that is surer, and images with one bright channel."""
    base = {"head.weight": torch.eye(3), "head.bias": torch.zeros(3)}
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(8, 3, 6, 6, generator=draw) * 0.3 for _ in range(4)]
    for i, batch in enumerate(images):
        for j in range(8):
            batch[j, (i + j) % 3] += 2
    return base, {"e": {"head.weight": 9 * torch.eye(3), "head.bias": torch.zeros(3)}}, {"t": images}


def test_views_are_parts_of_the_images_and_drawn_anew():
    image = torch.arange(2 * 1 * 8 * 8.0).reshape(2, 1, 8, 8)
    views = Views([image], [torch.tensor([-1, -1])], seed=3, times=5)
    assert len(views) == 5
    first, second = views[0].inputs, views[1].inputs
    assert torch.equal(first[:2], image)
    assert not torch.equal(first[2:], second[2:])
    assert torch.equal(views[0].inputs, first)
    assert float(first[2].min()) >= 0 <= 63 >= float(first[2].max())
    assert float(first[2].max() - first[2].min()) > 20  # at least half of it


def test_the_surest_of_each_class_are_trusted():
    logits = torch.zeros(40, 2)
    logits[:, 0] = 0.2 * (torch.arange(40) - 19.5)  # 20 of each class, the surest at both ends
    images = torch.arange(40.0)[:, None, None, None].expand(40, 1, 2, 2)
    given: Any = viewed(
        [images], nn.Identity(), lambda module, batch: logits[batch[:, 0, 0, 0].long()], trusted=9, seed=0
    )
    assert given[0].labels.tolist() == [1, 1, *[-1] * 36, 0, 0]  # 40 / (10 * 2) of each


def test_only_sure_answers_and_trusted_ones_are_learned_from():
    said = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 0.1]])
    asked = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], requires_grad=True)
    batch = Viewed(torch.zeros(6, 1, 2, 2), torch.tensor([-1, -1, 1]))
    loss = Pseudo().loss(torch.cat([said, asked]), batch)
    sure = -(said[0].softmax(0) * asked[0].log_softmax(0)).sum()
    kept = -asked[2].log_softmax(0)[1]
    torch.testing.assert_close(loss.detach(), (sure + kept).detach() / 2)
    none = Pseudo().loss(torch.cat([said[1:2], asked[1:2]]), Viewed(torch.zeros(2, 1, 2, 2), torch.tensor([-1])))
    assert float(none.detach()) == 0
    none.backward()  # type: ignore[no-untyped-call]
    assert asked.grad is not None
    assert float(asked.grad.abs().sum()) == 0


def test_a_test_time_adaptation_needs_no_labels_and_goes_on_after_a_kill(tmp_path: Path):
    base, experts, data = seen()
    module = Seer()

    def run(out: Path, **more: Any) -> Tuned:
        module.load_state_dict(base)
        return tune(None, "atlas", data=data, validation={"t": [data["t"][0] + 0]}, module=module, models=experts,
                    base=base, out=out, goal="test_time", steps=8, lr=0.05, every=4, **more)  # fmt: skip

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 3:
            raise Killed

    whole = run(tmp_path / "whole")
    assert whole.best is not None
    assert whole.best[0] < 0.5 * whole.curve[0]["validation"]
    assert float(whole.coefficients["weight"]["head.weight"]) > 0
    assert {c.name.split(",")[0] for c in whole.controls} >= {"tuned", "untuned", "task arithmetic"}
    with pytest.raises(Killed):
        run(tmp_path / "out", progress=kill)
    again = run(tmp_path / "out", resume=True)
    assert torch.equal(again.coefficients["weight"]["head.weight"], whole.coefficients["weight"]["head.weight"])


def test_what_has_no_views_is_refused():
    with pytest.raises(SourceError, match=r"^pseudo needs images \[batch, channels, height, width\] to make views of"):
        tune(None, "atlas", data={"t0": DATA["t0"]}, module=fresh(), models=EXPERTS, base=BASE.state_dict(),
             goal="test_time", steps=1)  # fmt: skip
    with pytest.raises(RecipeError, match=r"^pseudo: sure must be in \[0, 1\) and trusted at least 0; got 1, 100$"):
        Pseudo(sure=1.0)
    with pytest.raises(RecipeError, match=r"^preset atlas: budget and partition are counts; got -1 and 0$"):
        tune(None, "atlas", data=DATA, module=fresh(), models=EXPERTS, base=BASE.state_dict(), budget=-1)


# --- a merge beforehand --------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_mask_lies_over_what_tsvm_makes(tmp_path: Path, in_memory: bool):
    plain = ws.merge(EXPERTS, "tsvm", base=BASE.state_dict())
    given = {"models": EXPERTS, "base": BASE.state_dict()} if in_memory else {"recipe": recipe(tmp_path)}
    module = fresh()
    tune(space="concrete", data=DATA, module=module, inner="tsvm", steps=0, **given)  # equal logits: no mask
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), plain[name], rtol=1e-5, atol=1e-6)


def test_the_recipe_of_a_mask_over_tsvm_merges_to_the_tuned_module(tmp_path: Path):
    module = fresh()
    found = tune(recipe(tmp_path), "concrete", data=DATA, module=module, out=tmp_path / "out", inner="tsvm", steps=6,
                 lr=0.1)  # fmt: skip
    assert found.coefficients["factor"]["layers.1.weight"].shape == (1, 64)
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    result = ws.open_source(tmp_path / "merged")
    assert all(torch.equal(result.read(n), p.detach()) for n, p in module.named_parameters())


# --- nothing learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["adamerging", "expert_merging_pp"])
def test_no_steps_are_said(tmp_path: Path, preset: str):
    data = {f"e{i}": batches for i, batches in enumerate(DATA.values())}
    found = tune(recipe(tmp_path), preset, data=data, module=fresh(), steps=0)
    assert summary(found) == ["no step was taken (steps: 0): the numbers are those of the start"]


# --- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": "many"}, r"^preset adamerging: steps should be a whole number, is 'many'$"),
        ({"lr": True}, r"^preset adamerging: lr should be a number, is True$"),
        ({"clamp": ["low", 1]}, r"^preset adamerging: clamp should be a number, is \['low', 1\]$"),
        ({"clamp": 1}, r"^preset adamerging: clamp should be a list, is 1$"),
    ],
)
def test_an_option_of_another_kind(options: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        make(Preset, "preset", "adamerging", options)  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("free", "text"),
    [
        (
            {"start": {"e0": 0.1, "e1": 0.1, "f1": 0.2}},
            r"^free: weight: start names 'f1', no model; known: e0, e1$",
        ),
        ({"start": {"e0": 0.1}}, r"^free: weight has no start for e1; known: e0$"),
    ],
)
def test_a_start_of_other_models(free: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        learn({"weight": Free(**free)}, Entropy())


@pytest.mark.parametrize(
    ("glob", "text"),
    [
        ("layer.0*", r"^free: factor: 'layer\.0\*' matches no tensor$"),
        ("head.bias", r"^free: factor: 'head\.bias' matches head\.bias, which is not learned: it stays as it is$"),
    ],
)
def test_chunks_of_what_is_not_learned(glob: str, text: str):
    with pytest.raises(RecipeError, match=text):
        learn(ExpertMergingPp(exclude=(), chunks={glob: 2, "*": 1}), data=TAUGHT)


def test_a_teacher_with_another_tokenizer(tmp_path: Path):
    def model(name: str, **ids: int) -> MemorySource:
        (tmp_path / name).mkdir()
        content = {"model": {"type": "WordLevel", "vocab": ids}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        made = MemorySource(BASE.state_dict(), name)
        made.origin = replace(made.origin, folder=tmp_path / name)
        return made

    base, same, other = model("base", a=0, b=1), model("same", a=0, b=1, c=2), model("other", a=1, b=0)
    refuse_other_tokens(base, {"same": same}, ["same", "unknown"])
    with pytest.raises(SourceError, match=r"^imitate: other has another tokenizer than the base: 'a' is 1 there and"):
        refuse_other_tokens(base, {"same": same, "other": other}, ["same", "other"])


@pytest.mark.parametrize("preset", ["adamerging", "expert_merging"])
def test_gathered_gradients_are_contracted_once_and_give_the_same_numbers(preset: str, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    one = Pullback.one
    monkeypatch.setattr(Pullback, "one", lambda self, name, gradient: calls.append(name) or one(self, name, gradient))
    found, counts = [], []
    for gather in (False, True):
        calls.clear()
        found.append(learn(preset, data=TAUGHT, descent=Descent("sgd", lr=0.01, steps=3), gather=gather).coefficients)
        counts.append(len(calls))
        assert all(p.grad is None for p in fresh().parameters())
    name = next(iter(found[0]))
    for tensor, values in found[0][name].items():
        torch.testing.assert_close(found[1][name][tensor], values, rtol=1e-5, atol=1e-7)
    assert counts == ([36, 18] if preset == "adamerging" else [9, 9])  # two tasks a step; one
