"""Routed experts: equal to explicit weights, whatever the batch; the router; adapters for servers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import generate, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.jobs.compress import compress
from weightsmith.recipe.load import load
from weightsmith.runtime import Routed, Router, compare, train_router
from weightsmith.runtime.export import export
from weightsmith.runtime.routed import _plain

# peft asks transformers under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NAMES = ("math", "code", "law")
IDS = torch.randint(1, 100, (4, 17), generator=torch.Generator().manual_seed(5))
WEIGHTS = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])


def family(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A base and three experts of it, whose every parameter differs."""
    base = tiny(kind, **changes)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(NAMES):
        expert = tiny(kind, **changes)
        noise = torch.Generator().manual_seed(seed + 10)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
        expert.save_pretrained(folder / name)
    return folder


def compressed(folder: Path, codec: Any = None, method: Any = None, name: str = "twins") -> Path:
    """The family compressed: by default by `twin` at full rank."""
    stages = [
        *([{"task_arithmetic": {"lambda": 0.3}}] if method is None else method),
        codec or {"twin": {"density": 1.0}},
    ]
    recipe = {
        "base": str(folder / "base"),
        "models": {name: str(folder / name) for name in NAMES},
        "method": stages,
    }
    (folder / f"{name}.json").write_text(json.dumps(recipe))
    compress(load(folder / f"{name}.json"), folder / name, accept_loss=True)
    return folder / name


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("llamas"), vocab_size=256)


@pytest.fixture(scope="module")
def twins(llamas: Path) -> Path:
    return compressed(llamas, {"twin": {"density": 0.25}})


def logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi", {})],
)
def test_one_hot_weights_are_the_experts_and_any_mixture_the_built_weights(
    kind: str, changes: dict, tmp_path: Path
) -> None:
    folder = family(tmp_path, kind, **changes)
    model = Routed.load(compressed(folder))
    with torch.no_grad():
        found = model(input_ids=IDS, experts=[*NAMES, None]).logits
        for row, name in enumerate(NAMES):
            assert float((found[row] - logits(folder / name, IDS[row : row + 1])[0]).abs().max()) < 5e-5
        mixed, plain = model(input_ids=IDS, experts=WEIGHTS).logits, _plain(model)
        for row in range(4):
            assert not plain.load_state_dict(model.explicit(WEIGHTS[row]), strict=False).unexpected_keys
            assert float((mixed[row] - plain(IDS[row : row + 1]).logits[0]).abs().max()) < 5e-5


def test_equal_weights_are_the_mean_of_the_experts(llamas: Path) -> None:
    model = Routed.load(compressed(llamas, name="whole"))
    found = model.explicit(dict.fromkeys(NAMES, 1 / 3))
    stored = [load_file(llamas / name / "model.safetensors") for name in NAMES]
    assert set(found) == set(stored[0])
    for name, value in found.items():
        assert torch.allclose(value, sum(own[name] for own in stored) / 3, atol=2e-6)


