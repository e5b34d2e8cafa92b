"""Learned coefficients: gradients, laws of the presets, resume, what is written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import weightsmith as ws
from tune.toy import Net, net, task, world
from weightsmith.core.errors import NumericError, OutputError, PlanError, RecipeError, SourceError
from weightsmith.core.keys import Key
from weightsmith.recipe.load import load
from weightsmith.tune.api import Tuned, tune
from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.objectives.labels import Labels
from weightsmith.tune.presets.adamerging import Adamerging
from weightsmith.tune.registry import named
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free, Numbers

BASE, EXPERTS, DATA = world()


def fresh() -> Net:
    made = net()
    made.load_state_dict(BASE.state_dict())
    return made


def learn(space: Any = "adamerging", objective: Any = None, steps: int = 3, **more: Any) -> Tuned:
    given = {"models": EXPERTS, "base": BASE.state_dict(), "data": DATA, "module": fresh(), "threads": 1, **more}
    descent = given.pop("descent", None) or Descent("adam", lr=0.05, steps=steps)
    return tune(given.pop("recipe", None), space, objective, descent=descent, **given)


def merged(coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    """base + sum_k a_k tau_k with the graph of the coefficients [n]: what the tuner must be equal to."""
    base = {n: p.detach() for n, p in BASE.named_parameters()}
    return {n: b + sum(coefficients[n][k] * (state[n] - b) for k, state in enumerate(EXPERTS.values()))
            for n, b in base.items()}  # fmt: skip


def by_autograd(objective: Objective, steps: int, lr: float, start: float, per: str) -> dict[str, Tensor]:
    """The same learning with everything in memory."""
    module = fresh().eval()
    names = [n for n, _ in module.named_parameters()]
    if per == "model":
        raw = torch.full((1, 2), start, requires_grad=True)
        places = dict.fromkeys(names, 0)
    elif per == "layer":
        raw = torch.full((3, 2), start, requires_grad=True)
        places = {n: int(n.split(".")[1]) if n.startswith("layers") else 2 for n in names}
    else:
        raw = torch.full((len(names), 2), start, requires_grad=True)
        places = {n: i for i, n in enumerate(names)}
    optimizer = torch.optim.Adam([raw], lr)
    for step in range(steps):
        optimizer.zero_grad()
        weights = merged({n: raw[i] for n, i in places.items()})
        loss = sum(objective.loss(functional_call(module, weights, (b[step % len(b)][0],)), b[step % len(b)], t)
                   for t, b in DATA.items())  # fmt: skip
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return {n: raw[i].detach() for n, i in places.items()}


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
@pytest.mark.parametrize("objective", [Entropy(), Labels()], ids=lambda o: o.name)
def test_the_same_numbers_as_autograd_with_everything_in_memory(objective: Objective, per: str):
    found = learn({"weight": Free(per=per, start=0.3)}, objective, steps=5).coefficients["weight"]
    for name, want in by_autograd(objective, 5, 0.05, 0.3, per).items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5)


def test_entropy_falls_and_the_module_holds_the_result():
    module = fresh()
    found = learn(Adamerging(steps=30), steps=30, module=module, descent=Descent("adam", lr=0.02, steps=30))
    losses = [row["loss"] for row in found.curve]
    assert sum(losses[-5:]) < sum(losses[:5])
    want = merged(dict(found.coefficients["weight"]))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-5, atol=1e-6)
    assert not module.training


@pytest.mark.parametrize("preset", ["adamerging", "adamerging_pp"])
def test_coefficients_stay_in_the_interval(preset: str):
    found = learn(preset, steps=8, descent=Descent("adam", lr=0.5, steps=8)).coefficients["weight"]
    assert all(bool(((v >= 0) & (v <= 1)).all()) for v in found.values())
    assert any(bool(((v == 0) | (v == 1)).any()) for v in found.values())


def test_the_order_of_experts_permutes_columns_only():
    one = learn(steps=4).coefficients["weight"]
    other = learn(steps=4, models=dict(reversed(EXPERTS.items()))).coefficients["weight"]
    for name, values in one.items():
        torch.testing.assert_close(other[name].flip(0), values, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_whatever_the_threads():
    first, second = (learn("adamerging_pp", steps=3, threads=n).coefficients["weight"] for n in (1, 2))
    assert all(torch.equal(first[n], second[n]) for n in first)


# --- what is written, and resumed ----------------------------------------------------------------


def saved(folder: Path) -> dict[str, str]:
    """The base and its experts on disk; returns the recipe's models."""
    from safetensors.torch import save_file

    for name, state in {"base": BASE.state_dict(), **EXPERTS}.items():
        save_file({n: t.clone() for n, t in state.items()}, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in EXPERTS}


