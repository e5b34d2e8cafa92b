"""mergekit's configs through the whole program: what it made of them (goldens), what they become, what is refused."""

# ruff: noqa: E501  one mistake, one line

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens.adapters import Case, cases
from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.jobs.merge import run as merge
from weightsmith.recipe.load import loads
from weightsmith.recipe.mergekit_methods import METHODS
from weightsmith.recipe.text import dumps, to_tree

GOLDEN = [case for case in cases() if case.method.startswith("mergekit:")]


def write(folder: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, **config}))
    return folder


def small(seed: int, layers: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    return {name: torch.randn(4, 4, generator=generator).to(dtype) for name in names}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for i, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, small(i))
    return tmp_path


def run(text: str, folder: Path, out: str = "out") -> dict[str, torch.Tensor]:
    merge(loads(text, "m.yml", folder=folder), folder / out, overwrite=True)
    return load_file(folder / out / "model.safetensors")


# --- what it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(c, id=c.path.stem) for c in GOLDEN])
def test_golden_config(case: Case, tmp_path: Path) -> None:
    for name, state in {"base": case.base, **case.experts}.items():
        write(tmp_path / name, state)
    text = case.params["yaml"]
    out = run(text, tmp_path)
    again = run(dumps(loads(text, "m.yml", folder=tmp_path)), tmp_path, "again")
    outside, total = 0, 0
    assert set(out) == set(case.expected)
    for name, want in case.expected.items():
        assert torch.equal(out[name], again[name]), "the converted recipe gives other bytes"
        error = (out[name].double() - want.double()).abs()
        outside += int((error > float(case.meta["atol"]) + float(case.meta["rtol"]) * want.double().abs()).sum())
        total += want.numel()
    assert outside <= float(case.meta.get("mismatch_fraction", 0)) * total


def test_every_method_name_of_mergekit_is_known() -> None:
    wanted = "linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties breadcrumbs "
    wanted += "breadcrumbs_ties della della_linear sce ram ramplus_tl model_stock nearswap arcee_fusion passthrough"
    assert sorted(METHODS) == sorted(wanted.split())


def test_gradients_filters_and_what_lies_outside_the_layers(models: Path) -> None:
    a, b = small(1), small(2)
    merged = run(
        "models:\n  - {model: a, parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: [0.2, 0.6, 0.4]}]}}\n"
        "  - {model: b, parameters: {weight: 1}}\nmerge_method: linear\nparameters: {normalize: false}",
        models,
    )
    weights = {f"model.layers.{i}.mlp.up_proj.weight": i / 2 for i in range(3)}
    weights |= {f"model.layers.{i}.self_attn.q_proj.weight": w for i, w in enumerate((0.2, 0.6, 0.4))}
    weights |= dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), 0.2)
    assert set(merged) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(merged[name], a[name] * weight + b[name])


def test_whose_value_counts(models: Path) -> None:
    """A source's before its slice's before the recipe's; filters that match nothing leave it to the next."""
    source = "{model: a, layer_range: [%d, %d]%s}"
    text = f"""
slices:
  - sources: [{source % (0, 1, ", parameters: {weight: [{filter: mlp, value: 5}]}")}]
    parameters: {{weight: [{{filter: q_proj, value: 7}}]}}
  - sources: [{source % (1, 2, "")}]
    parameters: {{weight: [{{filter: q_proj, value: 11}}]}}
  - sources: [{source % (2, 3, "")}]
merge_method: linear
parameters: {{weight: [{{filter: embed, value: 3}}, {{value: 2}}], normalize: false}}
"""
    merged, a = run(text, models), small(1)
    want = {(0, "mlp.up_proj"): 5, (0, "self_attn.q_proj"): 7, (1, "mlp.up_proj"): 2, (1, "self_attn.q_proj"): 11}
    want |= {(2, "mlp.up_proj"): 2, (2, "self_attn.q_proj"): 2}
    factors = {f"model.layers.{i}.{part}.weight": factor for (i, part), factor in want.items()}
    factors |= {"model.embed_tokens.weight": 3, "model.norm.weight": 2, "lm_head.weight": 2}
    assert set(merged) == set(factors)
    for name, factor in factors.items():
        torch.testing.assert_close(merged[name], a[name] * factor)


