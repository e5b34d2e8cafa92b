"""Compressed folders on disk: there and back, what they need, what they refuse."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kit
from goldens.encoded import encoded
from kit import texts
from weightsmith.core.errors import NotKept, OutputError, PlanError, RecipeError, SourceError
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.open import open_source
from weightsmith.jobs.compress import compress, restore
from weightsmith.jobs.job import Result
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import Recipe

SHAPES = {"embed_tokens.weight": (40, 6), "layers.0.up_proj.weight": (24, 10), "norm.weight": (13,), "scale": ()}
NAMES = ("math", "code", "law")

tensors = partial(kit.state, SHAPES)


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with a base and three experts; the position ids are the same everywhere, and one tensor is empty."""
    ids = {"ids": torch.arange(5), "empty": torch.zeros(0, 4)}
    base = tensors(0)
    write(tmp_path / "base", base | ids)
    for i, name in enumerate(NAMES):
        delta = tensors(i + 1, 0.02)
        write(tmp_path / name, {n: base[n] + delta[n] for n in base} | ids)
    return tmp_path


def recipe(there: Path, method: object = "tall_masks", **more: object) -> Recipe:
    stages = tuple(method) if isinstance(method, list) else (method,)
    models = {name: {"model": str(there / name)} for name in NAMES}
    return Recipe.model_validate({"base": str(there / "base"), "models": models, "method": stages, **more})


def squeeze(there: Path, method: object = "tall_masks", threads: int = 1, **more: object) -> Result:
    return compress(recipe(there, method, **more), there / "small", threads=threads, accept_loss=True)


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_there_and_back(there: Path) -> None:
    assert squeeze(there).out == there / "small"
    memory = encoded("tall_masks", state(there / "base"), {n: state(there / n) for n in NAMES})
    base = state(there / "base")
    for name in NAMES:
        (there / name / "model.safetensors").unlink()  # the experts are not needed
    for name in NAMES:
        result = restore(there / "small", name, there / "out" / name)
        got = state(result.out)
        wanted = {n: memory.rebuilt(n, name, base[n]) for n in SHAPES} | {n: base[n] for n in ("ids", "empty")}
        assert same(got, wanted)
        assert (result.out / "config.json").read_text() == (there / "base" / "config.json").read_text()
        assert verify_folder(result.out) == []
    assert verify_folder(there / "small") == []
    assert not (there / "small" / "config.json").exists(), "the parts are no model"


