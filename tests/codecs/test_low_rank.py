"""tsvc, twin, fwsvd, rmm and exact: closed forms in memory, and there and back on disk."""

from __future__ import annotations

import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kit
import weightsmith
from goldens.encoded import Encoded, encoded
from kit import refusal, remarks
from weightsmith.cli.main import main
from weightsmith.codecs.fwsvd import Fwsvd
from weightsmith.codecs.rmm import Rmm, balanced
from weightsmith.core.errors import NumericError, PlanError, RecipeError, SourceError
from weightsmith.core.keys import Key
from weightsmith.core.site import Site
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.compress import compress, restore
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.text import to_tree

State = dict[str, Tensor]
# The vector stands between the matrices, in files too: two codecs take turns, as in any real model.
SHAPES = {
    "embed_tokens.weight": (30, 8),
    "layers.0.up_proj.weight": (16, 12),
    "layers.0.norm.weight": (13,),
    "layers.0.down_proj.weight": (12, 16),
    "scalar": (),
}
UP = "layers.0.up_proj.weight"
NORM = "layers.0.norm.weight"
NAMES = [f"e{i}" for i in range(4)]

state = partial(kit.state, SHAPES)


BASE = state(0)
EXPERTS = {name: {n: BASE[n] + d for n, d in state(i + 1, 0.1).items()} for i, name in enumerate(NAMES)}
FISHER = {"fisher": {name: {n: t.square() + 1e-3 for n, t in state(i + 50).items()} for i, name in enumerate(NAMES)}}


def rebuilt(made: Encoded, expert: str) -> State:
    return {n: made.rebuilt(n, expert, t) for n, t in BASE.items()}


def change(expert: str, name: str = UP) -> Tensor:
    return (EXPERTS[expert][name] - BASE[name]).double()


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), atol=atol, rtol=0))


# --- tsvc ------------------------------------------------------------------------------------------


def test_all_triplets_give_every_expert_back():
    made = encoded({"tsvc": {"rank_fraction": 1.0}}, BASE, EXPERTS)
    for expert in NAMES:
        got = rebuilt(made, expert)
        assert all(close(got[n], EXPERTS[expert][n]) for n in BASE)


@pytest.mark.parametrize(("share", "rank"), [(0.25, 3), (0.5, 6), (0.01, 1)])
def test_the_error_is_that_of_the_dropped_triplets(share, rank):
    made = encoded({"tsvc": {"rank_fraction": share}}, BASE, EXPERTS)
    assert made.tensors[f"{UP}::u.e1"].shape == (16, rank)
    assert made.tensors[f"{UP}::v.e1"].shape == (12, rank)
    assert torch.equal(made.rebuilt(NORM, "e1", BASE[NORM]), EXPERTS["e1"][NORM])
    got = made.rebuilt(UP, "e1", BASE[UP]).double() - BASE[UP].double()
    s = torch.linalg.svdvals(change("e1"))
    wanted = (s[rank:].square().sum() / s.square().sum()).sqrt()
    assert float((got - change("e1")).norm() / change("e1").norm()) == pytest.approx(float(wanted), rel=1e-4)


def test_an_expert_of_low_rank_is_padded():
    base = {"w": torch.zeros(6, 5)}
    low = torch.outer(torch.arange(6.0), torch.ones(5))
    made = encoded({"tsvc": {"rank_fraction": 1.0}}, base, {"a": {"w": low}, "b": base})
    assert made.tensors["w::s.a"][1:].tolist() == [0.0] * 4
    assert close(made.rebuilt("w", "a", base["w"]), low)
    assert torch.equal(made.rebuilt("w", "b", base["w"]), base["w"])


@pytest.mark.parametrize("codec", ["tsvc", "exact", "rmm"])
def test_nothing_may_stand_beside_what_stores_the_models_own_changes(codec):
    for method in (["ties", codec], ["dare", codec]):
        with pytest.raises(
            (PlanError, RecipeError), match=f"{codec} stores the models' own changes; it takes no other stage beside it"
        ):
            encoded(method, BASE, EXPERTS)


