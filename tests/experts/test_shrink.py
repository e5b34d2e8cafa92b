"""Mixtures with fewer experts: exact laws, copies bit for bit, folders that transformers loads, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.mixture_models import EXPERTS, FAMILIES, IDS, edited, logits, mixture_saved
from weightsmith import Recipe
from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.experts import mapped, smaller
from weightsmith.experts.clusters import WAYS
from weightsmith.experts.maps import read_map
from weightsmith.experts.shrink import rerun, shrink
from weightsmith.experts.smaller import Shrinking
from weightsmith.io.package.manifest import verify_folder
from weightsmith.jobs.compress import compress, restore
from weightsmith.observe.collect import observe

ROWS = [torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(4)]
SHORT = torch.tensor([[17, 40]])

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's model with its statistics, made once."""
    root, made = tmp_path_factory.mktemp("mixtures"), dict[str, tuple[Path, Path]]()

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = mixture_saved(root / family, family)
            observe(folder, ROWS, ["routing", "routed"], root / f"{family}-stats", device="cpu")
            made[family] = folder, root / f"{family}-stats"
        return made[family]

    return of


def asked(model: Path, stats: Path, by: str = "reap", **more: Any) -> Shrinking:
    return Shrinking(str(model), (str(stats),), by, **{"experts": 6, **more} if "keep" not in more else more)


def mapped_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = mapped.load(folder, dtype=torch.float32)(ids).logits
    return out


def expert_tensors(folder: Path) -> Tensors:
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n}