def test_the_residual_is_what_the_spectrum_drops_and_a_low_density_the_shared_model(llamas: Path, twins: Path) -> None:
    model = Routed.load(twins)
    shared, expert = model.explicit({}), load_file(llamas / "code" / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    dropped = torch.linalg.svdvals((expert[name] - shared[name]).double())[16:]
    assert math.isclose(
        float((expert[name] - model.explicit({"code": 1.0})[name]).norm()), float(dropped.norm()), rel_tol=1e-4
    )
    least = Routed.load(compressed(llamas, {"twin": {"density": 0.001}}, name="least"))
    change = least.explicit({"code": 1.0})[name] - least.explicit({})[name]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 1


def test_the_base_is_shared_by_experts_of_tsvc(llamas: Path) -> None:
    model = Routed.load(compressed(llamas, {"tsvc": {"rank_fraction": 1.0}}, method=[], name="tsvc"))
    with torch.no_grad():
        found = model(input_ids=IDS, experts=[*NAMES, "math"]).logits
    assert float((found[1] - logits(llamas / "code", IDS[1:2])[0]).abs().max()) < 5e-5
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(model.explicit({})[name], load_file(llamas / "base" / "model.safetensors")[name])


def test_a_mixed_batch_generates_what_each_sample_does_alone(twins: Path) -> None:
    model = Routed.load(twins)
    chosen = ["law", "math", None, "code"]
    together = model.generate(input_ids=IDS, experts=chosen, max_new_tokens=12, do_sample=False)
    beams = model.generate(input_ids=IDS, experts=chosen, max_new_tokens=8, num_beams=3, do_sample=False)
    for row, name in enumerate(chosen):
        own = {"input_ids": IDS[row : row + 1], "experts": [name], "do_sample": False}
        assert torch.equal(together[row], model.generate(**own, max_new_tokens=12)[0])
        assert torch.equal(beams[row], model.generate(**own, max_new_tokens=8, num_beams=3)[0])


def test_bytes_and_speed_are_reported(twins: Path) -> None:
    model = Routed.load(twins)
    stored = load_file(twins / "experts.safetensors")
    numbers = sum(x.numel() for name, x in stored.items() if "::tau" not in name and "::s." not in name)
    assert model.sizes["branches"] == 4 * numbers
    assert model.sizes["experts"] == 3 * model.sizes["shared"]
    found = compare(model, {"input_ids": IDS}, WEIGHTS, repeat=1)
    assert found.ratio == found.routed / found.built > 0
    assert compare(model, {"input_ids": IDS}, WEIGHTS, new_tokens=2, repeat=1).built > 0


# --- the router ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(llamas: Path, twins: Path) -> Path:
    for name, letters in (("math", "0123456789"), ("code", "{};()="), ("law", "the of ")):
        noise = torch.randint(len(letters), (3000,), generator=torch.Generator().manual_seed(len(letters)))
        (llamas / f"{name}.txt").write_text("".join(letters[i] for i in noise))
    data = [word for name in NAMES for word in ("--data", f"{name}={llamas / name}.txt")]
    words = ["train", "router", str(twins), str(llamas / "router"), *data, "--length", "32", "--steps", "60"]
    assert main([*words, "--hidden", "64", "--quiet", "--device", "cpu"]) == 0
    return llamas / "router"


def test_a_trained_router_sends_samples_to_their_experts(llamas: Path, twins: Path, router: Path) -> None:
    model = Routed.load(twins, router=router)
    text = [(llamas / f"{name}.txt").read_bytes()[:40] for name in NAMES]
    ids = torch.tensor([list(one) for one in text])
    found = model.route(ids)
    assert found.argmax(1).tolist() == [0, 1, 2]
    assert torch.allclose(found.sum(1), torch.ones(3), atol=1e-5)
    # Padding on the left does not count.
    padded = torch.cat([torch.zeros(3, 7, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(3, 7), torch.ones(3, 40)], 1).long()
    positions = model.features(padded, mask)
    assert torch.allclose(positions, model.features(ids), atol=1e-4)
    top = model.limit(top_k=1).route(ids)
    assert (top != 0).sum(1).tolist() == [1, 1, 1]
    assert torch.allclose(top.sum(1), torch.ones(3))
    assert not bool(model.limit(reject=1.0).route(ids).any())
    with torch.no_grad():
        shared = model(input_ids=ids).logits
        model.limit()
        assert torch.equal(shared, model(input_ids=ids, experts=[None, None, None]).logits)
        assert not torch.allclose(shared, model(input_ids=ids).logits, atol=1e-3)


def test_a_router_is_tied_to_names_not_places(router: Path) -> None:
    one, other = Router.load(router), Router.load(router, ["law", "code", "math"])
    x = torch.randn(5, 64)
    assert torch.equal(one(x)[:, [2, 1, 0]], other(x))
    assert torch.equal(one.prototypes[[2, 1, 0]], other.prototypes)
    assert torch.allclose(one(x[:1]), one(x)[:1], atol=1e-6)  # running statistics: one sample is enough


def test_a_router_of_others_or_of_another_form_is_refused(router: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="routes to math, code, law, but the experts are math, chess"):
        Router.load(router, ["math", "chess"])
    with pytest.raises(SourceError, match=r"router\.json"):
        Router.load(tmp_path)
    (tmp_path / "router.json").write_text(json.dumps({"experts": ["a"], "width": 3, "hidden": 4}))
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "router.safetensors")
    with pytest.raises(SourceError, match="does not fit"):
        Router.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--data", "math"], "expected EXPERT=FILE"),
        (["--data", "math=a.txt", "--data", "math=b.txt"], "given twice"),
        (["--data", "maths=a.txt"], "did you mean 'math'"),
    ],
)
def test_bad_data_of_a_router(words: list[str], text: str, twins: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "router", str(twins), str(tmp_path / "out"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_expert_with_one_sample_is_refused(twins: Path, tmp_path: Path) -> None:
    model = Routed.load(twins)
    data = model.examples({name: [list(range(1, 9))] for name in NAMES})
    with pytest.raises(PlanError, match="math has one sample only"):
        train_router(model, data, tmp_path / "out")


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "method", "text"),
    [
        ({"twin": {"strategy": "magnitude"}}, None, "keeps place, tau, value, no singular triplets"),
        ({"tall_masks": {"lambda": 0.4}}, [], r"tall_masks\(.*\) keeps mask, tau"),
    ],
)
def test_folders_without_branches_are_refused(
    codec: Any, method: Any, text: str, llamas: Path, request: pytest.FixtureRequest
) -> None:
    folder = compressed(llamas, codec, method, name=str(abs(hash(text))))
    with pytest.raises(PlanError, match=text):
        Routed.load(folder)