# --- twin ------------------------------------------------------------------------------------------

STRATEGIES = pytest.mark.parametrize("strategy", ["svd", "magnitude", "random"])


@STRATEGIES
def test_everything_kept_gives_every_expert_back(strategy):
    made = encoded(
        [{"task_arithmetic": {"lambda": 0.3}}, {"twin": {"density": 1.0, "strategy": strategy}}], BASE, EXPERTS
    )
    for expert in NAMES:
        got = rebuilt(made, expert)
        assert all(close(got[n], EXPERTS[expert][n]) for n in BASE)


@pytest.mark.parametrize("front", [{"task_arithmetic": {"lambda": 0.3}}, "ties", "tsvm"])
def test_the_shared_part_is_the_merge_and_the_rest_is_truncated(front):
    made = encoded([front, {"twin": {"density": 0.5}}], BASE, EXPERTS)
    shared = weightsmith.merge(EXPERTS, [front], BASE)[UP] - BASE[UP]
    assert close(made.tensors[f"{UP}::tau"], shared, 1e-6)
    own = change("e2") - shared.double()
    u, s, vt = torch.linalg.svd(own, full_matrices=False)
    got = made.rebuilt(UP, "e2", BASE[UP]).double() - BASE[UP].double() - shared.double()
    assert close(got, (u[:, :6] * s[:6]) @ vt[:6])
    error = float((got - own).norm())
    assert error == pytest.approx(float(s[6:].square().sum().sqrt()), rel=1e-4)


def test_the_largest_entries_and_random_ones():
    sparse = encoded(["task_arithmetic", {"twin": {"density": 0.25, "strategy": "magnitude"}}], BASE, EXPERTS)
    tau = sparse.tensors[f"{UP}::tau"]
    own = (EXPERTS["e0"][UP] - BASE[UP]) - tau
    keep = own.abs() >= own.abs().flatten().kthvalue(16 * 12 - 48 + 1).values
    assert int(keep.sum()) == 48
    want = BASE[UP] + tau + torch.where(keep, own, 0.0)
    assert close(sparse.rebuilt(UP, "e0", BASE[UP]), want, 1e-6)
    random = encoded(["task_arithmetic", {"twin": {"density": 0.25, "strategy": "random"}}], BASE, EXPERTS)
    place = random.tensors[f"{UP}::place.e0"]
    assert close(random.tensors[f"{UP}::value.e0"], 4 * own.flatten()[place], 1e-6)
    assert not torch.equal(place, random.tensors[f"{UP}::place.e1"])
    assert len(set(place.tolist())) == 48


