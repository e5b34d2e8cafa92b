"""Recipes from files and texts, and every kind of mistake with its line."""

# ruff: noqa: E501  one mistake, one line

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weightsmith.core.errors import RecipeError
from weightsmith.methods.ties import Ties
from weightsmith.recipe.load import load, loads
from weightsmith.recipe.schema import ModelRef, Output, Recipe, Rule, StageSpec

EXAMPLE = """\
base: models/base
models:
  math: models/math
  code: {model: models/code, weight: 0.6, density: 0.3}
method: ties
parameters: {lambda: 1.0, scope: global}
rules:
  - match: "*.self_attn.*"
    parameters: {weight: {math: [0.0, 0.5, 1.0]}}
  - match: lm_head.weight
    method: keep
output: {dtype: bfloat16, shard_size: 5GB}
seed: 0
"""


def test_the_example() -> None:
    recipe = loads(EXAMPLE)
    assert recipe == Recipe(
        base=ModelRef(model="models/base"),
        models={
            "math": ModelRef(model="models/math"),
            "code": ModelRef.model_validate({"model": "models/code", "weight": 0.6, "density": 0.3}),
        },
        method=(StageSpec(name="ties"),),
        parameters={"lambda": 1.0, "scope": "global"},
        rules=(
            Rule(match=("*.self_attn.*",), parameters={"weight": {"math": [0.0, 0.5, 1.0]}}),
            Rule(match=("lm_head.weight",), method=(StageSpec(name="keep"),)),
        ),
        output=Output(dtype="bfloat16", shard_size="5GB"),
    )
    assert list(recipe.models) == ["math", "code"]
    assert recipe.models["code"].parameters == {"weight": 0.6, "density": 0.3}


def test_a_pipeline_with_its_short_forms() -> None:
    recipe = loads("base: b\nmodels: {a: x, c: y}\nmethod: [{dare: {density: 0.5}}, {name: ties}, lines: null]".replace(
        "lines: null", "lines"))  # fmt: skip
    assert recipe.method == (
        StageSpec(name="dare", parameters={"density": 0.5}),
        StageSpec(name="ties"),
        StageSpec(name="lines"),
    )


VOTE = "{ties: {density: 1, scope: tensor}}"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("dare_ties", f"[dare, {VOTE}]"),
        ("dare_linear", "[dare, task_arithmetic]"),
        ("della_linear", "[della, task_arithmetic]"),
        ("breadcrumbs_ties", f"[breadcrumbs, {VOTE}]"),
        (
            "{dare_ties: {density: 0.4, lambda: 0.7, aggregate: sum}}",
            "[{dare: {density: 0.4}}, {ties: {density: 1, scope: tensor, lambda: 0.7, aggregate: sum}}]",
        ),
        ("{name: dare_ties, parameters: {scope: global}}", "[dare, {ties: {density: 1, scope: global}}]"),
        ("[dare_linear, lines]", "[dare, task_arithmetic, lines]"),
    ],
)
def test_the_name_of_a_pipeline_means_its_stages(short: str, long: str) -> None:
    text = "base: b\nmodels: {a: x, c: y}\nmethod: %s\nrules: [{role: up, method: %s}]\n"
    assert loads(text % (short, short)) == loads(text % (long, long))


def test_a_key_without_a_value_says_nothing() -> None:
    assert loads("base:\nmodels: {a: x, c: y}\nmethod: linear\nrules:\nparameters:\noutput:\n") == loads(
        "models: {a: x, c: y}\nmethod: linear"
    )


def test_json_is_the_same_recipe(tmp_path: Path) -> None:
    tree = {"models": {"a": "x", "b": {"model": "y", "weight": 1e-5}}, "method": ["linear"], "seed": 3}
    (tmp_path / "r.json").write_text(json.dumps(tree, indent="\t"))
    recipe = load(tmp_path / "r.json")
    assert recipe.models["b"].parameters == {"weight": 1e-5}
    assert recipe.seed == 3


# --- mistakes ------------------------------------------------------------------------------------