def recipe(folder: Path) -> dict[str, Any]:
    return {"base": str(folder / "base.safetensors"), "models": saved(folder), "method": "task_arithmetic"}


@pytest.mark.parametrize("preset", ["adamerging", "adamerging_pp"])
def test_the_recipe_merges_to_the_tuned_module_bit_for_bit(tmp_path: Path, preset: str):
    module = fresh()
    tune(recipe(tmp_path), preset, data=DATA, module=module, out=tmp_path / "out", steps=4, threads=1)
    made = load(tmp_path / "out" / "recipe.yaml")
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    result = ws.open_source(tmp_path / "merged")
    assert made.parameters["weight"]["file"].endswith("coefficients.safetensors")
    for name, parameter in module.named_parameters():
        assert torch.equal(result.read(name), parameter.detach()), name
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]


def test_few_numbers_are_written_plainly(tmp_path: Path):
    found = tune(recipe(tmp_path), "adamerging", data=DATA, module=fresh(), out=tmp_path / "out", granularity="task",
                 steps=2, threads=1)  # fmt: skip
    made = load(tmp_path / "out" / "recipe.yaml").parameters["weight"]
    values = found.coefficients["weight"]["head.weight"].tolist()
    assert made == {"e0": values[0], "e1": values[1]}
    assert not (tmp_path / "out" / "coefficients.safetensors").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])