@STRATEGIES
def test_at_least_one_triplet_or_entry_is_kept_and_other_tensors_are_whole(strategy):
    shapes = {"w": (6, 5), "kernel": (4, 3, 2), "bias": (5,)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    made = torch.Generator().manual_seed(4)
    experts = {e: {n: torch.randn(s, generator=made) for n, s in shapes.items()} for e in ("a", "b")}
    few = encoded(["task_arithmetic", {"twin": {"density": 1e-3, "strategy": strategy}}], base, experts)
    for e, state in experts.items():
        own = few.rebuilt("w", e, base["w"]) - few.tensors["w::tau"]
        assert float(own.norm()) > 0
        assert torch.linalg.matrix_rank(own) == 1
        for n in ("kernel", "bias"):
            assert torch.equal(few.rebuilt(n, e, base[n]), state[n])
    each = {"svd": 6 + 1 + 5, "magnitude": 2, "random": 2}[strategy]
    assert few.numel == 30 + 2 * (each + 24 + 5), "what is stored"


def test_exclusive_parts_belong_to_names_not_to_places():
    front = [{"task_arithmetic": {"lambda": 0.3}}, {"twin": {"density": 0.4}}]
    turned = {e: EXPERTS[e] for e in reversed(NAMES)}
    one, other = encoded(front, BASE, EXPERTS), encoded(front, BASE, turned)
    for e in NAMES:
        assert close(one.rebuilt(UP, e, BASE[UP]), other.rebuilt(UP, e, BASE[UP]), 1e-6)
    assert not close(one.rebuilt(UP, "e0", BASE[UP]), one.rebuilt(UP, "e3", BASE[UP]), 1e-2)


def test_uncompressed_parts_in_equal_shares_are_the_mean_of_the_experts():
    made = encoded([{"task_arithmetic": {"lambda": 0.3}}, {"twin": {"density": 1.0}}], BASE, EXPERTS)
    mixed = sum(made.rebuilt(UP, e, BASE[UP]) for e in NAMES) / 4
    assert close(mixed, sum(EXPERTS[e][UP] for e in NAMES) / 4)


# --- fwsvd -----------------------------------------------------------------------------------------


def product(made: Encoded, expert: str = "e0") -> Tensor:
    return made.rebuilt(UP, expert, BASE[UP]).double()


def fitted(fisher: Tensor, **parameters: object) -> Tensor:
    one = {"e0": {UP: EXPERTS["e0"][UP]}}
    stats = {"fisher": {"e0": {UP: fisher}}}
    return product(encoded({"fwsvd": parameters}, {UP: BASE[UP]}, one, stats=stats))


WEIGHT = EXPERTS["e0"][UP].double()
SCORES = FISHER["fisher"]["e0"][UP]


def test_a_constant_fisher_is_plain_truncation():
    u, s, vt = torch.linalg.svd(WEIGHT, full_matrices=False)
    want = (u[:, :4] * s[:4]) @ vt[:4]
    assert close(fitted(torch.full((16, 12), 0.3), rank=4), want)
    assert close(fitted(SCORES, rank=4, weighting="none"), want)
    assert close(fitted(SCORES * 1e-6, rank=4), fitted(SCORES, rank=4))
    assert close(fitted(SCORES, rank=12, always=True), WEIGHT)


def test_the_weighted_error_is_lowest_and_the_axis_is_that_of_the_inputs():
    importance = SCORES.double().sum(0)
    plain, weighted = fitted(SCORES, rank=3, weighting="none"), fitted(SCORES, rank=3)
    error = [((WEIGHT - w).square() * importance).sum() for w in (plain, weighted)]
    assert error[1] < 0.99 * error[0]
    assert (WEIGHT - weighted).norm() > (WEIGHT - plain).norm()
    # All importance on three inputs: their columns come back.
    scores = torch.full((16, 12), 1e-9)
    scores[:, [1, 5, 7]] = 1.0
    got = fitted(scores, rank=3)
    assert close(got[:, [1, 5, 7]], WEIGHT[:, [1, 5, 7]], 1e-3)
    assert not close(got, WEIGHT, 0.1)


def test_factors_may_share_the_singular_values():
    assert close(fitted(SCORES, rank=3, balanced=True), fitted(SCORES, rank=3))
    left, right = Fwsvd(rank=3, balanced=True, weighting="none")._factors(WEIGHT.float(), SCORES, 3)
    values = torch.linalg.svdvals(WEIGHT)[:3]
    assert close(left.T @ left, torch.diag(values))
    assert close(right.T @ right, torch.diag(values))


def test_transposed_weights_have_their_inputs_in_rows():
    one = {"e0": {UP: EXPERTS["e0"][UP].T.contiguous()}}
    stats = {"fisher": {"e0": {UP: SCORES.T.contiguous()}}}
    made = encoded({"fwsvd": {"rank": 3, "transposed": True}}, {UP: BASE[UP].T.contiguous()}, one, stats=stats)
    assert close(made.rebuilt(UP, "e0", BASE[UP].T).T, fitted(SCORES, rank=3))


def test_element_wise_weights_lower_their_own_error():
    scores = SCORES.double()
    error = [((WEIGHT - fitted(SCORES, rank=3, weighting=w)).square() * scores).sum() for w in ("none", "element")]
    assert error[1] < 0.9 * error[0]


def test_what_is_factored_and_what_stays_whole():
    made = encoded({"fwsvd": {"ratio": 0.5}}, BASE, EXPERTS, stats=FISHER)
    rank = int(0.5 * 16 * 12 / 28)
    assert made.tensors[f"{UP}::left.e0"].shape == (16, rank)
    assert made.tensors[f"{UP}::right.e0"].shape == (12, rank)
    for name in ("embed_tokens.weight", "layers.0.norm.weight", "scalar"):
        assert torch.equal(made.rebuilt(name, "e3", BASE[name]), EXPERTS["e3"][name])
    matrices = 2 * 4 * rank * 28
    assert made.numel == matrices + 4 * (30 * 8 + 13 + 1)
    assert Fwsvd(rank=7)._rank(Key("a", (16, 12), "float32")) == 0, "7 (16 + 12) > 16 12"
    assert Fwsvd(rank=7, always=True)._rank(Key("a", (16, 12), "float32")) == 7


def test_inputs_of_no_importance_stay_finite():
    scores = SCORES.clone()
    scores[:, 3] = 0
    got, weight = fitted(scores, rank=3), WEIGHT.clone()
    assert bool(torch.isfinite(got).all())
    weight[:, 3] = 0  # what a dead input holds does not matter to the others
    keep = [j for j in range(12) if j != 3]
    importance = scores.double().sum(0).sqrt()
    u, s, vt = torch.linalg.svd(weight * importance, full_matrices=False)
    assert close(got[:, keep], ((u[:, :3] * s[:3]) @ vt[:3] / importance.clamp(min=1e-30))[:, keep], 1e-3)


def test_a_damaged_fisher_is_refused():
    scores = SCORES.clone()
    scores[2, 5] = float("nan")
    with pytest.raises(NumericError, match=rf"{UP} in the fisher of e0 holds NaN at \[2, 5\]"):
        fitted(scores, rank=3)
    scores[2, 5] = -1.0
    with pytest.raises(NumericError, match=rf"{UP}: the fisher of e0 is negative somewhere"):
        fitted(scores, rank=3)


def test_a_fisher_of_zeros_is_refused():
    with pytest.raises(NumericError, match=rf"{UP}: the fisher of e0 is negative somewhere, or zero everywhere"):
        fitted(torch.zeros(16, 12), rank=3)
    with pytest.raises(NumericError, match=r"the fisher of e0 has shape \[12\] for a weight of \[16, 12\]"):
        fitted(torch.ones(12), rank=3)
    with pytest.raises(PlanError, match="fwsvd needs the statistic 'fisher' of e0"):
        encoded("fwsvd", BASE, EXPERTS)


# --- rmm -------------------------------------------------------------------------------------------

ROWS, COLUMNS, RANK, COUNT = 9, 11, 3, 5
LEVELS = pytest.mark.parametrize("level", ["position", "tensor"])


def pairs(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(ROWS, RANK, generator=made), torch.randn(RANK, COLUMNS, generator=made)) for _ in range(COUNT)]