def test_another_base_and_bad_choices_are_refused(llamas: Path, twins: Path) -> None:
    with pytest.raises(SourceError, match="was not made from"):
        Routed.load(twins, base=llamas / "code")
    model = Routed.load(twins)
    with pytest.raises(PlanError, match="did you mean 'math'"):
        model(input_ids=IDS, experts=["maths"] * 4)
    with pytest.raises(PlanError, match="experts of 3 samples for a batch of 4"):
        model(input_ids=IDS, experts=["math"] * 3)
    with pytest.raises(PlanError, match=r"weights must be \[samples, 3\]"):
        model(input_ids=IDS, experts=torch.ones(4, 2))
    with pytest.raises(PlanError, match="no router was loaded"):
        model(input_ids=IDS)
    with pytest.raises(PlanError, match="top_k = 4"):
        model.limit(top_k=4)
    model.use(["math", "code", None])
    with pytest.raises(PlanError, match="chosen for 3 samples, but a batch of 4"):
        model.module(input_ids=IDS)


def test_experts_of_a_mixture_of_experts_are_refused(tmp_path: Path) -> None:
    folder = compressed(family(tmp_path, "deepseek"))
    with pytest.raises(PlanError, match="experts"):
        Routed.load(folder)


# --- for servers -----------------------------------------------------------------------------------


def test_peft_runs_the_exported_adapters_as_the_experts(twins: Path, router: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = export(twins, tmp_path / "served", router=router)
    model = Routed.load(twins)
    about = json.loads(found.index.read_text())
    assert list(about["adapters"]) == list(NAMES)
    held = load_file(tmp_path / "served" / about["prototypes"])["prototypes"]
    assert torch.equal(held, Router.load(router).prototypes)
    shared = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / about["model"])
    with torch.no_grad():
        want = model(input_ids=IDS, experts=[*NAMES, None]).logits
        assert float((shared(IDS[3:]).logits[0] - want[3]).abs().max()) < 5e-5
        for row, name in enumerate(NAMES):
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / "shared")
            own = PeftModel.from_pretrained(base, tmp_path / "served" / about["adapters"][name])
            assert float((own(IDS[row : row + 1]).logits[0] - want[row]).abs().max()) < 5e-5


def test_adapters_joined_by_cat_are_the_mixture(twins: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(twins, tmp_path / "served", matrices_only=True)
    place = tmp_path / "served" / "adapters"
    joined = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "served" / "shared"), place / "math", adapter_name="math"
    )
    joined.load_adapter(place / "code", "code")
    joined.add_weighted_adapter(["math", "code"], [0.3, 0.7], "both", combination_type="cat")
    layer = joined.base_model.model.model.layers[1].self_attn.q_proj
    want = Routed.load(twins).explicit({"math": 0.3, "code": 0.7})["model.layers.1.self_attn.q_proj.weight"]
    got = layer.base_layer.weight + layer.get_delta_weight("both")
    assert torch.allclose(got, want, atol=2e-6)


def test_an_export_over_a_folder_that_is_there_is_refused(twins: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(PlanError, match="overwrite"):
        export(twins, tmp_path)
    assert main(["lora", "experts", str(twins), str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_tiny_models_generate(llamas: Path) -> None:
    """The helper's own: greedy tokens of a plain model."""
    assert generate(tiny(), {"input_ids": IDS}, 3).sequences.shape == (4, 20)
