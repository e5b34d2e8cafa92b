"""Checkpoints of one run: which ones, their logged values, their weights, and the average that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapter, deltas, llama, loaded, quiet
from safetensors.torch import load_file

from kit import texts
from weightsmith import lora
from weightsmith.core.errors import PlanError, RecipeError, SourceError, WeightsmithError
from weightsmith.io.read.trainer import checkpoints, logged, select

with quiet():
    from transformers.trainer_callback import TrainerState

LOSS = {100: 4.0, 200: 2.0, 300: 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 300 steps that logs every 50 and saves every 100, its logs written by transformers."""
    folder = tmp_path_factory.mktemp("run")
    state = TrainerState(max_steps=300, logging_steps=50)
    for step in range(50, 301, 50):
        state.log_history.append({"step": step, "epoch": step / 300, "loss": LOSS.get(step, 10.0), "grad_norm": 1.0})
        if step in LOSS:
            state.log_history.append({"step": step, "epoch": step / 300, "eval_loss": LOSS[step] / 2})
            state.global_step = step
            config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
            adapter(folder / f"checkpoint-{step}", llama, step, **config)
            state.save_to_json(str(folder / f"checkpoint-{step}" / "trainer_state.json"))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_values_are_those_logged(run: Path) -> None:
    found = checkpoints(run)
    assert list(found) == [100, 200, 300]
    assert [logged(path, "loss") for path in found.values()] == [4.0, 2.0, 1.0]
    assert [logged(path, "eval_loss") for path in found.values()] == [2.0, 1.0, 0.5]
    assert logged(found[200], "loss", since=100) == 6.0  # of 10 at 150 and 2 at 200


WEIGHTS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [1 / 7, 2 / 7, 4 / 7]),
    ({"penalty": 0.0}, [1 / 3] * 3),
    ({"penalty": 2.0}, [1 / 21, 4 / 21, 16 / 21]),
    ({"penalty": 1e6}, [0.0, 0.0, 1.0]),
    ({"metric": "steps"}, [1 / 6, 2 / 6, 3 / 6]),
    ({"rule": "rank"}, [1 / 6, 2 / 6, 3 / 6]),
    ({"source": "eval"}, [1 / 7, 2 / 7, 4 / 7]),
    ({"smooth": "since"}, [x / (1 / 7 + 1 / 6 + 1 / 5.5) for x in (1 / 7, 1 / 6, 1 / 5.5)]),  # means of two entries
    ({"last": 2}, [1 / 3, 2 / 3]),
    ({"steps": (100, 200)}, [1 / 3, 2 / 3]),
    ({"every": 2}, [1 / 5, 4 / 5]),
]


@pytest.mark.parametrize(("given", "want"), WEIGHTS)
def test_weights(run: Path, tmp_path: Path, given: dict[str, Any], want: list[float]) -> None:
    result = lora.average(run, tmp_path / "out", **given)
    assert list(result.weights.values()) == pytest.approx(want, abs=1e-8)
    steps = [int(name.partition("-")[2]) for name in result.weights]
    made = tensors(tmp_path / "out")
    parts = [tensors(run / f"checkpoint-{step}") for step in steps]
    for name, tensor in made.items():
        exact = sum(w * part[name].double() for w, part in zip(want, parts, strict=True))
        assert torch.allclose(tensor.double(), exact, atol=1e-6), name


def test_the_average_keeps_the_runs_configuration(run: Path, tmp_path: Path) -> None:
    lora.average(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6, ["q_proj"])
    assert config["modules_to_save"] == ["lm_head"]
    model = loaded(llama, {"x": tmp_path / "out"})
    mean = tensors(tmp_path / "out")["base_model.model.lm_head.weight"]
    assert torch.equal(model.state_dict()["base_model.model.lm_head.modules_to_save.x.weight"], mean)