def encode(
    codec: Rmm, factors: list[tuple[Tensor, Tensor]], dense: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every expert's rebuilt change, and what is stored, past the plan, which refuses layouts that save nothing."""
    key, names = Key("w", (ROWS, COLUMNS), "float32"), tuple(f"e{i}" for i in range(len(factors)))
    stack = torch.stack([left @ right for left, right in factors])
    given = {"is_delta": True} if dense else {"factors": tuple(factors)}
    site = Site(key, stack, base=torch.zeros(ROWS, COLUMNS), names=names, **given)
    stored = codec.encode(site)
    layout = codec.parts(key, names)
    assert {p.key.name: p.key.shape for p in layout} == {n: tuple(t.shape) for n, t in stored.items()}
    out = []
    for name in names:
        parts = {p.name: stored[p.key.name] for p in layout if p.expert in ("", name)}
        out.append(codec.decode(parts, torch.zeros(ROWS, COLUMNS, dtype=torch.float64), 0))
    return out, stored


@LEVELS
@pytest.mark.parametrize("canonicalise", ["none", "svd", "procrustes"])
@pytest.mark.parametrize("center", [True, False])
def test_enough_basis_vectors_give_every_expert_back(level, canonicalise, center):
    factors = pairs()
    codec = Rmm(rank=RANK, basis=COUNT, level=level, canonicalise=canonicalise, center=center)
    got, _ = encode(codec, factors)
    assert all(close(g, left @ right) for g, (left, right) in zip(got, factors, strict=True))


def test_the_residual_is_what_the_dropped_directions_hold():
    factors, codec = pairs(), Rmm(rank=RANK, basis=1, canonicalise="none")
    _, stored = encode(codec, factors)
    x = torch.stack([left.double() for left, _ in factors])  # [n, m, r]
    spread = (x - x.mean(0)).permute(1, 2, 0)
    back = stored["w::l.basis"] @ torch.stack([stored[f"w::l.own.e{i}"] for i in range(COUNT)], -1)
    s = torch.linalg.svdvals(spread)
    assert torch.allclose((spread - back).square().sum((1, 2)), s[:, 1:].square().sum(1), atol=1e-10)


@LEVELS
def test_equal_experts_need_no_more_than_their_mean(level):
    got, _ = encode(Rmm(rank=RANK, basis=1, level=level), [pairs()[0]] * COUNT)
    left, right = pairs()[0]
    assert all(close(g, left @ right) for g in got)


def test_the_number_of_stored_elements():
    p = 2
    _, stored = encode(Rmm(rank=RANK, basis=p), pairs())
    assert sum(t.numel() for t in stored.values()) == (ROWS + COLUMNS) * (p * (RANK + COUNT) + RANK)
    _, stored = encode(Rmm(rank=RANK, basis=p, level="tensor"), pairs())
    assert sum(t.numel() for t in stored.values()) == (ROWS + COLUMNS) * RANK * (p + 1) + 2 * p * COUNT


@pytest.mark.parametrize("canonicalise", ["svd", "procrustes"])
def test_other_coordinates_of_the_same_adapters_change_nothing(canonicalise):
    codec = Rmm(rank=RANK, basis=1, canonicalise=canonicalise)
    other = []
    for i, (left, right) in enumerate(pairs()):
        q = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(i + 9)) + 2 * torch.eye(RANK)
        other.append((left @ q, torch.linalg.inv(q) @ right))
    (a, _), (b, _), (c, _) = encode(codec, pairs()), encode(codec, other), encode(codec, pairs(), dense=True)
    assert all(close(x, y, 1e-4) and close(x, z, 1e-4) for x, y, z in zip(a, b, c, strict=True))
    (plain, _), (turned, _) = (encode(Rmm(rank=RANK, basis=1, canonicalise="none"), f) for f in (pairs(), other))
    assert not close(plain[0], turned[0], 1e-2)


