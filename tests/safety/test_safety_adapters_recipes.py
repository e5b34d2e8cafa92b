"""Adapters and recipes from strangers: only weightsmith's own errors, in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import outcome
from safetensors.torch import save_file

from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.io.package.card import licences
from weightsmith.io.package.companions import companions, copy_companions, left_behind
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.source import MemorySource
from weightsmith.recipe.load import load, loads
from weightsmith.recipe.reader import MAX_BYTES, read

BOUND = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
LONG = "model.layers.0." + "a" * 40


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < limit


# --- adapters --------------------------------------------------------------------------------------


def adapter(folder: Path, config: Any, module: str = LONG, rank: int = 2) -> Callable[[], AdapterSource]:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", "r": rank} | config)
    (folder / "adapter_config.json").write_text(text)
    factors = {"lora_A": torch.ones(rank, 3), "lora_B": torch.ones(4, rank)}
    save_file({f"base_model.model.{module}.{part}.weight": t for part, t in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    base = MemorySource({f"{module}.weight": torch.zeros(4, 3)})
    return lambda: AdapterSource(folder, base)


SLOW = [
    "(a+)+$",
    "(a|aa)+$",
    "(.*.*.*.*.*)*x",
    "(a*)*b",
    ".*.*.*.*.*.*.*x",
    "(?:a{0,40}){0,40}b",
    "a" * 501,
    "(" * 5000,
]
SLOW += ["((a*)*)*b", "a{99999999999999999999}", "[", "(?P<x>", "*", "\\", "(?i:a)(?#" + "x" * 600 + ")"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
def test_patterns_that_could_be_matched_for_hours(field: str, pattern: str, tmp_path: Path) -> None:
    with seconds(2), pytest.raises(SourceError, match=rf"{field} .* (too involved|not a regular expression)"):
        adapter(tmp_path, {field: {pattern: 4}})()


@pytest.mark.parametrize(
    "pattern", [r"layers\.(0|1)\.a+", "a" * 40, r"model\.layers\.[0-9]\..*", r".*\.a{40}", "[[a]+"]
)
def test_patterns_as_people_write_them(pattern: str, tmp_path: Path) -> None:
    source = adapter(tmp_path, {"rank_pattern": {pattern: 2}, "r": 8, "alpha_pattern": {pattern: 6}})()
    assert source.read(f"{LONG}.weight").tolist() == [[6.0] * 3] * 4


def test_many_patterns(tmp_path: Path) -> None:
    with seconds(5):
        adapter(tmp_path, {"rank_pattern": {f"m{i}": 3 for i in range(10_000)}})()
        with pytest.raises(SourceError, match="rank_pattern has 10001 patterns"):
            adapter(tmp_path, {"rank_pattern": {f"m{i}": 3 for i in range(10_001)}})()


NUMBERS = ["1" + "0" * 400, "-1", "0", "1e999", "-1e999", "NaN", "1e31", "true", "[]", '"8"', "{}", "9" * 5000]


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
def test_absurd_numbers(field: str, number: str, tmp_path: Path) -> None:
    value = f'{{"x": {number}}}' if field.endswith("pattern") else number
    with pytest.raises(SourceError) as error:
        adapter(tmp_path, f'{{"peft_type": "LORA", "{field}": {value}}}')()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_ranks_that_json_does_not_know(number: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"r = (nan|inf|-inf) is not a positive number"):
        adapter(tmp_path, f'{{"peft_type": "LORA", "r": {number}}}')()


CONFIGS = {
    "a list": "[]",
    "empty": "",
    "not UTF-8": '{"peft_type": "\xff"}',
    "deep": '{"a":' * 100_000,
    "a name twice": '{"peft_type": "LORA", "r": 4, "r": 2}',
    "a long word": json.dumps({"peft_type": "x" * 1_000_000}),
    "a long name": json.dumps({"peft_type": "LORA", "x" * 1_000_000: 1}),
    "control characters": '{"peft_type": "LORA", "\\u001b[2J": 1}',
    "too large": " " * 10_000_001 + "{}",
    "a list for a flag": '{"peft_type": "LORA", "init_lora_weights": [1]}',
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_none(case: str, tmp_path: Path) -> None:
    load_it = adapter(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text(CONFIGS[case], encoding="latin-1")
    with seconds(5), pytest.raises(SourceError) as error:
        load_it()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@settings(max_examples=250, **BOUND)
@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
                         "init_lora_weights", "bias", "peft_type", "target_modules", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("LORA"),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=5,
    )
)  # fmt: skip
def test_any_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    load_it = adapter(tmp_path, config)
    value, _ = outcome(lambda: load_it().read(f"{LONG}.weight"))
    assert value is None or value.shape == (4, 3)


# --- licences and companion files ------------------------------------------------------------------


def card(folder: Path, front: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\ntext\n")
    return licences({"m": folder})["m"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(f'*{a}' for _ in range(9))}]}}\n"
    for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize("front", [BOMB + "license: *m", BOMB + "license: [*m, *m]", MERGES + "license: mit\n<<: *m",
                                   "[" * 60_000, "{" * 60_000, "? " * 30_000, "license: " + "x" * 60_000])  # fmt: skip
def test_yaml_bombs_in_a_card(front: str, tmp_path: Path) -> None:
    with seconds(20):
        assert len(card(tmp_path, front)) <= 100


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: !!python/object/apply:os.system [true]", "unknown"),
        ("license: {a: mit}", "unknown"),
        ("a: {license: mit}", "unknown"),
        ("a: [{license: mit}]\nlicense: apache-2.0", "apache-2.0"),
        ("license: &x mit\nb: *x", "mit"),
        ("license: [mit, bsd-3-clause]", "mit + bsd-3-clause"),
        ("license: null", "unknown"),
        ('license: "mit\\n\\n| x | [y](http://z) <b>\\e[2J"', "mit x y (http://z) b 2J"),
        ("license: other\nlicense_name: my-own", "other (my-own)"),
    ],
)
def test_licences_are_words(front: str, licence: str, tmp_path: Path) -> None:
    assert card(tmp_path, front) == licence


def test_a_link_out_of_the_model_does_not_carry_secrets_along(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    for name in ("notes.txt", "tokenizer.json", "sub/deep.json", "config.json"):
        (model / name).symlink_to(secret)
    (model / "inner.json").symlink_to(model / "sub" / "real.json")
    (model / "sub" / "real.json").write_text("{}")
    assert [path.as_posix() for path in companions(model, ())] == ["inner.json", "sub/real.json"]
    assert set(left_behind(model, ()).values()) == {"a link that leaves the folder"}
    copy_companions(model, tmp_path / "out", ())
    assert not any("hf_secret" in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    (model / "README.md").symlink_to(secret)
    assert licences({"m": model}) == {"m": "unknown"}


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"path": ["x"]}]', "3", "null", '"x"'])
def test_hostile_module_lists(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SourceError, match=r"modules\.json"):
        companions(tmp_path, ())


def test_module_lists_do_not_reach_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "model.safetensors").write_bytes(b"x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "modules.json").write_text('[{"path": "../outside"}, {"path": "/etc"}]')
    assert [path.as_posix() for path in companions(model, ())] == ["modules.json"]


# --- recipes ---------------------------------------------------------------------------------------

RECIPES = {
    "tags": "models: {a: !!python/object/apply:os.system [true]}\nmethod: linear",
    "a tag on a key": "!!python/name:os.system models: {a: x}\nmethod: linear",
    "aliases that grow": BOMB + "models: {a: *m}\nmethod: linear",
    "merge keys that grow": MERGES + "models: {a: x}\nmethod: linear",
    "an alias of itself": "models: &a {a: *a}\nmethod: linear",
    "brackets": "[" * 900_000,
    "braces": "{" * 900_000,
    "questions": "? " * 400_000,
    "dashes": "- " * 400_000,
    "one word": "x" * 900_000,
    "quotes": '"' * 900_000,
    "a long key": "models: {"
    + "y" * 400_000
    + ": x}\nmethod: linear\nparameters: {weight: {"
    + "y" * 399_999
    + "z: 1}}",
    "a long method": f"models: {{a: x}}\nmethod: {'ties' * 100_000}",
    "many wrong keys": "models: {a: x}\nmethod: linear\n" + "".join(f"metho{i}: 1\n" for i in range(20_000)),
    "many models of one folder": "method: linear\nmodels:\n" + "".join(f"  m{i}: /\n" for i in range(20_000)),
    "comments": "#" * 900_000,
    "indents": "\n".join(" " * i + f"a{i}:" for i in range(1000)),
    "too large": " " * (MAX_BYTES + 1),
    "a directive": "%YAML 9.9\n---\nmodels: {a: x}\nmethod: linear",
    "endless numbers": "models: {a: {model: x, weight: " + "9" * 900_000 + "}}\nmethod: linear",
    "endless fractions": "models: {a: {model: x, weight: 1" + "0" * 90_000 + ".5}}\nmethod: linear",
}


@pytest.mark.parametrize("case", RECIPES)
def test_hostile_recipes(case: str) -> None:
    with seconds(30):
        try:
            loads(RECIPES[case])
        except RecipeError:
            return
    assert case in ("a directive", "many models of one folder")


def test_a_pipe_or_device_as_recipe(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "r.yaml")
    for path in (tmp_path / "r.yaml", Path("/dev/zero"), tmp_path):
        with seconds(2), pytest.raises(RecipeError):
            load(path)


def test_recipes_that_include_each_other(tmp_path: Path) -> None:
    for name, other in {"a": "b", "b": "c", "c": "a"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"models: {{x: {other}.yaml}}\nmethod: linear")
    with pytest.raises(RecipeError, match=r"circular reference .*: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load(tmp_path / "a.yaml")
    (tmp_path / "d.yaml").symlink_to(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("base: d.yaml\nmodels: {x: y}\nmethod: linear")
    with pytest.raises(RecipeError, match="circular reference"):
        load(tmp_path / "a.yaml")


WORDS = st.sampled_from(["base", "models", "method", "parameters", "rules", "exclude", "output", "tokenizer", "seed",
                         "nonfinite", "linear", "ties", "dare", "keep", "weight", "density", "a", "x", "match", "role",
                         "layers", "name", "model", "dtype", "shard_size", "stats", "expert", "lambda"])  # fmt: skip
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=15,
)


@settings(max_examples=200, **BOUND)
@given(st.dictionaries(WORDS, TREES, max_size=6))
def test_any_tree_is_a_recipe_or_an_error(tree: dict[str, Any]) -> None:
    for content in (tree, {"models": {"a": "x"}, "method": "linear"} | tree):
        outcome(lambda content=content: loads(json.dumps(content)))


@settings(max_examples=300, **BOUND)
@given(st.text(alphabet=st.sampled_from(list("ab:-?[]{}&*!|>%@`'\"#,\n\t \\~.<=é\x85\u2028\ufeff")), max_size=40))
def test_any_text_is_yaml_or_an_error(text: str) -> None:
    outcome(lambda: read(text, "x"))
