"""Recipes to text and back, and their JSON Schema."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe_load import EXAMPLE

from weightsmith.core.method import registered
from weightsmith.recipe.json_schema import schema
from weightsmith.recipe.load import loads
from weightsmith.recipe.reader import read
from weightsmith.recipe.schema import (
    ModelRef,
    Module,
    Modules,
    Output,
    Recipe,
    Rule,
    Slices,
    StageSpec,
    Tokenizer,
)
from weightsmith.recipe.text import dumps, to_tree

# --- YAML ----------------------------------------------------------------------------------------

TRICKY = (
    "1e-5",
    "0",
    "yes",
    "null",
    "~",
    "- a",
    "a: b",
    "#x",
    "a #b",
    "*",
    "&a",
    "!t",
    "'q'",
    '"',
    "\t",
    "a\nb",
    "ü",
    "\U0001f600",
    "\x7f",
    " x ",
    "@v",
    "%",
    ".5",
    "..",
    "1:30",
    "=",
    "<<x",
    "a\\b",
    "\u2028",
    "x-",
)
words = st.sampled_from(TRICKY) | st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1, max_size=12
)
paths = words.map(lambda w: "models/" + w)
numbers = st.floats(-1e30, 1e30) | st.integers(-(10**6), 10**6)
layers = st.tuples(st.integers(0, 5), st.integers(6, 9)) | st.none()

LINEAR = StageSpec(name="linear")


@st.composite
def recipes(draw: st.DrawFn, nested: bool = True) -> Recipe:
    names = draw(st.lists(words.filter(lambda n: n not in ("base", "<<")), min_size=1, max_size=3, unique=True))
    models: dict[str, Any] = {}
    for i, name in enumerate(names):
        if nested and draw(st.integers(0, 3)) == 0:
            model: Any = draw(recipes(nested=False)).model_copy(update={"seed": i + 1})
        else:
            model = f"{draw(paths)}{i}"
        extra = {"weight": draw(numbers)} if draw(st.booleans()) else {}
        models[name] = ModelRef.model_validate(
            {"model": model, "stats": draw(st.lists(paths, max_size=2)), "layers": draw(layers), **extra}
        )
    weights = numbers | st.lists(numbers, min_size=1, max_size=3)
    weight = draw(weights | st.dictionaries(st.sampled_from(names), weights, max_size=2))
    return Recipe(
        base=draw(st.none() | paths.map(lambda p: ModelRef(model=p + "base"))),
        models=models,
        method=draw(st.sampled_from([(LINEAR,), (StageSpec(name="dare", parameters={"density": 0.5}), LINEAR)])),
        parameters={"weight": weight} if draw(st.booleans()) else {},
        rules=tuple(
            Rule(match=tuple(draw(st.lists(words, min_size=1, max_size=2))), layers=draw(layers), method=method)
            for method in draw(st.lists(st.sampled_from([None, (StageSpec(name="keep"),)]), max_size=2))
        ),
        exclude=tuple(draw(st.lists(words, max_size=2))),
        tokenizer=draw(st.sampled_from([None, *names])),
        output=Output(
            dtype=draw(st.sampled_from([None, "bfloat16"])), shard_size=draw(st.sampled_from(["5GB", "1MiB", 70]))
        ),
        seed=draw(st.integers(0, 2**64)),
        nonfinite=draw(st.sampled_from(["refuse", "allow"])),
    )


@settings(deadline=None, max_examples=60)
@given(recipes())
def test_a_recipe_written_and_read_is_the_same(recipe: Recipe) -> None:
    text = dumps(recipe)
    assert read(text, "r").tree == to_tree(recipe)
    assert loads(text) == recipe


def test_text_is_short_and_stable() -> None:
    text = dumps(loads(EXAMPLE))
    assert dumps(loads(text)) == text
    assert text.splitlines() == [
        "base: models/base",
        "models:",
        "  math: models/math",
        "  code:",
        "    model: models/code",
        "    weight: 0.6",
        "    density: 0.3",
        "method: ties",
        "parameters: {lambda: 1.0, scope: global}",
        "rules:",
        '  - match: "*.self_attn.*"',
        "    parameters: {weight: {math: [0.0, 0.5, 1.0]}}",
        "  - match: lm_head.weight",
        "    method: keep",
        "output: {dtype: bfloat16}",
    ]


def test_equal_recipes_from_python_and_yaml() -> None:
    made = Recipe.model_validate(
        {
            "models": {"a": {"model": "x", "weight": (0.0, 1.0)}},
            "method": "linear",
            "parameters": {"weight": (1.0, 2.0)},
        }
    )
    assert made == loads(
        "models: {a: {model: x, weight: [0.0, 1.0]}}\nmethod: linear\nparameters: {weight: [1.0, 2.0]}"
    )


def test_small_numbers_stay_numbers_for_every_yaml_reader() -> None:
    recipe = loads("models: {a: {model: x, weight: 1e-5}}\nmethod: linear")
    assert "1.0e-05" in dumps(recipe)


# --- JSON Schema ---------------------------------------------------------------------------------


def test_every_method_and_parameter_is_in_the_schema() -> None:
    definitions = schema()["$defs"]
    for name, cls in registered().items():
        assert set(definitions[f"{name} parameters"]["properties"]) == {p.name for p in cls.parameters()}
    for model in (Recipe, ModelRef, Slices, Modules, Module, Rule, Tokenizer, Output):
        own = set(definitions[model.__name__]["properties"])
        assert own >= set(model.model_fields)
        assert own == set(model.model_fields) or model is ModelRef


HANDLED = (
    "$schema $defs title description default $ref anyOf enum type properties required additionalProperties "
    "minProperties maxProperties items minItems maxItems minimum maximum exclusiveMinimum exclusiveMaximum"
)


def followed(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    for step in unquote(reference).removeprefix("#/").split("/"):
        found = found[step]
    return found


def valid(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """As much of JSON Schema as the recipe's schema uses."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    handled = set(HANDLED.split())
    assert rule.keys() <= handled, rule.keys() - handled
    if "$ref" in rule and not valid(value, followed(rule["$ref"], root), root):
        return False
    if "anyOf" in rule and not any(valid(value, r, root) for r in rule["anyOf"]):
        return False
    if "enum" in rule and value not in rule["enum"]:
        return False
    if "type" in rule:
        if not isinstance(value, kinds[rule["type"]]):  # type: ignore[arg-type]
            return False
        if isinstance(value, bool) and rule["type"] != "boolean":
            return False
    if isinstance(value, dict):
        known = rule.get("properties", {})
        others = rule.get("additionalProperties", True)
        return (
            all(name in value for name in rule.get("required", ()))
            and rule.get("minProperties", 0) <= len(value) <= rule.get("maxProperties", 99)
            and all(
                valid(v, known[k], root) if k in known else others is True or (others and valid(v, others, root))
                for k, v in value.items()
            )
        )
    if isinstance(value, list):
        return rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", 99) and all(
            valid(v, rule.get("items", {}), root) for v in value
        )
    if isinstance(value, (int, float)):
        return (
            rule.get("minimum", value) <= value <= rule.get("maximum", value)
            and not value <= rule.get("exclusiveMinimum", float("-inf"))
            and not value >= rule.get("exclusiveMaximum", float("inf"))
        )
    return True