def test_resumed_after_a_kill_it_gives_the_same_bits(tmp_path: Path, at: int):
    given = recipe(tmp_path)
    validation = {t: task(i + 31, 1) for i, t in enumerate(DATA)}

    def go(out: Path, progress: Any = None, resume: bool = False) -> Tuned:
        return tune(given, "adamerging_pp", data=DATA, validation=validation, module=fresh(), out=out, threads=1,
                    steps=6, every=2, lr=0.05, progress=progress, resume=resume)  # fmt: skip

    def kill(done: int, steps: int, loss: float) -> None:
        if done == at:
            raise Killed

    whole = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "out", kill)
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    again = go(tmp_path / "out", resume=True)
    assert all(torch.equal(again.coefficients["weight"][n], v) for n, v in whole.coefficients["weight"].items())
    assert list(again.curve) == list(whole.curve)
    assert again.best == whole.best
    names = ("recipe.yaml", "coefficients.safetensors", "curve.csv")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_a_folder_in_use_is_refused_and_an_overwritten_one_shows_nothing_old(tmp_path: Path):
    given = recipe(tmp_path)
    tune(given, data=DATA, module=fresh(), out=tmp_path / "out", steps=1)
    with pytest.raises(OutputError, match="is not empty; choose another folder, or use --overwrite"):
        tune(given, data=DATA, module=fresh(), out=tmp_path / "out", steps=1)

    def kill(done: int, steps: int, loss: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        tune(given, data=DATA, module=fresh(), out=tmp_path / "out", steps=2, overwrite=True, progress=kill)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["journal.safetensors"]


def test_a_file_of_coefficients_that_was_changed_is_noticed(tmp_path: Path):
    tune(recipe(tmp_path), data=DATA, module=fresh(), out=tmp_path / "out", steps=1)
    path = tmp_path / "out" / "coefficients.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="was changed since the recipe was written"):
        load(tmp_path / "out" / "recipe.yaml")


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out cannot be made: Not a directory"):
        tune(recipe(tmp_path), data=DATA, module=fresh(), out=tmp_path / "file" / "out", steps=1)


def test_another_tuning_is_not_resumed(tmp_path: Path):
    given = recipe(tmp_path)

    def kill(done: int, steps: int, loss: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        tune(given, data=DATA, module=fresh(), out=tmp_path / "out", steps=3, progress=kill)
    with pytest.raises(OutputError, match="belongs to another tuning"):
        tune(given, data=DATA, module=fresh(), out=tmp_path / "out", steps=4, resume=True)


def test_the_best_by_validation_is_taken():
    validation = {"t0": DATA["t0"][:1], "t1": DATA["t1"][:1]}
    found = learn("adamerging", steps=12, descent=Descent("adam", lr=0.3, steps=12), validation=validation, every=1)
    seen = [row["validation"] for row in found.curve]
    assert found.best is not None
    assert found.best[0] == min(seen)


@pytest.mark.parametrize("turns", [False, True])
def test_losses_and_validation_are_one_measure(turns: bool):
    first = {t: list(batches[:1]) for t, batches in DATA.items()}
    descent = Descent("adam", lr=0.05, steps=2, accumulate=2)
    free = {"weight": Free(start=0.3)}
    how = Setting(free=free, objective=Labels(), descent=descent, method=("task_arithmetic",), turns=turns)
    same = {t: list(batches) for t, batches in first.items()}
    found = learn(how, None, data=first, validation=same, every=1, descent=descent)
    for row in found.curve[:2]:
        assert row["loss"] == pytest.approx(row["validation"], rel=1e-6)
        assert row["loss"] == pytest.approx((row["loss t0"] + row["loss t1"]) / 2, rel=1e-6)


def test_controls_stand_beside_the_result_and_the_module_keeps_it():
    module = fresh()
    validation = {t: task(i + 1, 6)[4:] for i, t in enumerate(DATA)}
    found = learn({"weight": Free(start=0.3)}, Labels(), steps=15, validation=validation, every=5, module=module,
                  descent=Descent("adam", lr=0.05, steps=15))  # fmt: skip
    tuned, untuned, searched, random = found.controls
    assert found.best is not None
    assert tuned.loss == pytest.approx(found.best[0], rel=1e-6)
    assert tuned.loss < untuned.loss
    assert searched.name.startswith("task arithmetic, lambda ")
    assert tuned.loss < random.loss
    assert all(c.low <= c.loss <= c.high for c in found.controls)
    want = merged(dict(found.coefficients["weight"]))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-5, atol=1e-6)


def test_random_changes_keep_every_magnitude():
    from weightsmith.io.read.source import MemorySource
    from weightsmith.tune.controls import RandomSigns

    base, model = MemorySource(BASE.state_dict(), "base"), MemorySource(EXPERTS["e0"], "e0")
    drawn = RandomSigns(model, base, "e0")
    change, true = (s.read("layers.1.weight") - base.read("layers.1.weight") for s in (drawn, model))
    torch.testing.assert_close(change.abs(), true.abs(), rtol=1e-5, atol=1e-6)
    assert 0.2 < float((change * true > 0).float().mean()) < 0.8
    assert torch.equal(drawn.read("layers.1.weight", 2, 5), drawn.read("layers.1.weight")[2:5])


# --- what is asked wrongly -----------------------------------------------------------------------


def test_an_objective_by_its_name():
    assert learn("adamerging", "labels").curve == learn("adamerging", Labels()).curve
    assert learn({"weight": Free()}, "labels").curve == learn({"weight": Free()}, Labels()).curve
    assert learn("adamerging", "labels").curve != learn("adamerging").curve


def test_what_is_asked_wrongly_is_one_line_each():
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": {}}, SourceError, r"^tune needs data: task -> batches$"),
        ({"data": {"t0": []}}, SourceError, r"^data of t0: no batch in it$"),
        ({"space": {"weight": Free()}, "objective": Labels(), "data": {"t0": [torch.zeros(2, 4)]}}, SourceError,
         r"needs labels, and the batch has none$"),
        ({"validation": {"t0": DATA["t0"]}}, SourceError, r"^validation of t0 is the data that is learned from"),
        ({"validation": {"t9": DATA["t0"]}}, SourceError, r"^validation of t9, which is not among the tasks"),
        ({"space": {"density": Free()}, "objective": Entropy(), "recipe": {"method": "ties"}}, RecipeError,
         r"^free: density is not learned by gradients: .*; try several numbers in a sweep$"),
        ({"space": {"wieght": Free()}, "objective": Entropy()}, RecipeError,
         r"has a parameter 'wieght'; did you mean 'weight'\?$"),
        ({"space": {"weight": Free(per="chunk", parts=2)}, "objective": Entropy()}, RecipeError,
         r"put the filter 'scale' before the method and free its 'factor'$"),
        ({"space": "adamergin"}, RecipeError, r"^unknown preset 'adamergin'; did you mean 'adamerging'\?$"),
        ({"objective": "entrpy"}, RecipeError, r"^unknown objective 'entrpy'; did you mean 'entropy'\?$"),
        ({"objective": Entropy}, RecipeError, r"^objective should be a name or an Objective, as Entropy\(\), is "),
        ({"space": 123}, RecipeError, r"^space should be a preset by name or value, or parameter -> Free, is 123$"),
        ({"space": {"weight": 3}}, RecipeError, r"^space: weight should be a Free, as Free\(per='layer'\), is 3$"),
        ({"data": 5}, RecipeError, r"^data should be task -> batches, as {'math': \[batch, batch\]}, is 5$"),
        ({"data": {"t0": 5}}, RecipeError, r"^data of t0 should be a sequence of batches, is 5$"),
        ({"module": 5}, RecipeError, r"^module should be a torch module, the base model, is 5$"),
        ({"every": 0}, RecipeError, r"^every = 0 is outside \[1, inf\)$"),
        ({"function": {"t0": 3}}, RecipeError, r"^function of t0 should be callable, is 3$"),
        ({"module": torch.nn.Bilinear(2, 2, 2)}, PlanError, r"no parameter with a name of the base checkpoint"),
    ]  # fmt: skip
    for given, kind, text in cases:
        with pytest.raises(kind, match=text):
            learn(**given)