def test_the_size_is_the_formula(there: Path) -> None:
    storage = squeeze(there).storage
    numel = {n: t.numel() for n, t in tensors(0).items()}
    masks = sum(-(-count // 8) for count in numel.values())
    assert storage is not None
    assert storage.stored == 4 * sum(numel.values()) + len(NAMES) * masks + 5 * 8
    assert storage.base == 4 * sum(numel.values()) + 5 * 8
    assert storage.experts == 3 * storage.base
    assert storage.ratio == (storage.base + storage.stored) / storage.experts
    file = there / "small" / "experts.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + storage.stored


def test_bytes_are_the_same_for_threads_and_shards_are_found(there: Path) -> None:
    squeeze(there)
    before = load_file(there / "small" / "experts.safetensors")
    compress(recipe(there), there / "again", threads=3, accept_loss=True)
    assert (there / "again" / "experts.safetensors").read_bytes() == (
        there / "small" / "experts.safetensors"
    ).read_bytes()
    compress(recipe(there, output={"shard_size": 500}), there / "shards", threads=1, accept_loss=True)
    assert len(list((there / "shards").glob("*.safetensors"))) > 2
    a, b = restore(there / "small", "code", there / "a"), restore(there / "shards", "code", there / "b")
    assert same(state(a.out), state(b.out))
    assert before["norm.weight::mask.code"].shape == (2,)


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_an_expert_is_read_by_rows(there: Path, rows: int) -> None:
    squeeze(there)
    view = open_source(str(there / "small"), expert="law")
    view = pickle.loads(pickle.dumps(view))
    whole = view.read("embed_tokens.weight")
    pieces = [view.read("embed_tokens.weight", low, min(low + rows, 40)) for low in range(0, 40, rows)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(
        torch.cat([view.read("norm.weight", 0, 5), view.read("norm.weight", 5)]), view.read("norm.weight")
    )
    assert view.read("scale").shape == ()
    assert view.computes("norm.weight")
    assert not view.computes("ids")
    assert view.read("ids").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(SourceError, match="'scale' is calculated on reading"):
        view.bits("scale")


def test_an_expert_is_a_model_like_any_other(there: Path) -> None:
    squeeze(there)
    for name in NAMES[:2]:
        restore(there / "small", name, there / "whole" / name)
    by_view = {n: {"model": str(there / "small"), "expert": n} for n in NAMES[:2]}
    by_file = {n: {"model": str(there / "whole" / n)} for n in NAMES[:2]}
    for label, models in (("v", by_view), ("f", by_file)):
        merged = Recipe.model_validate({"base": str(there / "base"), "models": models, "method": ("ties",)})
        run(merged, there / label, threads=1)
    assert same(state(there / "v"), state(there / "f"))


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_the_consensus_comes_out_of_the_folder(there: Path, k: int) -> None:
    trimmed = {"ties": {"aggregate": "sum", "density": 0.5, "scope": "global"}}
    squeeze(there, [trimmed, {"tall_masks": {"lambda": 0.5}}])
    filtered = {"consensus": {"k": k, "lambda": 0.3, "tall_mask_lambda": 0.5}}
    merged = run(recipe(there, [trimmed, filtered]), there / "merged", threads=1)
    for name in NAMES:
        (there / name / "model.safetensors").unlink()
    got = restore(there / "small", None, there / "got", consensus=k, scale=0.3)
    assert same(state(got.out), state(merged.out))


def test_a_consensus_out_of_range(there: Path) -> None:
    squeeze(there)
    for k in (-1, 5):
        with pytest.raises(SourceError, match=rf"consensus = {k} is outside \[0, 4\] for 3 experts"):
            restore(there / "small", None, there / "got", consensus=k)
    with pytest.raises(
        RecipeError, match=r"the name of an expert \(math, code, law\), or a number for consensus, and not both"
    ):
        restore(there / "small", "math", there / "got", consensus=1)
    with pytest.raises(RecipeError, match="an expert is rebuilt at scale 1"):
        restore(there / "small", "math", there / "got", scale=0.5)
    assert not (there / "got").exists()


def test_half_precision(there: Path) -> None:
    for name in ("base", *NAMES):
        found = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state(there / name).items()}
        save_file(found, there / name / "model.safetensors")
    squeeze(there)
    stored = load_file(there / "small" / "experts.safetensors")
    assert stored["norm.weight::tau"].dtype == torch.bfloat16
    got = state(restore(there / "small", "math", there / "out").out)
    assert got["norm.weight"].dtype == torch.bfloat16
    wide = state(restore(there / "small", "math", there / "wide", dtype="float32").out)
    assert all(torch.equal(t.bfloat16(), got[n]) for n, t in wide.items() if n != "ids")
    compress(recipe(there, output={"dtype": "float32"}), there / "precise", threads=1, accept_loss=True)
    assert load_file(there / "precise" / "experts.safetensors")["norm.weight::tau"].dtype == torch.float32


# --- the base --------------------------------------------------------------------------------------


def test_the_base_may_move_but_not_change(there: Path) -> None:
    squeeze(there)
    first = state(restore(there / "small", "math", there / "first").out)
    (there / "base").rename(there / "moved")
    with pytest.raises(
        SourceError, match=r"small: cannot open its base \(.*base: no such file.*\); say where the base"
    ):
        restore(there / "small", "math", there / "out")
    assert same(state(restore(there / "small", "math", there / "second", base=there / "moved").out), first)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s | {"norm.weight": s["norm.weight"][:12]}, "norm.weight has another shape, \\[12\\]"),
        (lambda s: {n: t for n, t in s.items() if n != "norm.weight"}, "norm.weight is missing"),
        (lambda s: s | {"norm.weight": s["norm.weight"] + 1e-3}, "its values differ"),
    ],
)
def test_another_base_is_refused(there: Path, change, text: str) -> None:
    squeeze(there)
    write(there / "other", change(state(there / "base")))
    with pytest.raises(SourceError, match=rf"was not made from .*other \({text}\); give the base .*base\)"):
        restore(there / "small", "math", there / "out", base=there / "other")
    assert not (there / "out").exists()


def test_one_value_far_inside_a_tensor_is_noticed(tmp_path: Path) -> None:
    """Opening compares the first rows only; before a model is written everything is compared."""
    base = {"w": torch.zeros(4000, 3)}
    write(tmp_path / "base", base)
    for i, name in enumerate(NAMES):
        write(tmp_path / name, {"w": base["w"] + i + 1})
    squeeze(tmp_path, "bitdelta")
    base["w"][3999, 2] = 1
    write(tmp_path / "other", base)
    with pytest.raises(SourceError, match="the values of w differ"):
        restore(tmp_path / "small", "math", tmp_path / "out", base=tmp_path / "other")