# --- every family, every way -----------------------------------------------------------------------


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_fewer_experts(
    family: str, by: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, stats = models(family)
    shrink(asked(model, stats, by), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert 6 in (config.get("num_local_experts"), config.get("num_experts"), config.get("n_routed_experts"))
    here = logits(tmp_path / "out", IDS)
    assert torch.isfinite(here).all()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    said = loaded.generate(IDS[:, :4], max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    assert said.shape == (1, 6)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again", IDS), here, rtol=0, atol=0)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    counted = (".experts.", ".gate.", ".router.")
    for name in before:
        if not any(word in name for word in counted):
            assert torch.equal(before[name], after[name])  # attention, norms, shared experts
    assert sum(t.numel() for n, t in after.items() if ".experts." in n) * EXPERTS == 6 * sum(
        t.numel() for n, t in before.items() if ".experts." in n
    )
    assert verify_folder(tmp_path / "out") == []
    assert rerun(tmp_path / "out") == []


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_out_experts_that_are_never_chosen_changes_nothing(family: str, tmp_path: Path) -> None:
    """Two tokens choose four experts at most; gates are shares of those chosen, or sigmoids."""
    model = mixture_saved(tmp_path / "m", family)
    observe(model, SHORT.tolist(), ["routing"], tmp_path / "s", device="cpu")
    seen = load_file(tmp_path / "s" / "routing.safetensors")
    halves = [t.reshape(2, 4) for n, t in seen.items() if n.endswith("counts")]
    count = 6 if family != "deepseek_v3" else 2 * int(max((t > 0).sum(1).max() for t in halves))
    shrink(asked(model, tmp_path / "s", experts=count), tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", SHORT), logits(model, SHORT), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tmp_path / "out", IDS), logits(model, IDS), rtol=1e-3, atol=1e-3)
    labels = read_map(tmp_path / "out").labels
    old, new = expert_tensors(model), expert_tensors(tmp_path / "out")
    for module, of_layer in labels.items():
        kept = [e for e in range(EXPERTS) if of_layer[e] >= 0]
        assert [int(of_layer[e]) for e in kept] == list(range(count))
        for name, tensor in new.items():
            if name.startswith(f"{module}."):
                number, _, rest = name.removeprefix(f"{module}.").partition(".")
                source = old[f"{module}.{kept[int(number)]}.{rest}"] if rest else old[name][kept]
                assert torch.equal(tensor, source)


def paired(tensors: Tensors, order: torch.Tensor | None = None) -> Tensors:
    """Experts 2 j + 1 become experts 2 j, with their hidden units in another order if one is given."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." not in name:
            continue
        words = name.split(".experts.")[1].split(".")
        if words[0].isdigit():
            if int(words[0]) % 2:
                twin = tensors[name.replace(f".experts.{words[0]}.", f".experts.{int(words[0]) - 1}.")]
                axis = 1 if words[1] in ("w2", "down_proj") else 0
                out[name] = (twin if order is None else twin.index_select(axis, order[: twin.shape[axis]])).clone()
        else:
            out[name] = tensor.clone()
            out[name][1::2] = tensor[0::2] if order is None else units_moved(name, tensor[0::2], order)
    return out


def units_moved(name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Of fused experts stored [experts, in, out], gate and up in turns (GPT-OSS) or one behind the other (Llama 4)."""
    if name.endswith("down_proj_bias"):
        return tensor
    if name.endswith("down_proj"):
        return tensor[:, order]
    turns = "mlp.experts" in name
    both = torch.stack((2 * order, 2 * order + 1), 1).flatten() if turns else torch.cat((order, order + len(order)))
    return tensor[..., both]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("by", ["sub_moe", "hc_smoe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_there_twice_become_one_and_the_function_stays(
    family: str, by: str, permuted: bool, tmp_path: Path
) -> None:
    """With the router's own rows: choices of twins add their gates.  Hidden units in another order are put back."""
    model = mixture_saved(tmp_path / "m", family)
    units = 48 if family in ("mixtral", "gpt_oss", "llama4") else 16
    order = torch.randperm(units, generator=torch.Generator().manual_seed(5)) if permuted else None
    edited(model, lambda tensors: paired(tensors, order))
    observe(model, ROWS, ["routing"], tmp_path / "s", device="cpu")
    shrink(asked(model, tmp_path / "s", by, experts=4), tmp_path / "out")
    for labels in read_map(tmp_path / "out").labels.values():
        assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(mapped_logits(tmp_path / "out"), logits(model, IDS), rtol=1e-4, atol=1e-4)
    if permuted:
        shrink(asked(model, tmp_path / "s", by, experts=4, align=False), tmp_path / "blind")
        assert not torch.allclose(mapped_logits(tmp_path / "blind"), logits(model, IDS), rtol=1e-2, atol=1e-2)


def test_twins_with_one_row_need_no_map_where_one_expert_is_chosen(tmp_path: Path) -> None:
    """Llama 4: which of two equal experts is chosen does not matter, so plain transformers gives the same."""
    model = mixture_saved(tmp_path / "m", "llama4")
    edited(model, lambda tensors: {
        n: t if "router" not in n else t[0::2].repeat_interleave(2, 0) for n, t in paired(tensors).items()
    })  # fmt: skip
    observe(model, ROWS, ["routing"], tmp_path / "s", device="cpu")
    shrink(asked(model, tmp_path / "s", "m_smoe", experts=4), tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


# --- unlike numbers, the original rows ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_layers_with_unlike_numbers_are_loaded_with_the_map(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture_saved(tmp_path / "m", family)
    edited(model, lambda t: t | {n: v for n, v in paired(t).items() if ".layers.0." in n})
    observe(model, ROWS, ["routing"], tmp_path / "s", device="cpu")
    monkeypatch.setattr(smaller, "_counts", lambda *_: [4, 8])
    made = shrink(asked(model, tmp_path / "s", "sub_moe"), tmp_path / "out")
    assert any("layers keep 4 to 8 experts" in str(text) for text in made.warnings)
    assert list(read_map(tmp_path / "out").counts.values()) == [4, 8]
    torch.testing.assert_close(mapped_logits(tmp_path / "out"), logits(model, IDS), rtol=1e-4, atol=1e-4)
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("by", ["reap", "m_smoe"])
def test_a_global_budget_is_kept_and_goes_where_usage_is_spread(
    by: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, stats = models("mixtral")
    seen = load_file(stats / "routing.safetensors")
    field = "counts" if by == "m_smoe" else "saliency"
    for layer, first in ((0, 1.0), (1, 1000.0)):
        values = torch.arange(1.0, EXPERTS + 1)
        values[0] = first  # in the second layer nearly all falls on one expert
        seen[f"model.layers.{layer}.block_sparse_moe.experts.{field}"] = values
    skewed(stats, tmp_path / "skewed", seen)
    shrink(asked(model, tmp_path / "skewed", by, experts=5, budget="global"), tmp_path / "out")
    counts = list(read_map(tmp_path / "out").counts.values())
    assert sum(counts) == 10
    assert counts == [8, 2]  # never below what a token goes through
    assert torch.isfinite(mapped_logits(tmp_path / "out")).all()


def skewed(stats: Path, folder: Path, tensors: Tensors) -> Path:
    """Statistics with other numbers, of the same model."""
    from safetensors import safe_open

    folder.mkdir()
    with safe_open(stats / "routing.safetensors", "pt") as file:
        save_file(tensors, folder / "routing.safetensors", file.metadata())
    return folder


def test_a_folder_without_a_map_is_refused(models: Callable[[str], tuple[Path, Path]]) -> None:
    with pytest.raises(SourceError, match="not made by weightsmith moe shrink"):
        mapped.load(models("mixtral")[0])


# --- projections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_a_rank_projects_on_the_union_of_the_members(
    family: str, whiten: bool, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The Gram route equals the singular vectors of all members side by side."""
    model, stats = models(family)
    shrink(asked(model, stats, "sub_moe", experts=2, rank=3, whiten=whiten, align=False), tmp_path / "out")
    shrink(asked(model, stats, "sub_moe", experts=2, align=False), tmp_path / "full")
    labels = next(iter(read_map(tmp_path / "out").labels.items()))
    module, groups = labels[0], labels[1].tolist()
    number = max(set(groups), key=groups.count)
    members = [e for e in range(EXPERTS) if groups[e] == number]
    old, low, full = (expert_tensors(folder) for folder in (model, tmp_path / "out", tmp_path / "full"))
    if family == "mixtral":
        words = ("w1", "w3", "w2")
        cases = [
            ([old[f"{module}.{e}.{w}.weight"] for e in members], low[f"{module}.{number}.{w}.weight"],
             full[f"{module}.{number}.{w}.weight"], w != "w2") for w in words
        ]  # fmt: skip
    else:
        cut = (slice(0, None, 2), slice(1, None, 2)) if family == "gpt_oss" else (slice(0, 48), slice(48, None))
        name = f"{module}.gate_up_proj"
        cases = [([old[name][e].T[c] for e in members], low[name][number].T[c], full[name][number].T[c], True)
                 for c in cut]  # fmt: skip
    moments = load_file(stats / "routed.safetensors")[f"{module}.inputs"].double()
    roots = torch.linalg.cholesky(moments[members].mean(0) + 1e-9 * torch.eye(moments.shape[-1]))
    for matrices, projected, mean, inward in cases:
        parts = [m.double() @ roots if whiten and inward else m.double() for m in matrices]
        leading = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False).U[:, :3]
        torch.testing.assert_close(projected.double(), leading @ leading.T @ mean.double(), rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_rank(projected, rtol=1e-4) <= 3


def test_full_rank_is_the_average(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, stats = models("mixtral")
    for name, rank in (("full", None), ("rank", 1000)):
        shrink(asked(model, stats, "sub_moe", experts=4, rank=rank), tmp_path / name)
    full, rank_ = expert_tensors(tmp_path / "full"), expert_tensors(tmp_path / "rank")
    for name in full:
        torch.testing.assert_close(rank_[name], full[name], rtol=1e-4, atol=1e-5)


# --- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_same_bytes_whatever_the_blocks(
    family: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, stats = models(family)
    for name, threads, memory in (("one", 1, None), ("three", 3, None), ("small", 2, 300_000_000)):
        shrink(asked(model, stats, "m_smoe", experts=3), tmp_path / name, threads=threads, memory=memory)
    first = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_mc_smoe_is_the_merge_and_then_the_codec(
    family: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """One command gives what merging, and compressing the folder it wrote, give: the same restored bytes."""
    model, stats = models(family)
    made = shrink(asked(model, stats, "mc_smoe", ratio=0.3, rows=0.2), tmp_path / "coded")
    assert made.storage is not None
    assert 0 < made.storage.error["model"] < 1
    assert verify_folder(tmp_path / "coded") == []
    assert main(["verify", str(tmp_path / "coded"), "--rerun"]) == 0
    restore(tmp_path / "coded", "model", tmp_path / "full")
    shrink(asked(model, stats, "m_smoe"), tmp_path / "merged")
    rule = {"match": "*.experts.*", "method": {"losparse": {"ratio": 0.3, "rows": 0.2}}}
    rules = [{"match": "*bias", "method": "exact"}, rule] if family == "gpt_oss" else [rule]
    recipe = {"models": {"model": str(tmp_path / "merged")}, "method": "exact", "rules": rules}
    compress(Recipe.model_validate(recipe), tmp_path / "two")
    restore(tmp_path / "two", "model", tmp_path / "full2")
    one, two, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("full", "full2", "merged"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], plain[n]) for n in one)
    assert torch.isfinite(logits(tmp_path / "full", IDS)).all()
    mapped_again = mapped.load(tmp_path / "full", coded=tmp_path / "coded", dtype=torch.float32)
    assert torch.isfinite(mapped_again(IDS).logits).all()


def test_a_bfloat16_model_stays_one(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Single experts keep their bits; merged ones are rounded once."""
    model = mixture_saved(tmp_path / "m", "qwen3_moe")
    edited(model, lambda t: {n: v.bfloat16() for n, v in t.items()})
    observe(model, ROWS, ["routing"], tmp_path / "s", device="cpu")
    shrink(asked(model, tmp_path / "s", "hc_smoe", experts=7, align=False), tmp_path / "out")
    old, new = expert_tensors(model), expert_tensors(tmp_path / "out")
    seen = load_file(tmp_path / "s" / "routing.safetensors")
    for module, labels in read_map(tmp_path / "out").labels.items():
        usage = seen[f"{module}.counts"] / seen[f"{module}.counts"].sum()
        for number in range(7):
            members = [e for e in range(EXPERTS) if labels[e] == number]
            for word in ("gate_proj", "up_proj", "down_proj"):
                got = new[f"{module}.{number}.{word}.weight"]
                parts = [old[f"{module}.{e}.{word}.weight"].float() for e in members]
                if len(members) == 1:
                    assert torch.equal(got, parts[0].bfloat16())
                    continue
                mean = sum(float(usage[e]) * p for e, p in zip(members, parts, strict=True)) / (
                    float(usage[members].sum()) + 1e-7
                )
                torch.testing.assert_close(got, mean.bfloat16(), rtol=1e-2, atol=1e-4)  # type: ignore[union-attr]


# --- heads for further tokens ------------------------------------------------------------------------


def test_blocks_beyond_the_counted_are_refused_or_dropped(tmp_path: Path) -> None:
    model = mixture_saved(tmp_path / "m", "deepseek_v3", num_nextn_predict_layers=1)
    edited(model, lambda t: t | {n.replace(".1.", ".2."): v.clone() for n, v in t.items() if ".layers.1." in n})
    observe(model, ROWS, ["routing"], tmp_path / "s", stream=True, device="cpu")
    with pytest.raises(PlanError, match=r"model\.layers\.2\.\S+: a block that config\.json does not count.*--mtp drop"):
        shrink(asked(model, tmp_path / "s"), tmp_path / "out")
    made = shrink(asked(model, tmp_path / "s", mtp="drop"), tmp_path / "out")
    assert any("heads for further tokens are left out" in str(text) for text in made.warnings)
    assert not any(".layers.2." in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    logits(tmp_path / "out", IDS)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("mixtral", {"experts": 8}, "8 experts of 8 are no fewer"),
        ("mixtral", {"experts": 1}, "a token goes through 2: at least 2"),
        ("mixtral", {"experts": 0}, "must be at least 1"),
        ("mixtral", {"keep": 1.5}, r"keep = 1.5 is outside \(0, 1\)"),
        ("mixtral", {"keep": 0.5, "experts": 4}, "one of the two"),
        ("mixtral", {"by": "repa"}, "by = 'repa' is not known; did you mean 'reap'"),
        ("mixtral", {"by": "mc_smoe", "ratio": 1.5}, r"ratio = 1.5 is outside \(0, 1\]"),
        ("mixtral", {"by": "m_smoe", "rows": 0.2}, "rows: of the factors that mc_smoe stores; m_smoe has none"),
        ("mixtral", {"rank": 2}, "rank is for merged experts; reap merges none"),
        ("mixtral", {"by": "sub_moe", "whiten": True}, "give a rank"),
        ("mixtral", {"budget": "globl"}, "budget = 'globl' is not known"),
        ("deepseek_v3", {"experts": 5}, "do not fall into the router's 2 parts .*take 4 or 6"),
        ("deepseek_v3", {"experts": 2}, "from 1 of 2 parts: at least 4"),
        ("deepseek_v3", {"experts": 6, "budget": "global"}, "budget 'global' with a router of 2 parts"),
    ],
)
def test_what_cannot_be_asked_for(
    family: str, more: dict[str, Any], words: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, stats = models(family)
    given = dict(more)
    by = given.pop("by", "reap")
    both = {**({} if "keep" in given and "experts" not in given else {"experts": 6}), **given}
    with pytest.raises(PlanError, match=words):
        shrink(Shrinking(str(model), (str(stats),), by, **both), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_problems_are_said_at_once(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, _ = models("mixtral")
    with pytest.raises(PlanError) as refused:
        shrink(Shrinking(str(model), (str(tmp_path),), "x", experts=0, keep=0.5, mtp="y"), tmp_path / "out")
    assert len(refused.value.problems) >= 5


def test_statistics_of_others(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, stats = models("mixtral")
    other = mixture_saved(tmp_path / "other", "mixtral", seed=7)
    with pytest.raises(PlanError, match=r"was taken of other files than .*take the statistics of this model"):
        shrink(asked(other, stats), tmp_path / "out")
    more = mixture_saved(tmp_path / "more", "mixtral", num_local_experts=12)
    with pytest.raises(PlanError, match=r"is \[8\].*for 12 experts: statistics of another model"):
        shrink(asked(more, stats), tmp_path / "out")
    with pytest.raises(PlanError, match=r"no routing\.safetensors in it; make it with: weightsmith observe"):
        shrink(asked(model, tmp_path), tmp_path / "out")
    observe(model, ROWS, ["routing"], tmp_path / "half", layers=(0, 1), device="cpu")
    with pytest.raises(PlanError, match=r"layers\.1\.\S+: not in the statistics; observe its block"):
        shrink(asked(model, tmp_path / "half"), tmp_path / "out")
    observe(model, ROWS, ["routing"], tmp_path / "rest", layers=(1, 2), device="cpu")
    whole = Shrinking(str(model), (str(tmp_path / "half"), str(tmp_path / "rest")), "reap", experts=6)
    shrink(whole, tmp_path / "parts")
    shrink(asked(model, stats), tmp_path / "out")
    assert expert_tensors(tmp_path / "parts").keys() == expert_tensors(tmp_path / "out").keys()
    with pytest.raises(PlanError, match="whiten needs the statistic 'routed'"):
        shrink(asked(model, tmp_path / "half", "sub_moe", rank=2, whiten=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_damaged_statistics(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, stats = models("mixtral")
    seen = load_file(stats / "routing.safetensors")
    seen["model.layers.0.block_sparse_moe.experts.saliency"][2] = float("nan")
    with pytest.raises(PlanError, match="NaN or Inf in"):
        shrink(asked(model, skewed(stats, tmp_path / "bad", seen)), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"model.layers.0.block_sparse_moe.experts.3.w1.weight_scale_inv": torch.ones(1)},
         "is no part of an expert known here"),
        (lambda t: {n: v for n, v in t.items() if "experts.3.w1" not in n or "layers.0" not in n},
         r"w1\.weight of experts \[0, 1, 2\]"),
        (lambda t: {n: v for n, v in t.items() if "gate.weight" not in n}, "no router of 8 rows beside it"),
        (lambda t: {n: v for n, v in t.items() if ".experts." not in n}, "no tensors of experts are in it"),
        (lambda t: t | {"model.layers.0.block_sparse_moe.gate.odd": torch.ones(3, 8)},
         r"gate\.odd has \[3, 8\] for 8 experts"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_understood(
    change: Callable[[Tensors], Tensors], words: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, stats = models("mixtral")
    model = edited(mixture_saved(tmp_path / "m", "mixtral"), change)
    with pytest.raises(PlanError, match=words):
        shrink(asked(model, stats), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_warnings(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, stats = models("qwen3_moe")
    said = " ".join(map(str, shrink(asked(model, stats, "m_smoe", keep=0.5), tmp_path / "out").warnings))
    assert "known to collapse at half" in said
    assert "16 hidden units: no multiple of 32" in said
    assert "rows are averaged" in said
    seen = load_file(stats / "routing.safetensors")
    seen["model.layers.0.mlp.experts.counts"][3] = 0
    made = shrink(asked(model, skewed(stats, tmp_path / "s", seen)), tmp_path / "unused")
    assert any("experts were never chosen on the" in str(text) for text in made.warnings)