TWO = "base: m/base\nmodels: {a: m/a, b: m/b}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # keys
        (TWO + "method: ties\nsed: 1", r"r\.yaml:4:\d+: unknown key 'sed' in the recipe; did you mean 'seed'\?$"),
        ("modles: {a: x}\nmethod: ties", r"r\.yaml:1:\d+: unknown key 'modles' in the recipe; did you mean 'models'\?$"),
        (TWO + "method: ties\noutput: {dtyp: float32}", r"r\.yaml:4:\d+: unknown key 'dtyp' in output; did you mean 'dtype'\?$"),
        (TWO + "method: ties\nrules:\n- match: x\n  rolle: q", r"r\.yaml:6:\d+: unknown key 'rolle' in rules\[0\]; did you mean 'role'\?$"),
        (TWO + "method: {name: ties, paramters: {}}", r"unknown key 'paramters' in method; did you mean 'parameters'\?$"),
        (TWO, r"r\.yaml:1:\d+: the recipe has no 'method'; write method: ties$"),
        ("method: ties", r"r\.yaml:1:\d+: the recipe has no 'models'; write models: \{math: path/to/math\}$"),
        # methods
        (TWO + "method: tie", r"r\.yaml:3:\d+: unknown method 'tie'; did you mean 'ties'\?$"),
        (TWO + "method: [dare, tie]", r"unknown method 'tie'; did you mean 'ties'\? \(in method\[1\]\)$"),
        (TWO + "method: ties\nrules:\n- match: x\n  method: keeep", r"r\.yaml:6:\d+: unknown method 'keeep'; did you mean 'keep'\? \(in rules\[0\]\.method\)$"),
        (TWO + "method: []", r"r\.yaml:3:\d+: method is an empty list; name a method$"),
        (TWO + "method: 3", r"r\.yaml:3:\d+: method should name one method per stage; "),
        (TWO + "method: {ties: {}, dare: {}}", r"several as a list: \[dare, ties\]$"),
        (TWO + "method: {ties: 3}", r"method: ties should be a mapping of parameters, is 3; write \{ties: \{density: 3\}\}$"),
        (TWO + "method: {name: 3}", r"method\.name should be a text, is 3$"),
        (TWO + "method: [ties, tall_masks, lines]", r"method: tall_masks is a codec; put it last$"),
        (TWO + "method: [ties, ties]", r"'ties \| ties' has 2$"),
        (TWO + "method: keep", r"method 'keep' takes the base's tensor; it is for rules, not for the whole recipe$"),
        (TWO + "method: {dare_ties: {densty: .5}}", r"r\.yaml:3:\d+: unknown key 'densty' in method\.dare_ties; did you mean 'density'\?$"),
        (TWO + "method: {dare_ties: {density: 5}}", r"r\.yaml:3:\d+: dare: density = 5 is outside \(0, 1\]; "),
        # parameters
        (TWO + "method: ties\nrules:\n- match: x\n  parameters:\n    wieght: 1", r"r\.yaml:7:\d+: unknown key 'wieght' in rules\[0\]\.parameters; did you mean 'weight'\?$"),
        (TWO + "method: ties\nparameters: {densty: .5}", r"r\.yaml:4:\d+: unknown key 'densty' in parameters; did you mean 'density'\?$"),
        (TWO + "method: {ties: {densty: .5}}", r"r\.yaml:3:\d+: unknown key 'densty' in method\.ties; did you mean 'density'\?$"),
        ("base: m\nmodels:\n  a: {model: x, weihgt: 1}\nmethod: ties", r"r\.yaml:3:\d+: unknown key 'weihgt' in models\.a; did you mean 'weight'\?$"),
        ("base: {model: m, weight: 1}\nmodels: {a: x}\nmethod: ties", r"unknown key 'weight' in base; known: .*; parameters are for the models$"),
        (TWO + "method: linear\nrules: [{match: x, method: keep, parameters: {weight: 1}}]", r"unknown key 'weight' in rules\[0\]\.parameters; keep takes no parameters$"),
        (TWO + "method: ties\nparameters: 3", r"r\.yaml:4:\d+: parameters should be a mapping of parameters, is 3$"),
        (TWO + "method: ties\nparameters: {density: 30}", r"r\.yaml:4:\d+: ties: density = 30 is outside \(0, 1\]; write 30% as 0\.3$"),
        (TWO + "method: ties\nparameters: {weight: '0.5'}", r"r\.yaml:4:14: ties: weight = '0\.5' is a text; write 0\.5 without quotes$"),
        (TWO + "method: ties\nseed: '3'", r"seed should be a whole number, is \"3\"; write 3 without quotes$"),
        (TWO + "method: ties\nnonfinite: alow", r"did you mean 'allow'\?$"),
        (TWO + "method: ties\nparameters: {density: .nan}", r"ties: density = nan is outside \(0, 1\]$"),
        (TWO + "method: ties\nparameters: {density: null}", r"ties: density = None is no number; it takes \(0, 1\]$"),
        (TWO + "method: ties\nparameters: {density: yes}", r"ties: density = 'yes' is no number; it takes \(0, 1\]$"),
        (TWO + "method: ties\nparameters: {scope: globl}", r"ties: scope = 'globl' is outside global \| tensor; did you mean 'global'\?$"),
        (TWO + "method: linear\nparameters: {normalize: 1}", r"linear: normalize = 1 is outside true \| false$"),
        (TWO + "method: {ties: {density: [0.1, 2]}}", r"ties: density = 2 is outside \(0, 1\]"),
        (TWO + "method: {ties: {density: []}}", r"ties: density is an empty list; a ramp needs at least one number$"),
        (TWO + "method: {ties: {density: [.1, much]}}", r"ties: density holds 'much'; a ramp over depth takes numbers only$"),
        (TWO + "method: {ties: {scope: [global]}}", r"ties: scope takes one value \(global \| tensor\), not a list; lists of numbers are ramps$"),
        (TWO + "method: {ties: {scope: {a: global}}}", r"ties takes one scope for all models, not one per model$"),
        (TWO + "method: ties\nparameters: {weight: {aa: 1}}", r"unknown model 'aa' in parameters\.weight; (did you mean 'a'\?|known: a, b)$"),
        (TWO + "method: ties\nparameters: {weight: {a: {b: 1}}}", r"parameters\.weight\.a takes a number or a list of numbers, not a mapping$"),
        (TWO + "method: ties\nparameters: {density: {a: 2}}", r"r\.yaml:4:\d+: ties: density = 2 is outside"),
        ("base: m\nmodels:\n  a: {model: x, scope: global}\nmethod: ties", r"ties takes one scope for all models; move it from models\.a to parameters$"),
        ("base: m\nmodels:\n  a: {model: x, weight: {a: 1}}\nmethod: ties", r"models\.a\.weight is for this model alone; it takes a number, not a mapping$"),
        (TWO + "method: [dare, ties]\nparameters: {density: 0.5}", r"r\.yaml:4:\d+: 'density' belongs to dare and ties; write it inside the stage it is meant for, as \{dare: \{density: \.\.\.\}\}$"),
        (TWO + "method: {ties: {density: 0.5}}\nparameters: {density: 0.5}", r"'density' is set inside the stage 'ties' and again in parameters; keep one of them \(--set method\.ties\.density=\.\.\. changes the one inside\)$"),
        (TWO + "method: {tise: {pull: 2}}\nparameters: {push: 3}", r"^r\.yaml:3:\d+: unknown method 'tise'; did you mean 'ties'\?$"),
        (TWO + "method: {dare_ties_svd: {rank: 4}}", r"^r\.yaml:3:\d+: dare_ties_svd combines adapters into one adapter; [^\n]*$"),
        (TWO + "method: dare_tis", r"r\.yaml:3:\d+: unknown method 'dare_tis'; did you mean 'dare_ties'\?$"),
        (TWO + "method: ties\nparameters: {density: '0,5'}", r"ties: density = '0,5' is outside \(0, 1\]; write 0\.5$"),
        (TWO + "method: ties\nparameters: {density: 50%}", r"ties: density = '50%' is outside \(0, 1\]; write 0\.5$"),
        (TWO + "method: ties\nparameters: {density: 500%}", r"ties: density = '500%' is outside \(0, 1\]$"),
        (TWO + "method: linear\ncodec: tsvc", r"r\.yaml:4:1: unknown key 'codec' in the recipe; a codec is a method: write method: NAME$"),
        (TWO + "method: ties\nlambda: 0.4", r"r\.yaml:4:1: unknown key 'lambda' in the recipe; 'lambda' belongs under parameters$"),
        # models
        ("models: {}\nmethod: linear", r"r\.yaml:1:\d+: models is empty; name at least one, as math: path/to/math$"),
        ("method: linear\nmodels:", r"r\.yaml:2:\d+: models is empty"),
        ("models: [x, y]\nmethod: linear", r"models should be a mapping from names to models, as math: path/to/math; is a list$"),
        ("models: {a: 3}\nmethod: linear", r"models\.a should be a path, a hub id or a recipe; is 3$"),
        ("models: {a: ''}\nmethod: linear", r"models\.a should be a path, a hub id or a recipe; is an empty text$"),
        ("models: {a: {weight: 1}}\nmethod: linear", r"models\.a has no 'model'; write model: PATH$"),
        ("models:\n  a: org/x\n  b: org/x\nmethod: linear", r"r\.yaml:3:\d+: models\.b is the same model as models\.a \(org/x\); leave one out, or give it a weight$"),
        ("base: org/x\nmodels: {a: org/x, b: y}\nmethod: linear", r"models\.a is the same model as base \(org/x\); it has no task vector; leave it out$"),
        ("models: {base: x}\nmethod: linear", r"a model cannot be called 'base'; give it another name$"),
        ("models:\n  a: x\n  a: y\nmethod: linear", r"r\.yaml:3:\d+: 'a' is given twice \(first in line 2\)$"),
        ("models: {a: x, b: {model: y, layers: [3]}}\nmethod: linear", r"models\.b\.layers should be two block numbers \[start, end\] .*, is \[3\]$"),
        ("models: {a: x, b: {model: y, layers: [3, 3]}}\nmethod: linear", r"start < end, is \[3, 3\]$"),
        ("models: {a: x, b: {model: y, stats: 3}}\nmethod: linear", r"models\.b\.stats should be a word or a list of words, is 3$"),
        # the rest
        (TWO + "method: ties\noutput: {dtype: bf16}", r"r\.yaml:4:\d+: output\.dtype: unknown dtype 'bf16'; did you mean 'bfloat16'\?$"),
        (TWO + "method: ties\noutput: {shard_size: 5XB}", r"output\.shard_size: '5XB' is not a size; write it like 500MB, 5GB or 2GiB$"),
        (TWO + "method: ties\noutput: {shard_size: 0}", r"output\.shard_size: shard_size must be positive$"),
        (TWO + "method: ties\noutput: 3", r"output should be a mapping, is 3$"),
        (TWO + "method: ties\nseed: x", r"r\.yaml:4:\d+: seed should be a whole number, is \"x\"$"),
        (TWO + "method: ties\nseed: true", r"seed should be a whole number, is true$"),
        (TWO + "method: ties\nnonfinite: ok", r"nonfinite should be 'refuse' or 'allow', is \"ok\"$"),
        (TWO + "method: ties\nrules: {match: x}", r"rules should be a list of rules, each with a dash, is a mapping$"),
        (TWO + "method: ties\nrules: [3]", r"rules\[0\] should be a mapping, is 3$"),
        (TWO + "method: ties\nrules: [{role: quu}]", r"rules\[0\]\.role: unknown role 'quu'"),
        (TWO + "method: ties\nexclude: 3", r"exclude should be a word or a list of words, is 3$"),
        (TWO + "method: ties\ntokenizer: aa", r"tokenizer 'aa' is neither a model of this recipe nor a folder"),
        ("- a", r"r\.yaml:1:\d+: the recipe should be a mapping, is a list$"),
        ("merge_method: linear\nmodels: []", r"r\.yaml:1:\d+: there must be exactly one of models, slices and modules$"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        loads(text, "r.yaml")
    assert "\n" not in str(caught.value), "one mistake, one line"


def test_all_mistakes_come_together_in_the_order_of_the_file() -> None:
    text = """\
base: m/base
models:
  a: m/a
  b: {model: m/a, wieght: 0.6, density: 30}
method: [{ties: {lamda: 1}}]
rules:
  - match: x
    method: keeep
  - match: y
    rol: k
    parameters: {scope: globl}
output: {dtype: bf16}
sed: 1
"""
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 problems:"
    assert [line.split(":")[1] for line in lines[1:]] == ["4", "4", "4", "5", "8", "10", "11", "12", "13"]
    for part in ("'wieght'", "density = 30", "same model", "'lamda'", "'keeep'", "'rol'", "'globl'", "'bf16'", "'sed'"):
        assert sum(part in line for line in lines) == 1, part


def test_parameters_go_to_the_stage_that_does_not_set_them() -> None:
    loads(TWO + "method: [{dare: {density: 0.5}}, ties]\nparameters: {density: 0.5}")
    with pytest.raises(RecipeError, match="'density' is set inside the stage"):
        loads(TWO + "method: [{dare: {density: 0.5}}, {ties: {density: 1}}]\nparameters: {density: 0.5}")


def test_a_rule_may_change_what_the_recipe_writes_inside_a_stage() -> None:
    loads(TWO + "method: {ties: {density: 0.5}}\nrules: [{match: x, parameters: {density: 0.1}}]")


def test_a_parameter_of_a_rules_own_method_may_stand_outside() -> None:
    loads(TWO + "method: linear\nparameters: {density: 0.5}\nrules: [{match: x, method: ties}]")


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("{tise: {density: 2}}", "r.yaml:3:17: ties: density = 2 is outside (0, 1]; write 2% as 0.02"),
        ("tise\nparameters: {densty: .5}", "r.yaml:4:14: unknown key 'densty' in parameters; did you mean 'density'?"),
        (
            "{dare_tis: {scope: globl}}",
            "r.yaml:3:21: ties: scope = 'globl' is outside global | tensor; did you mean 'global'?",
        ),
    ],
)
def test_parameters_of_a_misspelt_method_are_the_nearest_ones(method: str, second: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(TWO + f"method: {method}", "r.yaml")
    first, other = caught.value.problems
    assert first.text.startswith("r.yaml:3:")
    assert "unknown method" in first.text
    assert other.text == second


def test_an_unknown_method_does_not_make_its_parameters_unknown() -> None:
    with pytest.raises(RecipeError) as caught:
        loads(TWO + "method: my_own\nparameters: {temperature: 3}")
    assert "temperature" not in str(caught.value)


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_scalars_of_numpy_and_torch_are_numbers(half: object) -> None:
    tree = {
        "base": "b",
        "models": {"a": {"model": "x", "weight": half}, "c": "y"},
        "method": {"ties": {"density": half}},
    }
    recipe = Recipe.model_validate(tree)
    assert recipe.models["a"].parameters == {"weight": 0.5}
    assert recipe.method[0].parameters == {"density": 0.5}
    assert Ties(density=half) == Ties(density=0.5)
    with pytest.raises(RecipeError, match="unknown method 'tie'; did you mean 'ties'"):
        Recipe.model_validate({**tree, "method": "tie"})


# --- files ---------------------------------------------------------------------------------------


def test_paths_are_those_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes/base", "recipes/m/a", "recipes/stats", "work/b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes/r.yaml").write_text(
        "base: base\nmodels:\n  a: {model: ./m/a, stats: stats}\n  b: b\n  hub: org/name@main\nmethod: linear\ntokenizer: m/a\n"
    )
    monkeypatch.chdir(tmp_path / "work")
    recipe = load("../recipes/r.yaml")
    assert recipe.base is not None
    assert Path(str(recipe.base.model)).resolve() == tmp_path / "recipes/base"
    assert Path(str(recipe.models["a"].model)).is_absolute()
    assert Path(recipe.models["a"].stats[0]).resolve() == tmp_path / "recipes/stats"
    assert recipe.models["b"].model == "b"
    assert recipe.models["hub"].model == "org/name@main"
    assert recipe.tokenizer is not None
    assert Path(recipe.tokenizer.source).resolve() == tmp_path / "recipes/m/a"


