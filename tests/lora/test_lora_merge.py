"""Combined adapters against peft's own combinations, loaded by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import Maker, adapter, deltas, gpt2, llama, loaded, logits, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit import texts
from weightsmith import lora
from weightsmith.core.errors import SourceError
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.lora import not_saved
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.io.read.open import open_source
from weightsmith.io.read.peft import AdapterSource
from weightsmith.lora.rules import KINDS

WEIGHTS = (0.7, -0.5, 0.3)
ALL = ["q_proj", "v_proj", "down_proj"]
EQUAL = [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}, {"r": 4, "lora_alpha": 6, "use_rslora": True}]
UNLIKE = [
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]},
    {"r": 3, "use_rslora": True, "layers_to_transform": [1]},
]
CONV1D = [{"r": 3, "lora_alpha": a, "fan_in_fan_out": True, "target_modules": ["c_attn", "wte"]} for a in (2, 5)]
GROUPS: dict[str, tuple[Maker, list[dict[str, Any]]]] = {
    "equal": (llama, EQUAL),
    "unlike": (llama, UNLIKE),
    "conv1d": (gpt2, CONV1D),
}
Group = tuple[Maker, dict[str, Path]]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Group]:
    made = {}
    for name, (make, configs) in GROUPS.items():
        folder = tmp_path_factory.mktemp(name)
        settings = [{"target_modules": ALL, **config} for config in configs]
        paths = {f"a{i}": adapter(folder / f"a{i}", make, i + 1, **c) for i, c in enumerate(settings)}
        made[name] = make, paths
    return made


def theirs(group: Group, kind: str, density: float | None, rank: int | None, vote: str) -> dict[str, Tensor]:
    make, paths = group
    model = loaded(make, paths)
    with quiet():
        model.base_model.add_weighted_adapter(
            list(paths), list(WEIGHTS[: len(paths)]), "both", kind, svd_rank=rank, density=density,
            majority_sign_method=vote,
        )  # fmt: skip
    return deltas(model, "both")


def ours(group: Group, kind: str, out: Path, **given: Any) -> dict[str, Tensor]:
    make, paths = group
    lora.merge(paths, kind, out, weight=WEIGHTS[: len(paths)], **given)
    return deltas(loaded(make, {"ours": out}), "ours")


def close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 2e-6) -> None:
    assert got.keys() == {n for n, t in want.items() if bool(t.any())}
    for name, tensor in got.items():
        assert torch.allclose(tensor, want[name], atol=atol), name


CASES = [
    *((group, kind, "total") for group in GROUPS for kind in KINDS if group != "unlike" or KINDS[kind].on != "factors"),
    *(("equal", kind, "frequency") for kind in ("ties", "ties_svd")),
]


@pytest.mark.parametrize(("group", "kind", "vote"), [c for c in CASES if "dare" not in c[1]])
def test_the_result_is_pefts(groups: dict[str, Group], tmp_path: Path, group: str, kind: str, vote: str) -> None:
    rule = KINDS[kind]
    density = 0.4 if rule.prune else None
    rank = 3 if rule.svd else None
    want = theirs(groups[group], kind, density, rank, vote)
    given = {k: v for k, v in {"density": density, "rank": rank, "vote": vote}.items() if v not in (None, "total")}
    close(ours(groups[group], kind, tmp_path / "out", **given), want)
    assert verify_folder(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dare" in kind])
def test_dare_that_drops_nothing_is_pefts(groups: dict[str, Group], tmp_path: Path, kind: str) -> None:
    want = theirs(groups["equal"], kind, 1.0, None, "total")
    close(ours(groups["equal"], kind, tmp_path / "out", density=1.0), want)


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_the_rank_by_default_is_the_largest(groups: dict[str, Group], tmp_path: Path, kind: str) -> None:
    density = {"density": 0.5} if kind == "ties_svd" else {}
    want = theirs(groups["unlike"], kind, density.get("density"), None, "total")
    close(ours(groups["unlike"], kind, tmp_path / "out", **density), want)
    assert read_adapter(tmp_path / "out").rank == 4


@pytest.mark.parametrize("group", GROUPS)
def test_cat_is_the_exact_sum_and_svd_of_full_rank_equals_it(
    groups: dict[str, Group], tmp_path: Path, group: str
) -> None:
    make, paths = groups[group]
    model = loaded(make, paths)
    single = [(w, deltas(model, name)) for w, name in zip(WEIGHTS, paths, strict=False)]
    names = {n for _, found in single for n in found}
    want = {n: sum(w * found[n].double() for w, found in single if n in found).float() for n in names}
    close(ours(groups[group], "cat", tmp_path / "cat"), want)
    close(ours(groups[group], "svd", tmp_path / "svd", rank=99), want)


def test_logits_are_those_of_pefts_combination(groups: dict[str, Group], tmp_path: Path) -> None:
    make, paths = groups["equal"]
    lora.merge(paths, "svd", tmp_path / "out", weight=WEIGHTS, rank=5)
    model = loaded(make, paths)
    model.base_model.add_weighted_adapter(list(paths), list(WEIGHTS), "both", "svd", svd_rank=5)
    model.set_adapter("both")
    got = logits(loaded(make, {"ours": tmp_path / "out"}))
    assert torch.allclose(got, logits(model), atol=1e-5)
    assert not torch.allclose(got, logits(make()), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_one_is_itself(groups: dict[str, Group], tmp_path: Path, kind: str) -> None:
    make, paths = groups["equal"]
    density = {"density": 1.0} if KINDS[kind].prune else {}
    result = lora.merge({"a2": paths["a2"]}, kind, tmp_path / "out", **density)
    close(deltas(loaded(make, {"x": tmp_path / "out"}), "x"), deltas(loaded(make, {"x": paths["a2"]}), "x"))
    assert len(result.warnings) == (kind not in ("linear", "cat"))


def test_masks_belong_to_the_seed_and_the_adapters_name(groups: dict[str, Group], tmp_path: Path) -> None:
    _, paths = groups["equal"]
    given = {"density": 0.5, "weight": WEIGHTS}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        lora.merge(paths, "dare_linear", tmp_path / name, seed=seed, **given)
    raw = {n: (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "again", "other")}
    assert raw["one"] == raw["again"] != raw["other"]
    swapped = lora.merge(
        dict(reversed(paths.items())), "dare_linear", tmp_path / "swapped", density=0.5, weight=WEIGHTS[::-1]
    )
    for name, tensor in load_file(swapped.out / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, load_file(tmp_path / "one/adapter_model.safetensors")[name], atol=1e-6)


def test_a_weighted_vote_turns_with_the_weight(groups: dict[str, Group], tmp_path: Path) -> None:
    """One adapter taken away: what it votes for is the opposite of what it says."""
    make, paths = groups["equal"]
    two = {n: paths[n] for n in ("a0", "a1")}
    for vote in ("total", "weighted"):
        lora.merge(two, "ties_svd", tmp_path / vote, weight=(1.0, -1.0), density=1.0, vote=vote, rank=16)
    a, b = (deltas(loaded(make, {"x": two[n]}), "x") for n in two)
    got = deltas(loaded(make, {"x": tmp_path / "weighted"}), "x")
    for name, tensor in got.items():
        pair = torch.stack([a[name], -b[name]])
        elected = torch.where(pair.sum(0) >= 0, 1.0, -1.0)
        agrees = pair.sign() == elected
        want = (pair * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        assert torch.allclose(tensor, want, atol=1e-5)
    assert not torch.allclose(tensor, deltas(loaded(make, {"x": tmp_path / "total"}), "x")[name], atol=1e-2)


def test_clamping_bounds_both_factors(groups: dict[str, Group], tmp_path: Path) -> None:
    _, paths = groups["equal"]
    lora.merge(paths, "svd", tmp_path / "plain", rank=4)
    lora.merge(paths, "svd", tmp_path / "clamped", rank=4, clamp=0.9)
    plain, cut = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "clamped"))
    for name in (n for n in plain if "lora_A" in n):
        pair = [torch.cat([t[name].flatten(), t[name.replace("lora_A", "lora_B")].flatten()]) for t in (plain, cut)]
        bound = torch.quantile(pair[0].abs(), 0.9)
        assert torch.allclose(pair[0].clamp(-bound, bound), pair[1], atol=1e-6)
        assert not torch.equal(*pair)


def test_tokens_that_one_adapter_trained(tmp_path: Path) -> None:
    """Their rows are copied whole at any weight, and the result says so."""
    config = {"r": 2, "target_modules": ["q_proj"]}
    one = adapter(tmp_path / "one", llama, 1, trainable_token_indices=[3, 5], **config)
    plain = adapter(tmp_path / "plain", llama, 2, **config)
    result = lora.merge({"one": one, "plain": plain}, "svd", tmp_path / "out", weight=(0.3, 1.0))
    said = "tokens of model.embed_tokens were trained by one, not each by all: copied in full, whatever the weights"
    assert said in texts(result.warnings)
    rows = [
        t
        for folder in (one, tmp_path / "out")
        for n, t in load_file(folder / "adapter_model.safetensors").items()
        if "trainable_tokens" in n
    ]
    assert torch.equal(*rows)
    both = lora.merge({"one": one, "two": one}, "svd", tmp_path / "both", weight=(0.3, 1.0))
    assert not any("tokens of" in text for text in texts(both.warnings))


def test_modules_kept_in_full(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"], "bias": "lora_only"}
    one, two = (adapter(tmp_path / f"a{i}", llama, i, **config) for i in (1, 2))
    plain = adapter(tmp_path / "plain", llama, 3, r=2, target_modules=["q_proj"])
    result = lora.merge({"one": one, "plain": plain}, "svd", tmp_path / "copied", weight=(0.3, 1.0))
    assert any("copied, whatever the weights" in text for text in texts(result.warnings))
    model = loaded(llama, {"x": tmp_path / "copied"})
    saved = loaded(llama, {"x": one})
    name = "base_model.model.model.norm.modules_to_save.x.weight"
    assert torch.equal(model.state_dict()[name], saved.state_dict()[name])
    bias = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    assert torch.equal(model.state_dict()[bias], saved.state_dict()[bias])
    with pytest.raises(Exception, match="saved: average for their weighted mean"):
        lora.merge({"one": one, "two": two}, "cat", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    lora.merge({"one": one, "two": two}, "cat", tmp_path / "mean", weight=(1.0, 3.0), saved="average")
    a, b, mean = (loaded(llama, {"x": p}).state_dict()[name] for p in (one, two, tmp_path / "mean"))
    assert torch.allclose(mean, 0.25 * a + 0.75 * b)


def test_config_says_what_is_there(groups: dict[str, Group], tmp_path: Path) -> None:
    _, paths = groups["unlike"]
    lora.merge(paths, "cat", tmp_path / "out", dtype="bfloat16", base="org/base")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert config["base_model_name_or_path"] == "org/base"
    assert config["r"] == config["lora_alpha"] == 9  # layer 1's q_proj: 4 + 2 + 3
    assert config["rank_pattern"][r"^model\.layers\.0\.self_attn\.v_proj"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["target_modules"]) == set(read_adapter(tmp_path / "out").modules)
    equal = lora.merge(groups["equal"][1], "cat", tmp_path / "equal")
    assert sorted(json.loads((equal.out / "adapter_config.json").read_text())["target_modules"]) == sorted(ALL)
    again = lora.merge({"sum": tmp_path / "equal"}, "linear", tmp_path / "again")
    assert again.worst < 1e-6


class Grouped(torch.nn.Module):
    """A convolution in groups, whose B sees only a part of A's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