@pytest.mark.parametrize(
    ("free", "text"),
    [
        ({"start": 1.0, "link": "sigmoid"}, r"^free: start 1 is outside \(0, 1\), the range of sigmoid$"),
        ({"start": 2.0, "high": 1.0}, r"^free: start 2 is outside \[-inf, 1\]$"),
        ({"per": "row"}, r"^free: per 'row' is unknown"),
        ({"per": "chunk", "link": "softmax"}, r"^free: link softmax is over the models"),
        ({"link": "softmax", "shared": True}, r"^free: link softmax is over the models"),
        ({"per": "entry", "link": "concrete"}, r"^free: link concrete is one mask for all models"),
        ({"temperature": 0.0}, r"^free: temperature = 0 is not above 0$"),
        ({"link": "sigmod"}, r"^free: link 'sigmod' is unknown; did you mean 'sigmoid'\?$"),
    ],
)
def test_a_wrong_space(free: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        Free(**free)


def test_a_regression_has_no_entropy():
    with pytest.raises(SourceError, match=r"the model has one output \(a regression\?\)"):
        learn(function=lambda module, batch: module(batch[0])[:, :1])


def test_a_loss_that_is_no_number_says_where_and_keeps_the_step_before(tmp_path: Path):
    data = {
        "t0": DATA["t0"],
        "t1": [*DATA["t1"][:2], (torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.int64))],
    }
    with pytest.raises(
        NumericError, match=r"^step 3: the loss of t1 is nan at its batch 3; the numbers of the step before"
    ):
        learn(steps=5, data=data, out=tmp_path)
    assert (tmp_path / "journal.safetensors").exists()


# --- experts as teachers -------------------------------------------------------------------------

TAUGHT = {f"e{i}": batches for i, batches in enumerate(DATA.values())}
"""Tasks bear the names of their experts."""


class Answers(dict[str, Any]):
    pass


def with_states(module: Any, batch: Any) -> Answers:
    first = module.layers[0](batch[0]).tanh()
    return Answers(logits=module(batch[0]), hidden_states=(batch[0], first))