def test_a_recipe_with_another_base_still_decodes_with_the_right_one(there: Path) -> None:
    squeeze(there)
    other = open_source(write(there / "other", state(there / "math")))
    view = open_source(there / "small", base=other, expert="math")
    plain = open_source(there / "small", expert="math")
    assert torch.equal(view.read("norm.weight"), plain.read("norm.weight"))


# --- what is lost ----------------------------------------------------------------------------------


def lossy(there: Path, second: float, method: object, out: str = "small", **options: object) -> Result:
    """Three experts: the second moved the other way and `second` times as far, the third not at all."""
    base = {"w": torch.zeros(5000, 4)}
    if not (there / "b").exists():
        write(there / "b", base)
        moved = {"w": tensors(1, 1.0)["embed_tokens.weight"].repeat(100, 1)[:, :4].repeat(2, 1)[:5000].clone()}
        write(there / "one", moved)
        write(there / "two", {"w": -second * moved["w"]})
        write(there / "still", base)
    tree = {
        "base": str(there / "b"),
        "models": {name: str(there / name) for name in ("one", "two", "still")},
        "method": method,
    }
    return compress(Recipe.model_validate(tree), there / out, threads=1, **options)


def test_what_is_worse_than_nothing_is_not_kept(there: Path) -> None:
    """tau = -2 delta; at lambda 0.1 the first mask takes all, and |tau - delta| = 3 |delta|."""
    masks = {"tall_masks": {"lambda": 0.1}}
    with pytest.raises(NotKept) as refused:
        lossy(there, 3.0, masks)
    assert str(refused.value) == (
        "nothing is kept: storing nothing (the bare base) loses 100% of a model's change, but here would be lost: "
        "300.0% of one's; set the lambda of tall_masks to 1, which never loses more, and tune it from there; or take "
        "another codec (exact loses nothing, bitdelta never more than storing nothing); or make one model of all with "
        "the filter consensus; or pass --accept-loss (Python: accept_loss=True) if only your own scores count"
    )
    assert not [path for path in there.iterdir() if path.name.startswith("small")], "nor anything to resume"
    kept = lossy(there, 3.0, masks, accept_loss=True).storage
    assert kept is not None
    assert kept.error == {"one": 3.0, "two": pytest.approx(1 / 3, rel=1e-3), "still": 0.0}
    assert kept.worst == {"one": ("w", 3.0), "two": ("w", kept.error["two"]), "still": ("w", 0.0)}


def test_a_mask_at_lambda_one_never_loses_more_than_nothing(there: Path) -> None:
    found = lossy(there, 3.0, {"tall_masks": {"lambda": 1}}).storage
    assert found is not None
    assert found.error == {"one": 1.0, "two": pytest.approx(1 / 3, rel=1e-3), "still": 0.0}


def test_what_saves_no_space_is_refused_before_anything_is_written(there: Path) -> None:
    with pytest.raises(PlanError) as refused:
        lossy(there, 3.0, "exact")
    assert str(refused.value) == (
        "no space is saved: base and result take 133% of what the models take in full, which lose nothing; "
        "keep those, compress more models of this base together, or take a codec with few bits for each model "
        "(bitdelta); or pass --accept-loss (Python: accept_loss=True) to see what it does"
    )
    assert not (there / "small").exists()
    assert str(refused.value) in texts(lossy(there, 3.0, "exact", accept_loss=True).warnings)
    assert "no space" not in " ".join(texts(lossy(there, 3.0, "bitdelta", "bits").warnings))