@pytest.mark.parametrize("method", ["cat", "average", "resize"])
def test_peft_loads_a_convolution_in_groups(method: str, tmp_path: Path) -> None:
    """The rank of peft is the number of A's rows, of all groups together."""

    def make() -> Grouped:
        torch.manual_seed(0)
        return Grouped()

    def run(folder: Path) -> Tensor:
        with torch.no_grad():
            return loaded(make, {"x": folder})(image) - make()(image)

    image = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["conv"]}
    paths = {f"a{seed}": adapter(tmp_path / f"a{seed}", make, seed, **settings) for seed in (1, 2)}
    if method == "cat":
        lora.merge(paths, "cat", tmp_path / "out", weight=(0.5, -2.0))
        want = 0.5 * run(paths["a1"]) - 2.0 * run(paths["a2"])
    elif method == "average":
        again = adapter(tmp_path / "again", make, 1, **settings)
        lora.merge({"one": paths["a1"], "same": again}, "average", tmp_path / "out")
        want = run(paths["a1"])
    else:
        lora.resize(paths["a1"], tmp_path / "out", rank=4)
        want = run(paths["a1"])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert config["r"] == len(tensors["base_model.model.conv.lora_A.weight"])
    assert want.abs().max() > 0.01
    torch.testing.assert_close(run(tmp_path / "out"), want, atol=1e-5, rtol=1e-5)
    for name, rank in (("half", 2), ("least", 1)):  # of both groups together, but one for each
        for made in (
            lora.resize(paths["a1"], tmp_path / f"r-{name}", rank=rank),
            lora.merge(paths, "svd", tmp_path / f"m-{name}", rank=rank),
        ):
            assert json.loads((made.out / "adapter_config.json").read_text())["r"] == 2
            assert run(made.out).abs().max() > 0.01
    assert any(
        "convolution in 2 groups: of rank 2" in text
        for text in texts(lora.resize(paths["a1"], tmp_path / "again_", rank=1).warnings)
    )


