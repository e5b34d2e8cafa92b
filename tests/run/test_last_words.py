"""What a plan and a finished run say of models and settings that are allowed and yet not what one would want."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kit
from kit import texts
from weightsmith.cli.main import main
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.merge import run
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.load import loads

State = dict[str, Tensor]
UP, DOWN, EMBED, HEAD, NORM = (
    *(f"model.layers.0.mlp.{side}_proj.weight" for side in ("up", "down")),
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
)
SHAPES = {EMBED: (14, 8), UP: (12, 8), DOWN: (8, 12), NORM: (8,), HEAD: (14, 8)}

state = partial(kit.state, SHAPES)


BASE = state(0)


def moved(seed: int, scale: float = 0.1) -> State:
    return {name: BASE[name] + change for name, change in state(seed, scale).items()}


def recipe(method: Any, names: Any = "ab", **more: Any) -> Any:
    stages = method if isinstance(method, list) else [method]
    return loads(json.dumps({"base": "base", "models": {n: n for n in names}, "method": stages, **more}))


def inputs(models: dict[str, State], base: State = BASE) -> Inputs:
    return Inputs(MemorySource(base, "base"), {n: MemorySource(m, n) for n, m in models.items()})


def said(
    tmp_path: Path, method: Any, models: dict[str, State], base: State = BASE, of: Code | None = None, **more: Any
) -> list[str]:
    """The warnings of a run, or those of one code."""
    made = run(recipe(method, models, **more), tmp_path / "out", sources=inputs(models, base))
    return texts(warning for warning in made.warnings if of in (None, warning.code))


def merged(tmp_path: Path) -> State:
    return load_file(tmp_path / "out" / "model.safetensors")


def covered(method: Any, models: dict[str, State]) -> dict[str, int]:
    plan = make_plan(recipe(method, models), sources=inputs(models))
    return {c.description: c.tensors for c in plan.coverage}


# --- tensors that a method leaves out --------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsvm", "r_tsvm"])
def test_matrices_too_small_for_so_many_models_are_named_in_the_plan(method: str, tmp_path: Path) -> None:
    models = {f"e{i}": moved(i + 1) for i in range(9)}  # 8 rows or columns at most
    why = f"({method} does not cover matrices too small for a triplet of every model)"
    found = covered(method, models)
    assert found == {
        f"merged by task_arithmetic {why}": 4,
        f"merged by task_arithmetic ({method} does not cover 1-D tensors)": 1,
    }
    eight = dict(list(models.items())[:8])
    assert covered(method, eight)[f"merged by {method}"] == 4
    run(recipe({method: {"scaling": 0.5}}, models), tmp_path / "out", sources=inputs(models))
    mean = sum(model[UP] - BASE[UP] for model in models.values()) / 9
    assert torch.allclose(merged(tmp_path)[UP], BASE[UP] + 0.5 * mean, atol=1e-6)


@pytest.mark.parametrize("method", [{"tsvm": {"rank_fraction": 0.1}}, {"r_tsvm": {"rank_min": 5}}])
def test_ranks_that_leave_no_triplet(method: dict[str, Any]) -> None:
    """int(0.1 * 8) is 0, and 2 models of 5 triplets do not fit into 8."""
    (name,) = method
    found = covered(method, {"a": moved(1), "b": moved(2)})
    why = f"({name} does not cover matrices too small for a triplet of every model)"
    assert found[f"merged by task_arithmetic {why}"] == 4


@pytest.mark.parametrize("wanted", [False, True])
def test_doge_merges_the_body_and_leaves_embeddings_and_head(wanted: bool, tmp_path: Path) -> None:
    models = {"a": moved(1), "b": moved(2)}
    method = {"doge": {"iters": 2, "embeddings": wanted}}
    assert covered(method, models)["merged by doge"] == (4 if wanted else 2)
    said(tmp_path, method, models)
    got = merged(tmp_path)
    same = {name for name in SHAPES if torch.equal(got[name], BASE[name])}
    assert same == ({NORM} if wanted else {NORM, EMBED, HEAD})
    if not wanted:  # and the masks count nothing else: 30% of the entries of the two matrices
        alone = {n: {UP: m[UP], DOWN: m[DOWN]} for n, m in models.items()}
        said(tmp_path / "alone", method, alone, {UP: BASE[UP], DOWN: BASE[DOWN]})
        assert all(torch.equal(merged(tmp_path / "alone")[name], got[name]) for name in (UP, DOWN))


@pytest.mark.parametrize("method", ["tsvm", "r_tsvm", "doge", "ties", "pcb", "opcm", "widen", "dare", "consensus"])
def test_where_no_model_can_be_opened_that_is_the_problem(method: str) -> None:
    problem = Problem(Code.INPUT, "a", "a: does not exist")
    nothing = Inputs(MemorySource(BASE, "base"), {}, problems=(problem,))
    found = make_plan(recipe(method, "a"), sources=nothing, strict=False).problems
    assert found == (problem,)


# --- models that are the base ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("opcm", "opcm: still is equal to the base: its norm of 0 lowers the mean that the result is scaled to"),
        ("pcb", "pcb: still has no weight: its changes are all of one size, as those of a model equal to the base"),
        ({"pcb": {"scope": "tensor"}}, "pcb: still has no weight: its changes are all of one size, as those of a "
                                       "model equal to the base"),
        ("widen", "widen: still is equal to the base: it only lowers the scores of the others; leave it out"),
    ],
)  # fmt: skip
def test_a_model_equal_to_the_base_is_named(method: Any, text: str, tmp_path: Path) -> None:
    """By its values: it may be stored in another dtype, or be made in memory."""
    base = {n: t.bfloat16().float() for n, t in BASE.items()}
    still = {n: t.bfloat16() for n, t in base.items()}
    assert text in said(tmp_path, method, {"a": moved(1), "still": still, "b": moved(2)}, base)
    nearly = {**still, NORM: base[NORM] + torch.arange(8.0)}
    assert text not in said(tmp_path / "other", method, {"a": moved(1), "still": nearly, "b": moved(2)}, base)


# --- figures of methods ----------------------------------------------------------------------------


def test_widen_tells_its_largest_sum_of_scores(tmp_path: Path) -> None:
    three = dict.fromkeys("abc", moved(1))
    (text, _) = said(tmp_path, "widen", three)  # and that the merged change is three times as long
    assert text.startswith("widen: scores add up to at most 3 (model.")
    assert text.endswith("; above 1 large changes in common overshoot")
    nothing = {"widen": {"above_average_value_ratio": 1e9}}  # scores are shares
    assert said(tmp_path / "shares", nothing, {"a": moved(1), "b": moved(2)}) == []


def test_doge_tells_what_it_protects(tmp_path: Path) -> None:
    models = {"a": moved(1), "b": moved(2)}
    method = {"doge": {"iters": 0, "density": 1.0, "lambda": 0.5, "subspace": 9}}
    assert f"doge: subspace = 9 protects no direction of {UP} and 1 more" in said(tmp_path, method, models)
    assert "protects" not in str(said(tmp_path / "some", {"doge": {"iters": 0, "subspace": 8}}, models))


def test_r_tsvm_tells_of_changes_that_precision_destroyed_and_of_capped_weights(tmp_path: Path) -> None:
    models = {"a": moved(1), "tiny": moved(2, 3e-3)}
    coarse = {n: torch.where(torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) < 0.95, BASE[n], t)
              for n, t in models["tiny"].items()}  # fmt: skip
    for tensor in (UP, DOWN, EMBED, HEAD):
        assert 0.9 < float((coarse[tensor] == BASE[tensor]).float().mean()) < 1
    least = min(float((coarse[n] == BASE[n]).float().mean()) for n in (UP, DOWN, EMBED, HEAD))
    (text,) = said(tmp_path, "r_tsvm", {**models, "tiny": coarse})
    assert text.startswith(f"r_tsvm: at least {least:.1%} of the changes of tiny are zero in every matrix")
    spiky = moved(4)
    spiky[UP] += 10 * torch.eye(12, 8)
    capped = {"r_tsvm": {"weight_cap": 1.5, "outlier_sigma": 2.0}}
    plain = moved(5)
    plain[UP] = BASE[UP] + 0.1  # without an outlier, so its weight would be 0
    (text,) = said(tmp_path / "capped", [capped], {"a": spiky, "b": plain}, rules=[
        {"match": [EMBED, DOWN, HEAD], "method": "keep"}])  # fmt: skip
    assert text == "r_tsvm: weight_cap = 1.5 held weights back in 1 of 1 matrices"


@pytest.mark.parametrize("kernels", [True, False])
def test_ties_tells_the_share_that_is_left_where_trimming_bites_on_zeros(
    kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    sparse = {n: t.clone() for n, t in BASE.items()}
    sparse[UP][0] += 1  # 8 of 424 weights
    models = {"a": moved(1), "sparse": sparse}
    share = 8 / sum(t.numel() for t in BASE.values())
    assert said(tmp_path, "ties", models) == [
        f"ties: density = 0.2 trims nothing of sparse: of its changes only {share:.2%} are not 0"
    ]
    assert torch.equal(merged(tmp_path)[UP][1:] != BASE[UP][1:], (models["a"][UP] - BASE[UP])[1:].abs() >= _cut(models))
    assert said(tmp_path / "more", {"ties": {"density": 0.01}}, models) == []


def _cut(models: dict[str, State]) -> float:
    sizes = torch.cat([(models["a"][n] - BASE[n]).abs().flatten() for n in BASE]).sort(descending=True).values
    return float(sizes[int(len(sizes) * 0.2)])


# --- random drops of large changes -----------------------------------------------------------------


def small(scale: float) -> tuple[State, dict[str, State]]:
    """Weights of 1, changes of a thousandth, and changes of up to `scale`."""
    made = torch.Generator().manual_seed(1)
    near, far = 1e-3 * torch.randn(400, 50, generator=made), scale * torch.rand(400, 50, generator=made)
    return {"w": torch.ones(400, 50)}, {"a": {"w": 1 + near}, "far": {"w": 1 + far}}


@pytest.mark.parametrize("method", ["dare", "della", ["dare", {"ties": {"density": 1.0}}]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_drops_of_large_changes_are_warned_of(method: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    base, models = small(0.2)
    stored = {n: {"w": m["w"].to(dtype)} for n, m in models.items()}
    name = method[0] if isinstance(method, list) else method
    (text,) = said(tmp_path, method, stored, {"w": base["w"].to(dtype)}, Code.CHANGE)
    assert text.startswith(f"far has changed much for {name}: by 0.1 of the base's weights on average, 1% of them by ")
    assert said(tmp_path / "plain", "task_arithmetic", stored, {"w": base["w"].to(dtype)}, Code.CHANGE) == []


@pytest.mark.parametrize(("scale", "told"), [(0.0101 / 0.99, True), (0.0099 / 0.99, False)])
def test_the_99_percent_quantile_alone_may_be_too_large(scale: float, told: bool, tmp_path: Path) -> None:
    base, models = small(scale)
    assert bool(said(tmp_path, "dare", models, base, Code.CHANGE)) == told


@pytest.mark.parametrize(("change", "told"), [(5.1e-5, True), (4.9e-5, False)])
def test_the_ratio_alone_may_be_too_large(change: float, told: bool, tmp_path: Path) -> None:
    base = {"w": torch.full((40, 5), 1e-3)}
    assert bool(said(tmp_path, "dare", {"a": {"w": base["w"] + change}}, base, Code.CHANGE)) == told


def test_the_command_line_shows_them_and_the_record_keeps_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, models = small(0.5)
    for name, tensors in {"base": base, **models}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    written = {"base": "base.safetensors", "models": {n: f"{n}.safetensors" for n in models}, "method": "dare"}
    for seed in (0, 7):
        (tmp_path / "recipe.yaml").write_text(json.dumps(written | ({"seed": seed} if seed else {})))
        assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / f"out{seed}")]) == 0
        assert "far has changed much for dare" in capsys.readouterr().err
        assert json.loads((tmp_path / f"out{seed}" / "weightsmith.json").read_text())["seed"] == seed
    outs = [load_file(tmp_path / f"out{seed}" / "model.safetensors")["w"] for seed in (0, 7)]
    assert not torch.equal(*outs)