GOOD = (
    EXAMPLE,
    "models: {a: x}\nmethod: [{dare: {density: 0.5}}, ties, lines]",
    "models: {a: x}\nmethod: {name: ties, parameters: {density: 0.1}}",
    "models: {a: {models: {b: y}, method: linear}, c: {model: z, weight: [0, 1]}}\nmethod: from_a_plugin",
    "models: {a: x}\nmethod: {ties: {density: {a: [0.1, 1.0]}, scope: tensor}}",
)
BAD = (
    "models: {a: x}",
    "models: {}\nmethod: linear",
    "models: {a: x}\nmethod: linear\nsed: 1",
    "models: {a: x}\nmethod: {ties: {densty: 0.5}}",
    "models: {a: x}\nmethod: {ties: {density: 2}}",
    "models: {a: x}\nmethod: {ties: {density: 0}}",
    "models: {a: x}\nmethod: {ties: {scope: globl}}",
    "models: {a: x}\nmethod: {ties: {scope: {a: tensor}}}",
    "models: {a: x}\nmethod: linear\noutput: {dtype: bf16}",
    "models: {a: x}\nmethod: linear\nrules: [{role: quu}]",
)


@pytest.mark.parametrize("text", GOOD)
def test_the_schema_accepts(text: str) -> None:
    root = schema()
    assert valid(read(text, "r").tree, root, root)


@pytest.mark.parametrize("text", BAD)
def test_the_schema_refuses(text: str) -> None:
    root = schema()
    assert not valid(read(text, "r").tree, root, root)


def test_every_reference_leads_somewhere() -> None:
    root = schema()
    for reference in set(re.findall(r'"(#/\$defs/[^"]+)"', json.dumps(root))):
        assert followed(reference, root)