def test_alignment_lowers_the_error():
    def error(canonicalise: str) -> float:
        got, _ = encode(Rmm(rank=RANK, basis=1, canonicalise=canonicalise), pairs(3))
        return sum(float((g - left @ right).square().sum()) for g, (left, right) in zip(got, pairs(3), strict=True))

    assert error("procrustes") < error("none")


@pytest.mark.parametrize("center", [True, False])
def test_one_adapter_is_stored_as_it_is(center):
    codec = Rmm(rank=RANK, center=center)
    (got,), _ = encode(codec, pairs()[:1])
    left, right = pairs()[0]
    assert close(got, left @ right)
    assert refusal(codec, 1) is None
    assert remarks(codec, 1) == ["one model shares nothing: its changes are only cut to rank 3"]


def test_adapters_of_unlike_ranks_fill_up_with_zeros():
    factors = [(left[:, : i % RANK + 1], right[: i % RANK + 1]) for i, (left, right) in enumerate(pairs())]
    for canonicalise in ("none", "svd", "procrustes"):
        got, _ = encode(Rmm(rank=RANK, basis=COUNT, canonicalise=canonicalise), factors)
        assert all(close(g, left @ right) for g, (left, right) in zip(got, factors, strict=True))


def test_balanced_factors():
    left, right = balanced(change("e0"), 12)
    assert close(left @ right.T, change("e0"), 1e-10)
    assert torch.allclose(left.T @ left, right.T @ right, atol=1e-10)
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_basis_that_saves_nothing_is_refused():
    assert "takes 142% of the room" in (refusal(Rmm(rank=RANK, basis=2), 4) or "")
    assert refusal(Rmm(rank=16, basis=2), 8) is None
    with pytest.raises(PlanError, match=r"rmm: basis = 3 of rank 2 for 4 models takes .* lower basis, or set level"):
        encoded({"rmm": {"rank": 2, "basis": 3}}, BASE, EXPERTS)