@pytest.mark.parametrize("top", [0, 1])
def test_one_expert_is_reached(top: int):
    given = {"models": {"e0": EXPERTS["e0"]}, "data": {"e0": DATA["t0"]}, "function": with_states, "exclude": ()}
    steps = Descent("adamw", lr=0.5, steps=40)
    preset = named(Preset)["expert_merging"](exclude=(), pull=0.0, top=top, layers=(1,))  # type: ignore[call-arg]
    given.pop("exclude")
    found = learn(preset, descent=steps, **given)
    values = torch.cat([v.flatten() for v in found.coefficients["factor"].values()])
    assert bool((values > 0.1).all())
    assert found.curve[-1]["loss"] < 0.25 * found.curve[0]["loss"]


def test_a_strong_pull_keeps_the_start():
    preset = named(Preset)["expert_merging"](exclude=(), pull=1e4)  # type: ignore[call-arg]
    found = learn(preset, data=TAUGHT, descent=Descent("sgd", lr=1e-5, steps=5), function=with_states)
    for values in found.coefficients["factor"].values():
        torch.testing.assert_close(values, torch.full_like(values, 0.1), rtol=0, atol=0.05)


def test_chunks_are_learned_apart_and_some_stay():
    chunks = {"head*": 0, "layers.0*": 3, "*": 1}
    preset = named(Preset)["expert_merging_pp"](exclude=(), pull=0.0, chunks=chunks)  # type: ignore[call-arg]
    found = learn(preset, data=TAUGHT, descent=Descent("adamw", lr=0.3, steps=6, accumulate=2), function=with_states)
    factor = found.coefficients["factor"]
    assert {n: list(v.shape) for n, v in factor.items() if "bias" not in n} == {
        "layers.0.weight": [2, 3], "layers.1.weight": [2, 1], "head.weight": [2]
    }  # fmt: skip
    assert factor["head.weight"].tolist() == pytest.approx([0.1, 0.1])
    assert len(set(factor["layers.0.weight"].flatten().tolist())) == 6


def test_answers_of_experts_are_asked_once_and_kept(tmp_path: Path):
    calls: list[int] = []

    def counted(module: Any, batch: Any) -> Answers:
        calls.append(1)
        return with_states(module, batch)

    preset = named(Preset)["expert_merging"](exclude=(), steps=2, accumulate=1)  # type: ignore[call-arg]
    given: dict[str, Any] = {"data": TAUGHT, "function": counted, "out": tmp_path}
    given |= {"models": None, "base": None, "recipe": recipe(tmp_path), "out": tmp_path / "out"}
    once = learn(preset, descent=Descent("adamw", lr=0.1, steps=2), **given)
    assert len(calls) == 8 + 2
    calls.clear()
    again = learn(preset, descent=Descent("adamw", lr=0.1, steps=2), overwrite=True, **given)
    assert len(calls) == 2
    calls.clear()
    learn(preset, descent=Descent("adamw", lr=0.1, steps=2), overwrite=True, **{**given, "data": {"e0": DATA["t1"]}})
    assert len(calls) == 4 + 2
    assert all(torch.equal(v, again.coefficients["factor"][n]) for n, v in once.coefficients["factor"].items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": DATA}, r"^imitate: no model is called 't0', the name of a task"),
        ({"layers": (7,)}, r"^imitate: hidden state 7 is outside \[0, 1\]$"),
        ({"function": lambda module, batch: module(batch[0]), "layers": (1,)}, r"the model gives no hidden states"),
    ],
)
def test_a_wrong_teacher(change: dict[str, Any], text: str):
    options = {"layers": change.pop("layers", ()), "exclude": ()}
    given: dict[str, Any] = {"data": TAUGHT, "function": with_states, **change}
    with pytest.raises(SourceError, match=text):
        learn(named(Preset)["expert_merging"](**options), **given)


# --- aTLAS and Self Positioning -------------------------------------------------------------------


def test_no_coefficients_are_the_base_and_labels_teach():
    untouched = learn("atlas", descent=Descent("adamw", steps=0))
    assert all(bool((v == 0).all()) for v in untouched.coefficients["weight"].values())
    found = learn("atlas", descent=Descent("adamw", lr=0.05, steps=20, clip=1.0))
    assert found.curve[-1]["loss"] < found.curve[0]["loss"]