def test_the_one_layer_of_a_slice_is_the_end_of_a_gradient(models: Path) -> None:
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: [0.25, 0.5]}}]
  - sources: [{model: a, layer_range: [1, 3], parameters: {weight: [3, 4, 7]}}]
merge_method: linear
parameters: {normalize: false}
"""
    merged, a = run(text, models), small(1)
    for i, factor in enumerate((0.5, 3, 7)):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        torch.testing.assert_close(merged[name], a[name] * factor)


def test_filters_mean_the_models_own_layer_numbers(models: Path) -> None:
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
merge_method: passthrough
parameters: {scale: [{filter: layers.1.mlp, value: 0.5}, {filter: layers.2, value: 3}, {value: 1}]}
"""
    merged, a, b = run(text, models), small(1), small(2)
    for out, (model, block) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            scale = 3 if block == 2 else 0.5 if block == 1 and part == "mlp.up_proj" else 1
            name = f"model.layers.{block}.{part}.weight"
            assert torch.equal(merged[f"model.layers.{out}.{part}.weight"], model[name] * scale)
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], b["model.norm.weight"])
    assert json.loads((models / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_required_weights_may_be_covered_by_filters_or_are_missing(models: Path) -> None:
    part = "models: [{model: a, parameters: {weight: [%s]}}]\nmerge_method: linear"
    most = "{filter: layers, value: 1}, {filter: embed, value: 1}, {filter: norm, value: 1}"
    run(part % (most + ", {filter: head, value: 1}"), models)
    with pytest.raises(PlanError, match=r"weight has no value for lm_head\.weight; add a case for it"):
        run(part % most, models)


def test_the_base_counts_where_mergekit_counts_it(models: Path) -> None:
    merged = run("models: [{model: a}]\nmerge_method: linear\nbase_model: base\nparameters: {weight: 1}", models)
    torch.testing.assert_close(merged["lm_head.weight"], (small(0)["lm_head.weight"] + small(1)["lm_head.weight"]) / 2)
    with pytest.raises(PlanError, match="passthrough: takes 1 model"):
        run("models: [{model: a}]\nmerge_method: passthrough\nbase_model: base", models)


def test_named_merges_that_use_one_another(models: Path) -> None:
    text = """
name: half
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
merge_method: linear
---
models: [{model: half, parameters: {weight: 0.5}}]
merge_method: task_arithmetic
base_model: base
"""
    merged = run(text, models)
    base, a, b = (small(i)["lm_head.weight"] for i in range(3))
    torch.testing.assert_close(merged["lm_head.weight"], base + 0.5 * ((a + b) / 2 - base))
    loop = text.replace("model: a,", "model: half,")
    with pytest.raises(RecipeError, match=r"m\.yml:3:\d+: circular reference between merges: half -> half"):
        loads(loop, "m.yml")
    with pytest.raises(RecipeError, match="a second document begins here"):
        loads("models: {a: x}\nmethod: linear\n---\n" + text, "m.yml")
    two = text.replace("name: half", "# none")
    with pytest.raises(RecipeError, match=r"one merge must be the result"):
        loads(two, "m.yml")


def test_adapters_are_put_on_first(models: Path) -> None:
    left, right = torch.randn(4, 2), torch.randn(2, 4)
    adapter = models / "lora"
    adapter.mkdir()
    names = {f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{side}.weight": part
             for i in range(3) for side, part in (("A", right + i), ("B", left))}  # fmt: skip
    save_file({n: t.clone() for n, t in names.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = run("models: [{model: a+lora, parameters: {weight: 1}}]\nmerge_method: linear", models)
    for i in range(3):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        torch.testing.assert_close(merged[name], small(1)[name] + 2 * left @ (right + i))
    assert torch.equal(merged["lm_head.weight"], small(1)["lm_head.weight"])


def test_modules_have_their_own_slices(tmp_path: Path) -> None:
    def model(seed: int) -> dict[str, torch.Tensor]:
        vision = {f"vision_tower.blocks.{i}.w": torch.full((2,), 100.0 * seed + i) for i in range(2)}
        return {
            **{f"language_model.{n}": t for n, t in small(seed).items()},
            **vision,
            "projector.w": torch.ones(1) * seed,
        }

    for i, name in enumerate(("base", "a", "b")):
        parts = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 2}}
        write(tmp_path / name, model(i), **parts)
    text = """
modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 1]}]
      - sources: [{model: b, layer_range: [0, 3]}]
  vision_tower: {models: [{model: b}]}
merge_method: passthrough
"""
    merged = run(text, tmp_path)
    assert merged["vision_tower.blocks.1.w"][0] == 201
    assert "vision_tower.blocks.2.w" not in merged
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    assert torch.equal(merged[name], model(2)["language_model.model.layers.2.mlp.up_proj.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["depth"] == 2


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [("", torch.bfloat16), ("dtype: float32", torch.float32), ("dtype: float32\nout_dtype: float16", torch.float16)],
)
def test_dtypes(dtypes: str, expected: torch.dtype, tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        write(tmp_path / name, small(i, dtype=torch.bfloat16), dtype="bfloat16")
    text = "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {weight: 1}\n" + dtypes
    assert {t.dtype for t in run(text, tmp_path).values()} == {expected}
    wanted = str(expected).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted


# --- tokenizers and chat templates -------------------------------------------------------------------


def with_tokens(folder: Path, tokens: str, template: str | None = None) -> None:
    vocabulary = {"model": {"vocab": {t: i for i, t in enumerate(tokens)}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    config = {"tokenizer_class": "X", **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


LINEAR = "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {weight: 1}\n"


def test_a_union_of_equal_vocabularies_is_any_of_them(models: Path) -> None:
    for name in ("a", "b"):
        with_tokens(models / name, "wxyz")
    run(LINEAR + "tokenizer_source: union", models)
    assert (models / "out" / "tokenizer.json").read_text() == (models / "a" / "tokenizer.json").read_text()
    with_tokens(models / "b", "wxyzv")


def test_a_models_tokenizer(models: Path) -> None:
    for name, tokens in (("a", "wxyz"), ("b", "wxyzv")):
        with_tokens(models / name, tokens)
    run(LINEAR + "tokenizer: {source: b}", models)
    assert (models / "out" / "tokenizer.json").read_text() == (models / "b" / "tokenizer.json").read_text()
    recipe = loads(LINEAR + "tokenizer_source: base\nbase_model: b", "m.yml", folder=models)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == "b"
    with pytest.raises(
        RecipeError, match=r"m\.yml:4:\d+: the tokenizer is to be the base's, but there is no base_model"
    ):
        loads(LINEAR + "tokenizer_source: base", "m.yml", folder=models)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("auto", "{{ common }}"), ("b", "{{ other }}"), ("'{{ mine }}'", "{{ mine }}"), ("chatml", "<|im_start|>")],
)
def test_chat_templates(wanted: str, expected: str, models: Path) -> None:
    for name, template in (("base", "{{ common }}"), ("a", "{{ common }}"), ("b", "{{ other }}")):
        with_tokens(models / name, "wxyz", template)
    text = "models: [{model: a}, {model: b}, {model: base}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    run(f"{text}chat_template: {wanted}", models)
    assert expected in (models / "out" / "chat_template.jinja").read_text()
    assert expected in json.loads((models / "out" / "tokenizer_config.json").read_text())["chat_template"]


def test_an_unknown_chat_template_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match=r"chat_template: 'lama3' is no Jinja text and no model.*write the template's"):
        run(LINEAR + "chat_template: lama3", models)


# --- what is refused ---------------------------------------------------------------------------------

TIES = "models:\n  - {model: base}\n  - {model: a, parameters: {weight: 1}}\nmerge_method: ties\nbase_model: base\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIES + "dtyp: float32", r"m\.yml:6:\d+: unknown key 'dtyp' in the config; did you mean 'dtype'\?$"),
        (TIES.replace("ties", "tie"), r"m\.yml:4:\d+: unknown merge_method 'tie'; did you mean 'ties'\?$"),
        (TIES + "parameters: {desnity: 0.5}",
         r"m\.yml:6:\d+: ties has no parameter 'desnity', mergekit would ignore it; did you mean 'density'\?$"),
        (TIES.replace("{model: base}", "{model: base, parameters: {weight: 1}}"),
         r"m\.yml:2:\d+: the base model has no weight, mergekit would ignore it; leave it out$"),
        (TIES.replace("{weight: 1}", "{weight: 1, lambda: 2}"), r"m\.yml:3:\d+: lambda is one for all models, merge"),
        (TIES.replace("parameters: {weight: 1}", "weight: 1"),
         r"m\.yml:3:\d+: unknown key 'weight' in models\[1\]; 'weight' belongs under parameters"),
        (TIES.replace("{weight: 1}", "{}"), r"ties needs the parameter 'weight' for a; it has no default$"),
        (TIES.replace("base_model: base\n", ""), r"m\.yml:4:\d+: ties needs base_model: PATH"),
        (TIES.replace("ties", "linear") + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]", r"m\.yml:6:\d+: there must be exactly one of models, slices and modules$"),
        (TIES + "parameters: {density: 50}", r"m\.yml:6:\d+: ties: density = 50 is outside \(0, 1\]; write 50% as 0\.5$"),
        (TIES + "parameters: {density: [{filter: a}]}", r"m\.yml:6:\d+: density: should be \{filter: \.\.\., value: "),
        (TIES + "parameters: {density: []}", r"m\.yml:6:\d+: density: is an empty list"),
        (TIES + "parameters: {normalize: [true, false]}", r"m\.yml:6:\d+: normalize: a list is a gradient over layers"),
        (TIES + "parameters: {density: x}", r"m\.yml:6:\d+: density: should be a number, is 'x'$"),
        (TIES + "parameters: {normalize: 3}", r"m\.yml:6:\d+: normalize: should be true or false, is 3$"),
        (TIES + "dtype: bf16", r"m\.yml:6:\d+: dtype: unknown dtype 'bf16'; did you mean 'float16'|bf16"),
        (TIES.replace("model: a,", "model: a+b+c,"), r"m\.yml:3:\d+: models\[1\]\.model: 'a\+b\+c' is not a model; write path\[@revision\]"),
        ("slices:\n - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]\n"
         "merge_method: linear\nparameters: {weight: 1}", r"m\.yml:2:\d+: the sources of a slice must have equally many"),
        ("slices:\n - sources: [{model: a, layer_range: [2, 2]}]\nmerge_method: passthrough",
         r"m\.yml:2:\d+: slices\[0\]\.sources\[0\]\.layer_range should be two block numbers .*, is \[2, 2\]$"),
        ("slices:\n - sources: [{model: a, layer_range: [0, 2]}]\nmerge_method: slerp\nbase_model: base\n"
         "parameters: {t: 0.5}", r"m\.yml:2:\d+: base_model base is not among the sources of this slice; list it"),
        ("slices:\n - {sources: [{model: a, layer_range: [0, 2]}], residual_weight: 1}\nmerge_method: passthrough",
         r"m\.yml:2:\d+: unknown key 'residual_weight'"),
        ("slices:\n - sources: [{model: a, layer_range: [1, 2], parameters: {scale: [{filter: '1.mlp', value: 0}]}}]\n"
         "merge_method: passthrough", r"m\.yml:2:\d+: scale: filter '1\.mlp' begins with a number"),
        ("models: [{model: a}]\nmerge_method: passthrough\nparameters: {scales: 1}", r"did you mean 'scale'\?$"),
    ],
)  # fmt: skip
def test_what_mergekit_lets_pass_is_refused_with_its_line(text: str, message: str, models: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        loads(text, "m.yml", folder=models)
    assert len(str(caught.value).splitlines()) == 1, "one mistake is one line"


def test_weights_that_cancel_are_refused(models: Path) -> None:
    with pytest.raises(PlanError, match=r"weights 1, -1 sum to zero, which cannot be normalized"):
        run(
            "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\nmerge_method: linear",
            models,
        )


def test_negative_weights_are_normalized_as_mergekit_does_it_or_refused(models: Path) -> None:
    """ties divides by the agreeing weights, signs and all; a sum of all weights below 0 would turn every sign."""
    two = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -0.9}}]\nbase_model: base\n"
    merged, name = run(two + "merge_method: ties\ndtype: float32", models), "lm_head.weight"
    base, a, b = (small(i)[name] for i in range(3))
    votes, weights = torch.stack([a - base, -0.9 * (b - base)]), torch.tensor([1.0, -0.9]).view(2, 1, 1)
    agrees = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights * agrees).sum(0)
    torch.testing.assert_close(merged[name], base + (votes * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor))
    assert run(two + "merge_method: ties\nparameters: {normalize: false}", models, "plain")
    one = "models: [{model: a, parameters: {weight: -1}}]\nbase_model: base\nmerge_method: task_arithmetic\n"
    with pytest.raises(PlanError, match="weights -1 sum to -1: normalizing turns all their signs around"):
        run(one + "parameters: {normalize: true}", models)
    merged = run(one, models, "one")
    torch.testing.assert_close(merged[name], 2 * small(0)[name] - small(1)[name])


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "1E-5", "[1e-5]", "[1e-5, 1e-5]"])
def test_numbers_as_yaml_1_1_reads_them_not(written: str, models: Path) -> None:
    """1e-5 is a string there; and a gradient of one element is that number everywhere."""
    text = "models: [{model: base}, {model: a}]\nmerge_method: slerp\nbase_model: base\nparameters: {t: %s}"
    merged, plain = run(text % written, models), run(text % "0.00001", models, "plain")
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_invalid_configs_read_no_tensor(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsSource, "block", refuse)
    with pytest.raises(AssertionError, match="a tensor was read"):
        run(LINEAR, models)
    for text, message in [
        (LINEAR + "slices: [1]", "exactly one of models, slices and modules"),
        ("models: [{model: a}, {model: b}]\nmerge_method: linear", "needs the parameter 'weight' for a"),
        ("models: [{model: a}]\nmerge_method: slerp\nbase_model: b\nparameters: {t: 2}", "t = 2 is outside"),
        ("models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: base\nparameters: {t: 0}", "slerp"),
        ("models: [{model: a}]\nmerge_method: model_stock\nbase_model: base", "model_stock"),
        ("models: [{model: a}, {model: b}]\nmerge_method: passthrough", "passthrough: takes 1 model"),
        (LINEAR.replace("weight: 1", "weight: 0"), "sum to zero"),
    ]:
        with pytest.raises((PlanError, RecipeError), match=message):
            run(text, models)


