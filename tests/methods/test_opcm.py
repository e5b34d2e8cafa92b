"""Continual merging: laws, the full formula, and going on from an earlier result."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from driver import merge
from safetensors.torch import load_file, save_file
from torch import Tensor

import kit
from kit import texts
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.methods.opcm import Opcm
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

SHAPES = {
    "embed_tokens.weight": (20, 6),
    "layers.0.up_proj.weight": (9, 7),
    "lm_head.weight": (20, 6),
    "norm.weight": (7,),
}

state = partial(kit.state, SHAPES)


BASE = state(0)
TASKS = [state(i + 1, 0.1 * (i + 1)) for i in range(4)]


def experts(tasks: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {f"e{i}": {n: BASE[n] + t[n] for n in BASE} for i, t in enumerate(tasks)}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors.values()]).norm())


def changes(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: merged[n] - BASE[n] for n in BASE}


def by_the_book(tasks: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Step by step with full square bases, rescaled after every model."""
    merged, scale, norms = {n: t.double() for n, t in tasks[0].items()}, 1.0, [norm(tasks[0])]
    for task in tasks[1:]:
        norms.append(norm(task))
        for name, t in task.items():
            d = t.double()
            if name in ("layers.0.up_proj.weight", "lm_head.weight"):
                u, s, vt = torch.linalg.svd(merged[name], full_matrices=True)
                share = s.cumsum(0) / s.sum()
                r = int((share > alpha).int().argmax())
                p = u.T @ d @ vt.T
                p.diagonal().zero_()
                p[:r, :r] = 0
                d = u @ p @ vt
            merged[name] = scale * merged[name] + d
        length, mean = norm(merged), sum(norms) / len(norms)
        merged = {n: m * mean / length for n, m in merged.items()}
        scale = length / mean
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.95])
def test_the_thin_formula_is_the_full_one(alpha):
    got = changes(merge(experts(TASKS), "opcm", base=BASE, alpha=alpha))
    want = by_the_book(TASKS, alpha)
    for name in BASE:
        assert torch.allclose(got[name].double(), want[name], atol=1e-6), name


def test_one_model_comes_back():
    got = merge(experts(TASKS[:1]), "opcm", base=BASE)
    assert all(torch.allclose(got[n], BASE[n] + TASKS[0][n], atol=1e-6) for n in BASE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_norm_is_the_mean_norm(count):
    merged = changes(merge(experts(TASKS[:count]), "opcm", base=BASE))
    wanted = sum(norm(t) for t in TASKS[:count]) / count
    assert norm(merged) == pytest.approx(wanted, rel=1e-5)


def test_more_of_the_same_keeps_its_direction():
    task = TASKS[0]
    merged = changes(merge(experts([task, {n: 2 * t for n, t in task.items()}]), "opcm", base=BASE))
    name = "layers.0.up_proj.weight"
    ratio = merged[name] / task[name]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)


def test_orthogonal_tasks_are_added():
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n))).Q for n in (9, 7))
    one, two = q[:, :3] @ r[:, :3].T, q[:, 3:6] @ r[:, 3:6].T
    name = "layers.0.up_proj.weight"
    models = {f"e{i}": {name: t} for i, t in enumerate([one, two])}
    got = merge(models, "opcm", base={name: torch.zeros(9, 7)}, alpha=0.0)[name]
    factor = float(one.norm()) / float((one + two).norm())
    assert torch.allclose(got, factor * (one + two), atol=1e-5)


def test_the_order_of_the_tensors_does_not_matter():
    turned = {e: dict(reversed(m.items())) for e, m in experts(TASKS).items()}
    got, want = (merge(m, "opcm", base=b) for m, b in ((turned, dict(reversed(BASE.items()))), (experts(TASKS), BASE)))
    assert all(torch.allclose(got[n], want[n], atol=1e-6) for n in BASE)


def test_beyond_the_rank_of_what_is_merged_nothing_is_taken_away():
    """A first change of rank 2, but for rounding, in rows and columns 0 and 1: of the second two entries go."""
    name, first = "layers.0.up_proj.weight", torch.zeros(9, 7)
    first[0, 0], first[1, 1] = 3.0, 2.0
    made = torch.Generator().manual_seed(3)
    first += 1e-7 * torch.randn(9, 7, generator=made)
    second = torch.randn(9, 7, generator=made)
    models = {f"e{i}": {name: t} for i, t in enumerate([first, second])}
    got = merge(models, "opcm", base={name: torch.zeros(9, 7)}, alpha=0.0)[name]
    left = second.clone()
    left[0, 0] = left[1, 1] = 0
    want = first + left
    factor = float(first.norm() + second.norm()) / 2 / float(want.norm())
    assert torch.allclose(got, factor * want, atol=1e-5)


