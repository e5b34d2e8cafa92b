"""The JSON Schema of TUNE.yaml."""

from __future__ import annotations

import pytest
from test_recipe_text import valid

from weightsmith.recipe.reader import read
from weightsmith.tune.json_schema import schema

PLAIN = "recipe: {base: b, models: {a: x}, method: ties}\ndata: {a: a.jsonl}\n"


@pytest.mark.parametrize(
    "more",
    [
        "preset: adamerging",
        "preset: {atlas: {budget: 2}}\ndescent: {lr: 0.1}\nheld_back: 0.2",
        "free: {lambda: layer}\nobjective: entropy",
        "free: {lambda: {per: model, start: {a: 0.5}, low: 0}}\nobjective: {forget: {target: a}}",
        "preset: from_a_plugin",
    ],
)
def test_the_schema_accepts_what_is_read(more: str):
    root = schema()
    assert valid(read(PLAIN + more, "t").tree, root, root)


@pytest.mark.parametrize(
    "more",
    [
        "preset: {atlas: {budgt: 2}}",
        "preset: {atlas: {budget: many}}",
        "preset: atlas\ndescnet: {}",
        "free: {lambda: {per: row}}\nobjective: entropy",
        "preset: adamerging\nbatch: some",
    ],
)
def test_the_schema_refuses_what_is_not(more: str):
    root = schema()
    assert not valid(read(PLAIN + more, "t").tree, root, root)


def test_the_schema_knows_the_recipe():
    root = schema()
    assert not valid(read(PLAIN.replace("method", "methd") + "preset: atlas", "t").tree, root, root)