# --- the command line --------------------------------------------------------------------------------


def test_convert_prints_a_recipe_that_does_the_same(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = models / "merge.yml"
    config.write_text(TIES + "parameters: {density: [1, 0.5]}\ndtype: float32")
    assert main(["convert", str(config)]) == 0
    printed = capsys.readouterr().out
    native = models / "native.yaml"
    native.write_text(printed)
    assert "merge_method" not in printed
    for file, out in ((config, "one"), (native, "two")):
        assert main(["merge", str(file), str(models / out), "--quiet"]) == 0
    assert (models / "one/model.safetensors").read_bytes() == (models / "two/model.safetensors").read_bytes()
    assert main(["plan", str(config)]) == 0
    capsys.readouterr()
    config.write_text(TIES + "parametres: {}")
    assert main(["merge", str(config), str(models / "three")]) == 2
    assert capsys.readouterr().err.endswith(
        "merge.yml:6:1: unknown key 'parametres' in the config; did you mean 'parameters'?\n"
    )


def test_values_are_set_in_mergekits_words(models: Path) -> None:
    recipe = loads(TIES, "m.yml", ["parameters.density=0.25", "models.1.parameters.weight=2"], models)
    assert to_tree(recipe)["parameters"] == {"weight": 2, "density": 0.25, "aggregate": "mean"}


def test_keys_of_recipes_are_set_in_the_translation(models: Path) -> None:
    """What a message advises (add it to "exclude") must be possible without writing the config anew."""
    sets = ["exclude=[norm, '*.b']", "seed=3", "output.dtype=float16", "parameters.density=0.25"]
    recipe = loads(TIES, "m.yml", sets, models)
    assert (recipe.exclude, recipe.seed, recipe.output.dtype) == (("norm", "*.b"), 3, "float16")
    assert to_tree(recipe)["parameters"]["density"] == 0.25
    with pytest.raises(RecipeError, match=r"^--set exclude=3: exclude should be a word or a list of words, is 3$"):
        loads(TIES, "m.yml", ["exclude=3"], models)
    with pytest.raises(RecipeError) as caught:
        loads(TIES + "exclude: [norm]", "m.yml", [], models)
    assert str(caught.value) == (
        "m.yml:6:1: unknown key 'exclude' in the config; mergekit has no such key: pass --set exclude=..., or write it "
        'in what "weightsmith convert" prints'
    )