# --- on disk ---------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Path:
    for name, tensors in {"base": BASE, **EXPERTS}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for name, tensors in FISHER["fisher"].items():
        save_file(tensors, tmp_path / f"{name}.fisher.safetensors")
    return tmp_path


METHODS = {
    "exact": ["exact"],
    "tsvc": [{"tsvc": {"rank_fraction": 0.3}}],
    "twin": ["ties", {"twin": {"density": 0.3}}],
    "sparse": ["ties", {"twin": {"density": 0.3, "strategy": "magnitude"}}],
    "rmm": [{"rmm": {"rank": 4, "basis": 1}}],
    "tensor": [{"rmm": {"rank": 4, "basis": 2, "level": "tensor"}}],
}


def recipe_of(there: Path, method: list, **more: object) -> Recipe:
    models = {name: {"model": str(there / name)} for name in NAMES}
    return Recipe.model_validate({"base": str(there / "base"), "models": models, "method": tuple(method), **more})


def squeezed(there: Path, method: list, out: str = "small", **more: object) -> Path:
    return compress(recipe_of(there, method, **more), there / out, threads=1, accept_loss=True).out


@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(there: Path, name: str) -> None:
    small = squeezed(there, METHODS[name])
    again = squeezed(there, METHODS[name], "again", output={"shard_size": "1KB"})
    memory = encoded(METHODS[name], BASE, EXPERTS)
    (there / "e1" / "model.safetensors").unlink()
    for folder in (small, again):
        got = load_file(restore(folder, "e1", there / f"out-{folder.name}").out / "model.safetensors")
        assert all(torch.equal(got[n], t) for n, t in rebuilt(memory, "e1").items())
    view = open_source(str(small), expert="e1")
    for tensor in ("embed_tokens.weight", UP):
        whole = view.read(tensor)
        pieces = [view.read(tensor, low, low + 5) for low in range(0, whole.shape[0], 5)]
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-6)
    with pytest.raises(SourceError, match="a consensus needs the masks of tall_masks, not"):
        restore(small, None, there / "no", consensus=1)


def relative(got: State, expert: State, names: list[str], base: State | None = None) -> float:
    wrong = sum(float((got[n] - expert[n]).double().square().sum()) for n in names)
    there = sum(float((expert[n] - base[n] if base else expert[n]).double().square().sum()) for n in names)
    return (wrong / there) ** 0.5