def test_a_module_that_is_said_to_be_kept_and_is_not_in_the_file(tmp_path: Path) -> None:
    """Peft 0.21.2 ends with a KeyError; 'score' beside 'classifier' is its own default for classifiers."""
    make = adapter(tmp_path / "a", llama, 1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    llama().save_pretrained(tmp_path / "base")
    file = make / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}
    save_file(kept, file, {"format": "pt"})
    said = "modules_to_save names 'lm_head', but the file holds no tensor of it: peft cannot load"
    assert [text.startswith(said) for text in read_adapter(make).says] == [True]
    with pytest.raises(SourceError, match=r"but the file holds no tensor of it: peft cannot load it either; save the"):
        AdapterSource(make, open_source(tmp_path / "base"))
    with pytest.raises(KeyError):
        loaded(llama, {"a": make})
    assert not_saved({"modules_to_save": ["classifier", "score"]}, ["classifier.weight"]) == []
    assert not_saved({"modules_to_save": ["dense"]}, ["x.dense.weight"]) == []


def test_what_several_tensors_have_in_common_is_one_warning(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    one = adapter(tmp_path / "one", llama, 1, **config, modules_to_save=["lm_head", "norm"])
    two = adapter(tmp_path / "two", llama, 2, **config)
    said = [warning.text for warning in lora.merge({"one": one, "two": two}, "svd", tmp_path / "out").warnings]
    (kept,) = [text for text in said if "kept in full" in text]
    assert kept == (
        "6 tensors (lm_head.weight, model.layers.0.input_layernorm.weight, ...) are kept in full by one alone: "
        "copied, whatever the weights"
    )
    assert len(set(said)) == len(said)