def test_products_are_averaged_at_the_runs_rank_or_more(run: Path, tmp_path: Path) -> None:
    lora.average(run, tmp_path / "all", space="product", rank=9)
    want = [deltas(loaded(llama, {"x": run / f"checkpoint-{s}"}), "x") for s in LOSS]
    for name, tensor in deltas(loaded(llama, {"x": tmp_path / "all"}), "x").items():
        exact = sum(w * found[name] for w, found in zip((1 / 7, 2 / 7, 4 / 7), want, strict=True))
        assert torch.allclose(tensor, exact, atol=1e-6)
    cut = lora.average(run, tmp_path / "cut", space="product")
    assert cut.rank == 3
    assert all(m.error == pytest.approx((1 - m.energy) ** 0.5, rel=1e-3) and m.error > 0.1 for m in cut.modules)


def test_equal_factors_a_make_both_spaces_equal(run: Path, tmp_path: Path) -> None:
    paths = {}
    for i in (1, 2):
        paths[f"c{i}"] = adapter(tmp_path / f"checkpoint-{i}", llama, i, r=3, target_modules=["q_proj"])
    first, second = (tensors(p) for p in paths.values())
    second |= {n: t for n, t in first.items() if "lora_A" in n}
    from safetensors.torch import save_file

    save_file(second, paths["c2"] / "adapter_model.safetensors")
    for space in ("factors", "product"):
        lora.merge(paths, "mwa", tmp_path / space, value=(1.0, 2.0), space=space)
    one, other = (deltas(loaded(llama, {"x": tmp_path / s}), "x") for s in ("factors", "product"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-6)


def test_average_is_the_plain_mean(run: Path, tmp_path: Path) -> None:
    paths = {f"c{step}": run / f"checkpoint-{step}" for step in LOSS}
    assert set(lora.merge(paths, "average", tmp_path / "out").weights.values()) == {1 / 3}


@pytest.mark.parametrize("method", ["average", "linear"])
def test_factors_that_do_not_belong_together_are_said(run: Path, tmp_path: Path, method: str) -> None:
    """A and B of independent adapters, combined by themselves, are far from the sum of the changes."""
    paths = {f"c{i}": adapter(tmp_path / f"c{i}", llama, i, r=3, target_modules=["q_proj"]) for i in (1, 2)}
    made = lora.merge(paths, method, tmp_path / "out")
    share = 0.5 if method == "average" else 1.0
    first, second, got = (deltas(loaded(llama, {"x": p}), "x") for p in (*paths.values(), tmp_path / "out"))
    far = []
    for name, tensor in got.items():
        want = share * (first[name] + second[name])
        far.append(float((tensor - want).norm() / want.norm()))
    assert sorted(m.error for m in made.modules) == pytest.approx(sorted(far), rel=1e-3)
    (warning,) = texts(made.warnings)
    assert f"{max(far):.0%} off the sum of the weighted changes" in warning
    again = adapter(tmp_path / "again", llama, 1, r=3, target_modules=["q_proj"])
    alike = lora.merge({"a": paths["c1"], "b": again}, "average", tmp_path / "same")
    assert alike.worst < 1e-6
    assert not any("off the sum" in text for text in texts(alike.warnings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": -1.0}, r"rule power needs values above 0, not -1 \(model 2 of 2\); use rule softmax or rank"),
        ({"loss": float("nan")}, "loss at step 300 is nan; leave this checkpoint out"),
        ({"loss": "low"}, "loss at step 300 is 'low', not a number"),
        ({"step": True}, "an entry of log_history has step True"),
    ],
)
def test_logs_that_cannot_be_used(run: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    copy = tmp_path / "checkpoint-300"
    copy.mkdir()
    for path in (run / "checkpoint-300").iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    state = json.loads((copy / "trainer_state.json").read_text())
    state["log_history"][-2] |= change
    (copy / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(WeightsmithError, match=message) as caught:
        lora.merge({"a": run / "checkpoint-100", "b": copy}, "mwa", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_step_without_a_log(run: Path, tmp_path: Path) -> None:
    late = tmp_path / "checkpoint-900"
    late.mkdir()
    (late / "trainer_state.json").write_bytes((run / "checkpoint-300/trainer_state.json").read_bytes())
    with pytest.raises(SourceError, match=r"no loss logged for step 900 \(the nearest before is of step 300\)"):
        logged(late, "loss")
    near = late.rename(tmp_path / "checkpoint-320")  # within one logging interval
    assert logged(near, "loss") == 1.0
    (near / "trainer_state.json").unlink()
    with pytest.raises(SourceError, match=r"no trainer_state\.json in it or beside it"):
        logged(near, "loss")
    (tmp_path / "trainer_state.json").write_bytes((run / "checkpoint-300/trainer_state.json").read_bytes())
    assert logged(near, "loss") == 1.0  # the run's own


def test_selections(run: Path, tmp_path: Path) -> None:
    found = {step: Path(str(step)) for step in range(10, 101, 10)}
    assert [int(p.name) for p in select(found, last=3)] == [80, 90, 100]
    assert [int(p.name) for p in select(found, every=4)] == [20, 60, 100]
    assert [int(p.name) for p in select(found, 2, 3, (20, 70))] == [40, 70]
    with pytest.raises(SourceError, match=r"1 of the 10 checkpoints .* an average needs two"):
        select(found, last=1)
    with pytest.raises(SourceError, match="no folders checkpoint-N in it"):
        checkpoints(tmp_path)


def test_a_checkpoint_without_an_adapter_is_named(run: Path, tmp_path: Path) -> None:
    for step in LOSS:
        (tmp_path / f"checkpoint-{step}").symlink_to(run / f"checkpoint-{step}")
    (tmp_path / "checkpoint-400").mkdir()
    (tmp_path / "best_model").symlink_to(run / "checkpoint-100")  # a copy of one; no checkpoint by its name
    with pytest.raises(SourceError, match=r"checkpoint-400: no LoRA adapter here"):
        lora.average(tmp_path, tmp_path / "out")
    (tmp_path / "checkpoint-400").rmdir()
    assert list(lora.average(tmp_path, tmp_path / "out").weights) == [f"checkpoint-{step}" for step in LOSS]
    assert not (tmp_path / "out" / "trainer_state.json").exists(), "training cannot go on from an average"


def test_a_checkpoint_that_is_listed_twice(run: Path, tmp_path: Path) -> None:
    here, there = run / "checkpoint-100", tmp_path / "best_model"
    there.symlink_to(here)
    for method in ("mwa", "average"):
        with pytest.raises(PlanError, match=r"b is the same checkpoint as a \(.*best_model\); leave one out"):
            lora.merge({"a": here, "b": there}, method, tmp_path / "out")
    made = lora.merge({"a": here, "b": there}, "cat", tmp_path / "out", saved="average")
    assert made.warnings[0].text == "b is the same adapter as a: the two count twice"


def test_adapters_of_unlike_runs(run: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "alpha", llama, 1, r=3, lora_alpha=1, target_modules=["q_proj"])
    wide = adapter(tmp_path / "wide", llama, 1, r=4, lora_alpha=8, target_modules=["q_proj"])
    more = adapter(tmp_path / "more", llama, 1, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    first = run / "checkpoint-100"
    for path, message in (
        (other, "alpha / r is 2 in a and 0.333333 in b: not checkpoints of one run; use space: product"),
        (wide, "rank 3 in a and 4 in b; mwa adds the factors up and needs equal ranks"),
        (more, "a adapts 2 modules, but lacks .*v_proj', which another has: not checkpoints of one run"),
    ):
        with pytest.raises(PlanError, match=message):
            lora.merge({"a": first, "b": path}, "mwa", tmp_path / "out", value=(1.0, 2.0))
    same = adapter(tmp_path / "same", llama, 1, r=3, lora_alpha=6, target_modules=["q_proj"])
    result = lora.merge({"a": first, "b": same}, "mwa", tmp_path / "out", value=(1.0, 2.0))
    assert any("mean something within one run only" in text for text in texts(result.warnings))
    with pytest.raises(RecipeError, match="mwa by score needs the value of each checkpoint"):
        lora.merge({"a": first, "b": same}, "mwa", tmp_path / "no", metric="score")
    with pytest.raises(RecipeError, match="rank with space: product only"):
        lora.merge({"a": first, "b": same}, "mwa", tmp_path / "no", rank=2)