def test_groups_concern_matrices_only():
    found = learn("atlas", descent=Descent("adamw", lr=0.05, steps=2), partition=3)
    assert {n: list(v.shape) for n, v in found.coefficients["factor"].items()} == {
        "layers.0.weight": [2, 3], "layers.1.weight": [2, 3], "head.weight": [2, 3]
    }  # fmt: skip


def test_a_task_is_forgotten_and_the_other_kept():
    found = learn("atlas", descent=Descent("adamw", lr=0.05, steps=25), goal="negation", target="t0")
    assert found.curve[-1]["loss t0"] < found.curve[0]["loss t0"]  # minus its cross-entropy
    assert found.curve[-1]["loss t1"] < found.curve[0]["loss t1"] + 0.1


def pairs(module: Any, batch: Any) -> Any:
    return module(batch[0]), module(batch[0] + 0.1)


def test_a_position_between_models_and_its_scale():
    found = learn("self_positioning", descent=Descent("sgd", lr=0.05, steps=12, momentum=0.9), function=pairs)
    weights = next(iter(found.coefficients["weight"].values()))
    assert float(weights.sum()) == pytest.approx(1.0)
    assert len({tuple(v.tolist()) for v in found.coefficients["weight"].values()}) == 1
    assert 0 <= float(next(iter(found.coefficients["lambda"].values()))) <= 2
    assert found.recipe["parameters"]["weight"] == dict(zip(EXPERTS, weights.tolist(), strict=True))


def test_one_expert_has_the_whole_weight():
    found = learn("self_positioning", models={"e0": EXPERTS["e0"]}, data={"t0": DATA["t0"]}, function=pairs, steps=3)
    assert next(iter(found.coefficients["weight"].values())).tolist() == [1.0]


# --- Concrete ------------------------------------------------------------------------------------


def test_equal_logits_are_no_mask_and_large_ones_neither():
    plain = {n: b + 0.3 * sum(state[n] - b for state in EXPERTS.values()) for n, b in BASE.state_dict().items()}
    module = fresh()
    learn("concrete", module=module, descent=Descent("adam", steps=0))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), plain[name], rtol=1e-5, atol=1e-6)
    sure = Numbers("factor", Free(per="entry", link="concrete", start=30.0, shared=True), FACTOR, ("a",), KEYS)
    sure.step = 3
    torch.testing.assert_close(sure.values()[0], torch.ones(1, 12))


FACTOR = next(p for p in ws.Scale.parameters() if p.name == "factor")  # type: ignore[attr-defined]
KEYS = [Key("w", (3, 4), "float32")]


def test_a_drawn_mask_has_mean_one_and_a_seed():
    numbers = Numbers("factor", Free(per="entry", link="concrete", start=0.0, shared=True), FACTOR, ("a", "b"), KEYS)
    assert numbers.models == ("",)
    drawn = []
    for step in range(200):
        numbers.step = step
        mask = numbers.values()[0].detach()
        assert float(mask.mean()) == pytest.approx(1.0, abs=1e-5)
        drawn.append(mask)
    assert float(torch.stack(drawn).mean(0).std()) < 0.15
    numbers.step = 5
    assert torch.equal(numbers.values()[0], drawn[5])
    assert not torch.equal(drawn[5], drawn[6])


def test_a_mask_is_learned_against_a_conflict():
    found = learn("concrete", descent=Descent("adam", lr=0.1, steps=25))
    losses = [row["loss"] for row in found.curve]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {n: list(v.shape) for n, v in found.coefficients["factor"].items()}["layers.1.weight"] == [1, 64]


# --- presets and objectives ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(named(Preset)))
def test_every_preset_is_a_value_that_learns(name: str):
    """Registered means tested: the first step lowers the loss on its own data."""
    cls = named(Preset)[name]
    assert cls.help().endswith(".")
    assert eval(repr(cls()), {cls.__name__: cls}) == cls()
    setting = cls().setting(tuple(EXPERTS))
    assert setting.objective.help()


def test_both_kinds_are_listed():
    assert {"adamerging", "adamerging_pp"} <= set(named(Preset))
    assert {"entropy", "labels", "forget", "contrast"} <= set(named(Objective))
