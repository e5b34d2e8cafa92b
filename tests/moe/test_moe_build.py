"""Mixtures of experts: closed forms, copies bit for bit, folders that transformers loads, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kit import texts
from moe.dense_models import moved, saved
from weightsmith.core.errors import PlanError
from weightsmith.moe import router
from weightsmith.moe.build import build, drifts, made_routers, prepared_draft, rerun
from weightsmith.moe.recipe import MoeRecipe
from weightsmith.ops.noise import normal

IDS = torch.arange(3, 19)[None]
PROMPTS = {"one": ["add two numbers", "solve x"], "two": ["write a poem"], "three": ["fix this code", "def f():"]}


def recipe(base: Path, models: dict[str, Path], **more: Any) -> MoeRecipe:
    experts = {n: {"model": str(m), "prompts": PROMPTS[n]} for n, m in models.items()}
    return MoeRecipe.model_validate({"base": str(base), "experts": experts, **more})


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    base = saved(root / "base", "Llama", 0)
    return {"base": base, **{n: moved(base, root / n, i + 1) for i, n in enumerate(PROMPTS)}}


# A shared expert with residual 0 adds nothing: what is left is the routed part alone.
SHARED = {"always": {"residual": 0.0}}
CASES = {
    "mixtral": ("Llama", {}, {}),
    "mixtral-mistral": ("Mistral", {"sliding_window": None}, {}),
    "qwen": ("Qwen2", {}, {"shared": {"always": {"residual": 0.0, "prompts": ["anything"]}}}),
    "qwen3": ("Qwen3", {"head_dim": 8}, {}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}, {}),
    "glm4_moe": ("Llama", {}, {"shared": SHARED}),
    "glm4_moe-qwen2": ("Qwen2", {}, {"shared": SHARED, "architecture": "glm4_moe"}),
}


def equal_experts(case: str, base: Path, out: Path) -> dict[str, Any]:
    """Build a mixture of copies of the base, compare it with the base, and return its config."""
    extra = CASES[case][2]
    shared = {n: {"model": str(base), **e} for n, e in extra.get("shared", {}).items()}
    made = recipe(
        base, dict.fromkeys(PROMPTS, base), router="cheap_embed", for_training=True, **{**extra, "shared": shared}
    )
    build(made, out)
    torch.testing.assert_close(logits(out), logits(base), rtol=1e-4, atol=1e-5)
    from transformers import AutoModelForCausalLM

    said = AutoModelForCausalLM.from_pretrained(out).generate(IDS, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    assert said.shape == (1, IDS.shape[1] + 2)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


@pytest.mark.parametrize("case", CASES)
def test_equal_experts_compute_the_dense_model(case: str, tmp_path: Path) -> None:
    family, more, _ = CASES[case]
    config = equal_experts(case, saved(tmp_path / "base", family, 7, **more), tmp_path / "out")
    assert config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("case", ["mixtral", "qwen", "qwen3", "glm4_moe"])
def test_configs_of_transformers_4_keep_their_positions(case: str, tmp_path: Path) -> None:
    """They say rope_theta where newer ones have rope_parameters."""
    family, more, _ = CASES[case]
    base = saved(tmp_path / "base", family, 7, **more)
    path = base / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rope_theta": 50.0, "rope_scaling": None, "torch_dtype": "float32"}))
    assert equal_experts(case, base, tmp_path / "out")["rope_theta"] == 50.0


def test_every_tensor_is_its_source_bit_for_bit(llama: dict[str, Path], tmp_path: Path) -> None:
    names = list(PROMPTS)
    out = build(recipe(llama["base"], {n: llama[n] for n in names}, router="cheap_embed"), tmp_path / "out").out
    got, base = load_file(out / "model.safetensors"), load_file(llama["base"] / "model.safetensors")
    experts = [load_file(llama[n] / "model.safetensors") for n in names]
    words = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    routers = 0
    for name, value in got.items():
        if ".experts." in name:
            head, _, tail = name.partition(".block_sparse_moe.experts.")
            number, word, _ = tail.split(".")
            assert torch.equal(value, experts[int(number)][f"{head}.mlp.{words[word]}.weight"])
        elif name.endswith("gate.weight"):
            torch.testing.assert_close(value.norm(dim=1), torch.ones(3))
            routers += 1
        else:
            assert torch.equal(value, base[name])
    assert routers == 2
    assert set(base) - set(got) == {n for n in base if ".mlp." in n}
    assert rerun(out) == []


def test_one_expert_is_its_mlp_on_the_base(llama: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = recipe(llama["base"], {"one": llama["one"]}, router="random", experts_per_token=1)
    out = build(made, tmp_path / "out").out
    dense = AutoModelForCausalLM.from_pretrained(llama["base"]).eval()
    donor = load_file(llama["one"] / "model.safetensors")
    dense.load_state_dict({n: t for n, t in donor.items() if ".mlp." in n}, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(logits(out), dense(IDS).logits, rtol=1e-4, atol=1e-5)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (1, IDS.shape[1] + 3)


def test_a_router_sends_states_of_its_prompts_to_their_expert(llama: dict[str, Path]) -> None:
    """Rows are the prompts' own states: the state of a prompt's last token lies nearest to its own row."""
    from weightsmith.moe.prompts import states
    from weightsmith.observe.model import load_model

    single = {n: {"model": str(llama[n]), "prompts": [PROMPTS[n][0]]} for n in PROMPTS}
    for site in ("residual", "mlp_input"):
        made = MoeRecipe.model_validate({"base": str(llama["base"]), "experts": single, "site": site})
        rows = made_routers(prepared_draft(made))
        loaded = load_model(llama["base"])
        for number, name in enumerate(PROMPTS):
            state = states(loaded, [tuple(PROMPTS[name][0].encode())], whole=False, site=site).float()
            for layer, matrix in enumerate(rows.values()):
                torch.testing.assert_close(matrix[number], state[layer] / state[layer].norm())
                assert int((matrix @ state[layer]).argmax()) == number


def test_states_enter_the_layer_or_its_mlp(llama: dict[str, Path]) -> None:
    from weightsmith.moe.prompts import states
    from weightsmith.observe.model import load_model

    loaded = load_model(llama["base"])
    base = load_file(llama["base"] / "model.safetensors")
    ids = (5, 9, 2)
    embedded = base["model.embed_tokens.weight"][list(ids)].double()
    torch.testing.assert_close(states(loaded, [ids], whole=False, site="residual")[0], embedded[-1])
    torch.testing.assert_close(states(loaded, [ids], whole=True, site="residual")[0], embedded.mean(0))
    seen = states(loaded, [ids], whole=False, site="mlp_input")
    torch.testing.assert_close(seen.square().mean(1), torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_routers_do_not_depend_on_the_order_of_prompts(mode: str, llama: dict[str, Path]) -> None:
    def rows(order: int) -> dict[str, torch.Tensor]:
        experts = {n: {"model": str(llama[n]), "prompts": PROMPTS[n][::order], "avoid": ["no"]} for n in PROMPTS}
        made = MoeRecipe.model_validate({"base": str(llama["base"]), "experts": experts, "router": mode})
        return made_routers(prepared_draft(made))

    forward, backward = rows(1), rows(-1)
    for name, value in forward.items():
        assert torch.equal(value, backward[name])
        torch.testing.assert_close(value.norm(dim=1), torch.ones(3))


def test_random_routers_and_noise_follow_the_seed(llama: dict[str, Path], tmp_path: Path) -> None:
    def made(seed: int, mode: str = "random") -> dict[str, torch.Tensor]:
        experts = {n: {"model": str(llama[n]), "noise": 0.1, "residual": 0.5} for n in PROMPTS}
        built = MoeRecipe.model_validate({"base": str(llama["base"]), "experts": experts, "router": mode, "seed": seed})
        out = build(built, tmp_path / f"{mode}-{seed}", overwrite=True, drift=False).out
        return load_file(out / "model.safetensors")

    one, again, other = made(1), made(1), made(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(one[gate], other[gate])
    up, down = (
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
        "model.layers.0.block_sparse_moe.experts.0.w2.weight",
    )
    donor = load_file(llama["one"] / "model.safetensors")
    noise = one[up] - donor["model.layers.0.mlp.up_proj.weight"]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert float(noise.mean().abs()) < 0.01
    halved = one[down] - 0.5 * donor["model.layers.0.mlp.down_proj.weight"]
    assert float(halved.std()) == pytest.approx(0.05, rel=0.1)
    uniform = made(3, "uniform_random")[gate]
    assert float(uniform.abs().max()) <= 32**-0.5
    assert float(uniform.abs().max()) > 0.9 * 32**-0.5


def test_deepseek_has_its_names_and_shared_experts_side_by_side(llama: dict[str, Path], tmp_path: Path) -> None:
    shared = {"a": {"model": str(llama["base"])}, "b": {"model": str(llama["three"])}}
    models = {n: llama[n] for n in ("one", "two")}
    made = recipe(llama["base"], models, router="cheap_embed", shared=shared, architecture="deepseek")
    result = build(made, tmp_path / "out")
    out = result.out
    assert any("transformers has no class for DeepseekForCausalLM" in text for text in texts(result.warnings))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DeepseekForCausalLM"]
    assert config["n_shared_experts"] == 2
    got = load_file(out / "model.safetensors")
    donors = [load_file(llama[n] / "model.safetensors") for n in ("base", "three")]
    for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        want = torch.cat([d[f"model.layers.1.mlp.{part}.weight"] for d in donors], axis)
        assert torch.equal(got[f"model.layers.1.mlp.shared_experts.{part}.weight"], want)
    assert "model.layers.1.mlp.experts.1.gate_proj.weight" in got
    # What the published code does with these: h -> sum of the chosen experts by softmax weights, plus the shared ones.
    x = torch.randn(5, 32)
    shared_out = [_mlp(d, x) for d in donors]
    wide = {p: got[f"model.layers.1.mlp.shared_experts.{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj")}
    both = (torch.nn.functional.silu(x @ wide["gate_proj"].T) * (x @ wide["up_proj"].T)) @ wide["down_proj"].T
    torch.testing.assert_close(both, sum(shared_out))


class PublishedMoe(torch.nn.Module):
    """DeepSeekMoE as it was published: the chosen experts by softmax, their weights summing to one, and the shared."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        def mlp(count: int) -> torch.nn.Module:
            sizes = {"hidden_size": config["hidden_size"], "intermediate_size": count * config["moe_intermediate_size"]}
            return LlamaMLP(LlamaConfig(**sizes))

        self.chosen = config["num_experts_per_tok"]
        self.gate = torch.nn.Linear(config["hidden_size"], config["n_routed_experts"], bias=False)
        self.experts = torch.nn.ModuleList(mlp(1) for _ in range(config["n_routed_experts"]))
        self.shared_experts = mlp(config["n_shared_experts"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, places = self.gate(x).softmax(-1).topk(self.chosen)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        picked = every.gather(-2, places.unsqueeze(-1).expand(*places.shape, x.shape[-1]))
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights.unsqueeze(-1) * picked).sum(-2) + self.shared_experts(x)


def test_deepseek_runs_by_its_published_rule(llama: dict[str, Path], tmp_path: Path) -> None:
    """In a Llama whose MLPs are replaced: every tensor has a place, equal experts are the dense model, it generates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = llama["base"]
    shared = {"always": {"model": str(base), "residual": 0.0}}
    made = recipe(base, dict.fromkeys(PROMPTS, base), router="cheap_embed", for_training=True, shared=shared,
                  architecture="deepseek")  # fmt: skip
    out = build(made, tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{**config, "model_type": "llama"})).eval()
    for layer in model.model.layers:
        layer.mlp = PublishedMoe(config)
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, logits(base), rtol=1e-4, atol=1e-5)
        assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (1, IDS.shape[1] + 3)


def test_no_class_of_transformers_has_deepseeks_experts_and_llamas_attention() -> None:
    """Why the layout `deepseek` needs other code there.  When this fails, it no longer does."""
    from transformers import CONFIG_MAPPING, DeepseekV3Config, DeepseekV3ForCausalLM

    assert "deepseek" not in CONFIG_MAPPING
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 16, "num_attention_heads": 2}
    with torch.device("meta"):
        attention = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).model.layers[0].self_attn
    assert not hasattr(attention, "k_proj")
    assert attention.kv_a_proj_with_mqa.out_features == attention.kv_lora_rank + attention.qk_rope_head_dim


def test_without_a_name_the_architecture_is_one_that_transformers_loads(llama: dict[str, Path]) -> None:
    always = {"model": str(llama["base"])}
    for shared, name in (
        ({}, "mixtral"),
        ({"s": {**always, "prompts": ["x"]}}, "qwen"),
        ({"s": always}, "glm4_moe"),
        ({"s": always, "t": always}, "glm4_moe"),
    ):
        made = recipe(llama["base"], {n: llama[n] for n in ("one", "two")}, router="cheap_embed", shared=shared)
        assert prepared_draft(made).layout.name == name


def test_sigmoids_of_routers_do_not_round_to_one(llama: dict[str, Path]) -> None:
    shared = {"s": {"model": str(llama["base"])}}
    made = recipe(llama["base"], {n: llama[n] for n in PROMPTS}, router="cheap_embed", shared=shared)
    rows = made_routers(prepared_draft(made))["model.layers.0.mlp.gate.weight"]
    torch.testing.assert_close(rows.norm(dim=1), torch.full((3,), 4 / 32**0.5))
    assert (torch.sigmoid(rows.norm(dim=1) * 32**0.5) < 0.99).all()  # with the state most like it, sqrt(32) long


def _mlp(model: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (model[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_condition_numbers_and_drift_are_told(llama: dict[str, Path], tmp_path: Path) -> None:
    assert router.condition(torch.eye(3, 8)) == pytest.approx(1)
    assert router.condition(torch.tensor([[1.0, 0, 0], [0, 0.1, 0]])) == pytest.approx(10)
    alike = {n: {"model": str(llama[n]), "prompts": [[*range(40), 50 + i]]} for i, n in enumerate(("one", "two"))}
    made = MoeRecipe.model_validate({"base": str(llama["base"]), "experts": alike, "router": "cheap_embed"})
    base = load_file(llama["base"] / "model.safetensors")
    rows = {n: base["model.embed_tokens.weight"][list(e.prompts[0])].sum(0) for n, e in made.experts.items()}
    matrix = torch.stack([r / r.norm() for r in rows.values()])
    told = [w for w in texts(build(made, tmp_path / "out").warnings) if "condition" in w]
    assert router.condition(matrix) > router.ILL_CONDITIONED
    assert len(told) == 1
    assert f"{router.condition(matrix):.3g}" in told[0]
    found = drifts(prepared_draft(made))[0]
    one = load_file(llama["one"] / "model.safetensors")
    for wanted, got in ((True, found.mlp), (False, found.dropped)):
        names = [n for n in base if (".mlp." in n) == wanted]
        gap = sum(float((one[n].double() - base[n].double()).square().sum()) for n in names)
        size = sum(float(base[n].double().square().sum()) for n in names)
        assert got == pytest.approx((gap / size) ** 0.5, rel=1e-9)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"experts_per_token": 4}, r"experts_per_token = 4, but the recipe names 3"),
    "no prompts": ({"experts.one.prompts": []}, r"one: router 'hidden' needs prompts"),
    "same prompts": ({f"experts.{n}.prompts": ["x"] for n in PROMPTS}, r"all experts have the same prompts"),
    "same models": ({f"experts.{n}.model": "BASE" for n in PROMPTS}, r"all experts are the same model"),
    "taken name": ({"shared": {"one": {"model": "BASE"}}}, r"cannot be called 'one'"),
    "qwen": ({"architecture": "qwen"}, r"qwen needs exactly one shared expert; the recipe has 0"),
    "qwen3": ({"architecture": "qwen3"}, r"qwen3 holds qwen3 models; the base is 'llama'"),
    "mixtral": ({"architecture": "mixtral", "shared": {"s": {"model": "BASE"}}}, r"mixtral has no shared experts"),
    "useless prompts": (
        {"architecture": "deepseek", "shared": {"s": {"model": "BASE", "prompts": ["x"]}}},
        r"deepseek adds its shared experts as they are; prompts have no use",
    ),
    "missing": ({"experts.two.model": "nowhere/at/all"}, r"two: nowhere/at/all: no such file or folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, llama: dict[str, Path]) -> None:
    changes, text = REFUSED[case]
    tree = {
        "base": str(llama["base"]),
        "experts": {n: {"model": str(llama[n]), "prompts": list(PROMPTS[n])} for n in PROMPTS},
    }
    for place, value in changes.items():
        *path, last = place.split(".")
        at: Any = tree
        for step in path:
            at = at[step]
        at[last] = json.loads(json.dumps(value).replace("BASE", str(llama["base"])))
    with pytest.raises(PlanError, match=text):
        prepared_draft(MoeRecipe.model_validate(tree))


def test_models_of_other_sizes_are_refused(llama: dict[str, Path], tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide", "Llama", 1, intermediate_size=64)
    big = saved(tmp_path / "big", "Llama", 1, hidden_size=64)
    deep = saved(tmp_path / "deep", "Llama", 1, num_hidden_layers=3)
    biased = saved(tmp_path / "biased", "Llama", 1, mlp_bias=True)
    for folder, text in (
        (wide, r"MLPs of unlike sizes: 64 \(one\), 48 \(two\)"),
        (big, r"one: hidden size 64, the base has 32"),
        (deep, r"one has 3 blocks with an MLP, the base has 2"),
        (biased, r"one: model.layers.0.mlp.*bias: MLPs with biases have no place"),
    ):
        with pytest.raises(PlanError, match=text):
            prepared_draft(recipe(llama["base"], {"one": folder, "two": llama["two"]}))
    attention = saved(tmp_path / "attention", "Llama", 1, attention_bias=True)
    with pytest.raises(PlanError, match="mixtral has no place for the biases of the base's attention"):
        prepared_draft(recipe(attention, {"one": attention, "two": llama["two"]}, architecture="mixtral"))


def test_normal_numbers_are_normal_and_do_not_depend_on_blocks() -> None:
    whole = normal(1, "w", "one", "moe", 0, 20_000)
    pieces = [normal(1, "w", "one", "moe", low, min(777, 20_000 - low)) for low in range(0, 20_000, 777)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert abs(whole.mean()) < 4 / 20_000**0.5
    assert abs(whole.std() - 1) < 4 / 40_000**0.5
    assert np.mean(np.abs(whole) < 1) == pytest.approx(0.6827, abs=4 * (0.6827 * 0.3173 / 20_000) ** 0.5)
    assert not np.array_equal(whole, normal(1, "w", "two", "moe", 0, 20_000))