@pytest.mark.parametrize("name", ["tsvc", "twin", "sparse", "rmm", "tensor"])
def test_the_error_of_every_model_is_said(there: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the changes as they are rebuilt, not of their factors."""
    found = compress(recipe_of(there, METHODS[name]), there / "small", threads=1, accept_loss=True)
    assert found.storage is not None
    matrices = [n for n, shape in SHAPES.items() if len(shape) == 2]
    got = {e: load_file(restore(found.out, e, there / f"out-{e}").out / "model.safetensors") for e in NAMES}
    want = {e: relative(got[e], EXPERTS[e], list(SHAPES), BASE) for e in NAMES}
    each = {n: {e: relative(got[e], EXPERTS[e], [n], BASE) for e in NAMES} for n in matrices}
    assert min(want.values()) > 0.1
    assert found.storage.error == pytest.approx(want, rel=1e-3)
    noted = json.loads((found.out / "weightsmith.json").read_text())["codec"]
    assert noted["error"] == found.storage.error
    for n, errors in each.items():
        assert noted["errors"][n] == pytest.approx(errors, rel=1e-3)
    for expert, (tensor, worst) in found.storage.worst.items():
        assert worst == noted["errors"][tensor][expert] == max(e[expert] for e in noted["errors"].values())
    (there / "recipe.yaml").write_text(json.dumps(to_tree(recipe_of(there, METHODS[name]))))
    assert main(["compress", str(there / "recipe.yaml"), str(there / "again"), "--accept-loss"]) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "what each model loses, of its change; the bare base: 100% (relative norm) model in all at worst in" in shown
    for expert, (tensor, worst) in found.storage.worst.items():
        assert f"{expert} {noted['error'][expert]:.2%} {worst:.2%} {tensor}" in shown


def test_half_precision_is_stored_in_half(there: Path) -> None:
    for name in ("base", *NAMES):
        path = there / name / "model.safetensors"
        save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    small = squeezed(there, METHODS["twin"])
    stored = load_file(small / "experts.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    got = load_file(restore(small, "e0", there / "out").out / "model.safetensors")
    assert got[UP].dtype == torch.bfloat16
    assert torch.equal(got["layers.0.norm.weight"], EXPERTS["e0"]["layers.0.norm.weight"].bfloat16())


def alone(tmp_path: Path, **parameters: object) -> Path:
    """One model and its Fisher on disk, with a tied head and a configuration, compressed without a base."""
    model, stats = tmp_path / "model", tmp_path / "stats"
    model.mkdir()
    stats.mkdir()
    save_file(EXPERTS["e0"], model / "model.safetensors")
    (model / "config.json").write_text('{"model_type": "none"}')
    save_file(FISHER["fisher"]["e0"], stats / "fisher.safetensors")
    inputs = Inputs(None, {"m": open_source(model)}, {"fisher": {"m": open_source(stats / "fisher.safetensors")}})
    recipe = Recipe.model_validate(
        {"models": {"m": str(model)}, "method": [{"fwsvd": parameters}], "exclude": ["*down_proj*"]}
    )
    compress(recipe, tmp_path / "small", sources=inputs, accept_loss=True)
    return tmp_path / "small"


def test_one_model_alone_there_and_back(tmp_path: Path) -> None:
    small = alone(tmp_path, rank=12, always=True)
    (tmp_path / "model/model.safetensors").unlink()  # nothing but the folder is needed
    restore(small, "m", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == EXPERTS["e0"].keys()
    for name, tensor in found.items():
        exact = torch.equal(tensor, EXPERTS["e0"][name])
        assert exact == (name != UP), name
        assert close(tensor, EXPERTS["e0"][name])
    assert (tmp_path / "back/config.json").exists()
    again = open_source(small, expert="m")
    assert close(again.read(UP, 3, 5), EXPERTS["e0"][UP][3:5])
    assert close(pickle.loads(pickle.dumps(again)).read(UP), EXPERTS["e0"][UP])


def test_one_model_alone_takes_less_room(tmp_path: Path) -> None:
    small = alone(tmp_path, rank=2)
    files = load_file(small / "experts.safetensors")
    noted = json.loads((small / "weightsmith.json").read_text())["codec"]["errors"]
    got = open_source(small, expert="m").read(UP)
    assert noted[UP]["m"] == pytest.approx(relative({UP: got}, EXPERTS["e0"], [UP]), rel=1e-3), "of the weights"
    want = sum(t.numel() for n, t in EXPERTS["e0"].items() if n != UP) + 2 * (16 + 12)
    assert sum(t.numel() for t in files.values()) == want


def test_without_a_base_there_is_one_model(tmp_path: Path) -> None:
    sources = {name: MemorySource(EXPERTS[name], name) for name in ("e0", "e1")}
    stats = {"fisher": {name: MemorySource(FISHER["fisher"][name]) for name in sources}}
    recipe = Recipe.model_validate({"models": {n: n for n in sources}, "method": "fwsvd"})
    with pytest.raises(PlanError, match="without a base one model is compressed by itself"):
        compress(recipe, tmp_path / "out", sources=Inputs(None, sources, stats))
    other = Recipe.model_validate({"models": {"e0": "e0"}, "method": "rmm"})
    with pytest.raises(PlanError, match="rmm needs a base model"):
        compress(other, tmp_path / "out", sources=Inputs(None, {"e0": sources["e0"]}))