def test_one_folder_under_two_spellings_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "r.yaml").write_text(f"models: {{x: a, y: ./a/, z: {tmp_path}/link}}\nmethod: linear")
    with pytest.raises(RecipeError, match="2 problems") as caught:
        load(tmp_path / "r.yaml")
    assert "models.y is the same model as models.x" in str(caught.value)
    assert "models.z is the same model as models.x" in str(caught.value)


def test_two_slices_of_one_model_are_two_models() -> None:
    loads("models: {x: {model: a, layers: [0, 2]}, y: {model: a, layers: [2, 4]}}\nmethod: linear")
    loads("models: {x: {model: a, expert: p}, y: {model: a, expert: q}}\nmethod: linear")


def test_nested_recipes(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/m").mkdir()
    (tmp_path / "inner/r.yml").write_text("models: {p: m, q: other}\nmethod: linear\nseed: 7")
    (tmp_path / "r.yaml").write_text(
        "models:\n  a: {model: inner/r.yml, weight: 2}\n  b: {models: {s: x, t: y}, method: linear}\nmethod: linear"
    )
    recipe = load(tmp_path / "r.yaml")
    inner = recipe.models["a"].model
    assert isinstance(inner, Recipe)
    assert inner.seed == 7
    assert inner.models["p"].model == str(tmp_path / "inner/m")
    assert recipe.models["a"].parameters == {"weight": 2}
    assert isinstance(recipe.models["b"].model, Recipe)


def test_problems_of_nested_recipes_come_along(tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text("models: {p: m}\nmethod: liner\nsed: 1")
    (tmp_path / "r.yaml").write_text(
        "models:\n  a: in.yaml\n  b:\n    models: {s: x}\n    method: tie\n  c: gone.yaml\nmethod: averge"
    )
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "r.yaml")
    text = str(caught.value)
    assert text.startswith("5 problems:")
    assert f"r.yaml:2:3: in models.a: {tmp_path}/in.yaml:2:1: unknown method 'liner'" in text
    assert "in.yaml:3:1: unknown key 'sed'" in text
    assert "r.yaml:5:5: unknown method 'tie'" in text
    assert "gone.yaml: no such recipe file" in text
    assert "r.yaml:7:1: unknown method 'averge'" in text


def test_a_recipe_made_of_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("models: {x: b.yaml, y: m}\nmethod: linear")
    (tmp_path / "b.yaml").write_text("models: {x: ./a.yaml, y: m}\nmethod: linear")
    with pytest.raises(RecipeError, match=r"circular reference between recipes: a\.yaml -> b\.yaml -> a\.yaml"):
        load(tmp_path / "a.yaml")


def test_recipes_that_multiply(tmp_path: Path) -> None:
    for i in range(8):
        names = ", ".join(f"m{j}: {{model: r{i + 1}.yaml, layers: [{j}, {j + 1}]}}" for j in range(8))
        (tmp_path / f"r{i}.yaml").write_text(f"models: {{{names}}}\nmethod: linear")
    (tmp_path / "r8.yaml").write_text("models: {a: x}\nmethod: linear")
    with pytest.raises(RecipeError, match="more than 200 nested recipes"):
        load(tmp_path / "r0.yaml")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(EXAMPLE)
    with pytest.raises(RecipeError, match=r"recip\.yaml: no such recipe file; did you mean .*recipe\.yaml'\?$"):
        load(tmp_path / "recip.yaml")
    with pytest.raises(RecipeError, match="is a folder; give the recipe file in it"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    with pytest.raises(RecipeError, match=r"binary: byte 3 is not UTF-8 text; is this a recipe\?"):
        load(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="huge: 1,000,001 bytes; a recipe has at most 1,000,000"):
        load(tmp_path / "huge")
    with pytest.raises(RecipeError, match="cannot be read"):
        load("nul\0byte")


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("models: {a: x, v1.5: y}\nmethod: linear\nrules: [{match: q}]")
    recipe = load(
        path,
        [
            "parameters.weight={a: 1e-3}",
            "models.v1.5.weight=2",
            "models.new=z",
            "rules.0.match=[k, v]",
            "exclude=*norm*",
            "output.dtype=float32",
            "seed=5",
        ],
    )
    assert recipe.parameters == {"weight": {"a": 1e-3}}
    assert recipe.models["v1.5"].parameters == {"weight": 2}
    assert recipe.models["new"].model == "z"
    assert recipe.rules[0].match == ("k", "v")
    assert recipe.exclude == ("*norm*",)
    assert (recipe.output.dtype, recipe.seed) == ("float32", 5)


def test_an_override_changes_one_of_two_aliases() -> None:
    text = "models: {a: &m {model: x, weight: 1}, b: {model: y}}\nmethod: linear\nrules: [{match: q, parameters: &p {weight: 1}}, {match: r, parameters: *p}]"
    recipe = loads(text, overrides=["rules.0.parameters.weight=2"])
    assert [rule.parameters["weight"] for rule in recipe.rules] == [2, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"^--set seed: write it as KEY=VALUE, e\.g\. parameters\.density=0\.3$"),
        ("=3", r"write it as KEY=VALUE"),
        ("sed=3", r"^--set sed=3: unknown key 'sed' in the recipe; did you mean 'seed'\?$"),
        ("parameters.weigth=1", r"^--set parameters\.weigth=1: unknown key 'weigth' in parameters; did you mean"),
        (
            "parameters.weight=x",
            r"^--set parameters\.weight=x: linear: weight = 'x' is no number; it takes \(-inf, inf\)$",
        ),
        ("rules.1.match=x", r"^--set rules\.1\.match=x: '1' is not a position in a list of 1; the first is 0$"),
        (
            "method.ties.density=1",
            r"^--set method\.ties\.density=1: method is 'linear'; it has no 'ties' inside; write parameters\.density$",
        ),
        ("sed.a=3", r"^--set sed\.a=3: unknown key 'sed' in the recipe; did you mean 'seed'\?$"),
        ("exclude.0=x", r"^--set exclude\.0=x: exclude should be a word or a list of words, is {'0': 'x'}$"),
        ("exclude=[*a]", r"alias \*a stands for nothing written before it; put words with a \* in quotes$"),
        ("seed=[", r"^--set seed=\[:1:2: not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loads("models: {a: x, b: y}\nmethod: linear\nrules: [{match: q}]", "r.yaml", [override])