def test_a_first_model_without_changes_takes_nothing_from_the_second():
    got = changes(merge(experts([{n: 0 * t for n, t in TASKS[0].items()}, TASKS[1]]), "opcm", base=BASE))
    assert all(torch.allclose(got[n], TASKS[1][n] / 2, atol=1e-6) for n in BASE)


def test_large_matrices_are_cleaned_as_exactly_and_the_norm_is_nearly_the_mean_norm():
    """Products in float32, and for the norm the bases too."""
    draw = torch.Generator().manual_seed(1)
    name = "layers.0.up_proj.weight"
    base = {name: torch.randn(260, 300, generator=draw)}
    falling = (1 + torch.arange(260.0) / 4)[:, None] ** -0.7
    lefts = [torch.linalg.qr(torch.randn(260, 260, generator=draw)).Q for _ in range(3)]
    models = {f"e{i}": {name: base[name] + left @ (falling * torch.randn(260, 300, generator=draw)) / 60}
              for i, left in enumerate(lefts)}  # fmt: skip
    tasks = [(m[name] - base[name]).double() for m in models.values()]
    total = tasks[0]
    for task in tasks[1:]:
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        rank = int((s.cumsum(0) / s.sum() <= 0.5).sum())
        mask = torch.eye(260, dtype=torch.bool)
        mask[:rank, :rank] = True
        total = total + task - u @ torch.where(mask, u.T @ task @ vt.T, 0.0) @ vt
    found = (merge(models, "opcm", base=base)[name] - base[name]).double()
    along = float((found * total).sum() / (found.norm() * total.norm()))
    assert 1 - along < 1e-9
    assert float(found.norm()) == pytest.approx(sum(float(t.norm()) for t in tasks) / 3, rel=1e-4)


# --- going on --------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Path:
    for name, tensors in {"base": BASE, **experts(TASKS)}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def recipe(there: Path, *names: str, base: str = "base", **parameters: object) -> Recipe:
    models = {n: {"model": str(there / n)} for n in names}
    method = ({"opcm": {"alpha": 0.4, **parameters}},)
    return Recipe.model_validate({"base": str(there / base), "models": models, "method": method})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("first", [1, 2, 3])
def test_models_are_added_to_an_earlier_merge_without_the_earlier_experts(there: Path, first: int) -> None:
    names = [f"e{i}" for i in range(4)]
    run(recipe(there, *names), there / "once", threads=1)
    run(recipe(there, *names[:first]), there / "early", threads=1)
    for name in names[:first]:
        (there / name / "model.safetensors").unlink()
    run(recipe(there, "early", *names[first:]), there / "late", threads=1)
    a, b = weights(there / "once"), weights(there / "late")
    assert all(torch.allclose(a[n], b[n], atol=2e-6) for n in a)
    notes = [json.loads((there / n / "weightsmith.json").read_text())["notes"]["opcm"] for n in ("once", "late")]
    assert notes[0]["merged"] == notes[1]["merged"] == 4
    assert notes[0]["lambda"] == pytest.approx(notes[1]["lambda"], rel=1e-5)
    assert notes[0]["lambda"] > 1


def test_what_was_noted_can_be_said_by_hand_or_put_aside(there: Path) -> None:
    run(recipe(there, "e0", "e1"), there / "early", threads=1)
    noted = json.loads((there / "early" / "weightsmith.json").read_text())["notes"]["opcm"]
    run(recipe(there, "early", "e2"), there / "auto", threads=1)
    (there / "plain").mkdir()
    save_file(weights(there / "early"), there / "plain" / "model.safetensors")
    run(recipe(there, "plain", "e2", **noted), there / "said", threads=1)
    run(recipe(there, "early", "e2", merged=1, **{"lambda": 1.0}), there / "aside", threads=1)
    auto, said, aside = (weights(there / n) for n in ("auto", "said", "aside"))
    assert all(torch.equal(auto[n], said[n]) for n in auto)
    assert not torch.allclose(auto["norm.weight"], aside["norm.weight"], atol=1e-4)


def test_notes_hold_for_their_base_only(there: Path) -> None:
    run(recipe(there, "e0", "e1"), there / "early", threads=1)
    others = {"header": (BASE, {"header": "unlike"}), "values": ({n: t + 1 for n, t in BASE.items()}, None)}
    for name, (tensors, metadata) in others.items():
        (there / name).mkdir()
        save_file(tensors, there / name / "model.safetensors", metadata=metadata)
        wanted = recipe(there, "early", "e2", base=name)
        notes = texts(make_plan(wanted, sources=open_inputs(wanted)).warnings)
        assert "early was made by opcm on another base; it counts as a model like any other" in notes, name


def test_auto_is_one_model():
    assert Opcm().start == (1, 1.0)
    assert Opcm().informed(None, {"earlier": {"opcm": {"merged": 3, "lambda": 1.7}}}) == Opcm(merged=3, lambda_=1.7)  # type: ignore[arg-type]