def test_losses_of_blocks_add_up(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what `exact` stores beside another codec counts as a change, not as a weight."""
    whole = squeeze(there, "tall_masks", rules=[{"match": "embed*", "method": "exact"}]).storage
    monkeypatch.setattr("weightsmith.core.task.PART_BYTES", 64)
    parts = compress(
        recipe(there, rules=[{"match": "embed*", "method": "exact"}]), there / "parts", threads=1, accept_loss=True
    ).storage
    assert whole is not None
    assert parts is not None
    assert parts.error == pytest.approx(whole.error, rel=1e-3)
    assert parts.worst == whole.worst
    back = {name: state(restore(there / "small", name, there / "out" / name).out) for name in NAMES}
    base = state(there / "base")
    for name in NAMES:
        want = state(there / name)
        missed = sum(float((back[name][n] - want[n]).square().sum()) for n in SHAPES)
        change = sum(float((want[n] - base[n]).square().sum()) for n in SHAPES)
        assert whole.error[name] == pytest.approx((missed / change) ** 0.5, rel=1e-3)


# --- names, shapes and tensors that only some have -------------------------------------------------


def test_which_expert(there: Path) -> None:
    squeeze(there)
    with pytest.raises(SourceError, match=r"holds 3 models; say which with 'expert:' \(math, code, law\)"):
        open_source(there / "small")
    with pytest.raises(SourceError, match="no expert 'maths'; did you mean 'math'"):
        open_source(there / "small", expert="maths")
    with pytest.raises(SourceError, match=r"cannot read .*; was this folder made by weightsmith"):
        restore(there / "base", "math", there / "out")
    run(recipe(there, "ties"), there / "merged", threads=1)
    with pytest.raises(SourceError, match="merged: not a compressed folder; make one with weightsmith compress"):
        restore(there / "merged", "math", there / "out")


def test_an_edited_manifest_is_refused(there: Path) -> None:
    squeeze(there)
    path = there / "small" / "weightsmith.json"
    manifest = json.loads(path.read_text())
    manifest["codec"]["base"]["sample"] = "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match="is damaged or was edited"):
        restore(there / "small", "math", there / "out")


def test_the_compressed_folder_is_not_overwritten(there: Path) -> None:
    squeeze(there)
    with pytest.raises(PlanError, match="is also an input"):
        restore(there / "small", "math", there / "small", overwrite=True)
    with pytest.raises((PlanError, OutputError), match="exists and is not empty"):
        squeeze(there)
    assert verify_folder(there / "small") == []


def test_unlike_heads_are_refused_or_kept_apart(there: Path) -> None:
    """Heads that the base lacks, one per task: refused, or if excluded stored whole for each expert."""
    heads = {name: torch.randn(3 + i, 10) for i, name in enumerate(NAMES[:2])}
    for name, head in heads.items():
        save_file(state(there / name) | {"classifier.weight": head}, there / name / "model.safetensors")
    with pytest.raises(PlanError, match=r"math is another .* head \(classifier.weight\); .* add it to"):
        squeeze(there)
    squeeze(there, exclude=("classifier.*",))
    for name in NAMES:
        got = state(restore(there / "small", name, there / "out" / name).out)
        assert ("classifier.weight" in got) is (name in heads)
        if name in heads:
            assert torch.equal(got["classifier.weight"], heads[name])


def test_unlike_shapes_are_refused(there: Path) -> None:
    found = state(there / "math")
    save_file(found | {"layers.0.up_proj.weight": torch.zeros(24, 11)}, there / "math" / "model.safetensors")
    with pytest.raises(PlanError, match=r"up_proj.weight has shape \[24, 10\] in base but \[24, 11\] in math.*exclude"):
        squeeze(there)
    assert not (there / "small").exists()


def test_unequal_integers_are_refused(there: Path) -> None:
    save_file(state(there / "law") | {"ids": torch.arange(5) + 1}, there / "law" / "model.safetensors")
    with pytest.raises(PlanError, match=r"ids .int64. differs between base and law"):
        squeeze(there)


def test_what_is_excluded_stays_in_the_base(there: Path) -> None:
    result = squeeze(there, exclude=("embed*",))
    assert texts(result.warnings) == [
        "1 tensors that a rule or exclude keeps are not stored: restored models get the base's"
    ]
    assert not any(n.startswith("embed") for n in load_file(there / "small" / "experts.safetensors"))
    got = state(restore(there / "small", "math", there / "out").out)
    assert torch.equal(got["embed_tokens.weight"], state(there / "base")["embed_tokens.weight"])
    assert not torch.equal(got["norm.weight"], state(there / "base")["norm.weight"])


def test_a_rule_may_share_a_merged_tensor(there: Path) -> None:
    squeeze(there, rules=({"match": "norm.weight", "method": "average"},))
    stored = load_file(there / "small" / "experts.safetensors")
    assert "norm.weight" in stored
    assert "norm.weight::tau" not in stored
    for name in NAMES:
        got = state(restore(there / "small", name, there / "out" / name).out)
        assert torch.equal(got["norm.weight"], stored["norm.weight"])


def test_resume(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops after some tensors is finished by the next, to the same bytes."""
    compress(recipe(there), there / "whole", threads=1, accept_loss=True)
    from weightsmith.engine.sites import Reader

    real, calls = Reader.site, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "site", failing)
        with pytest.raises(KeyboardInterrupt):
            squeeze(there)
    assert not (there / "small").exists()
    made = compress(recipe(there), there / "small", threads=1, resume=True, accept_loss=True)
    again = compress(recipe(there), there / "small", threads=1, resume=True, accept_loss=True)
    assert (made.complete, again.complete) == (False, True)
    assert again.storage == made.storage
    for name in ("experts.safetensors", "weightsmith.json"):
        assert (there / "small" / name).read_bytes() == (there / "whole" / name).read_bytes()
