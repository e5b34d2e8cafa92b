"""Text to plain values: what a word means, which line it is on, and what is refused."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import RecipeError
from weightsmith.recipe import reader
from weightsmith.recipe.reader import read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("007", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("''", ""),
    ],
)
def test_a_word_means_what_yaml_1_2_says(text: str, value: object) -> None:
    found = read(f"a: {text}", "r").tree["a"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_has_its_position() -> None:
    document = read("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", "r.yaml")
    assert document.tree == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    for location, position in {("b",): "2:1", ("b", 0): "3:5", ("b", 1, "d"): "5:6"}.items():
        assert str(document.at(location)) == f"r.yaml:{position}"
    assert document.at(("b", 1, "nothing")) == document.at(("b", 1))
    assert str(document.at(("other",))) == "r.yaml:1:1"


def test_json_with_tabs_and_surrogate_escapes() -> None:
    text = json.dumps({"a": {"b": [1, 2.5, None, True, "\U0001f600 \t/"]}}, indent="\t")
    assert "\\ud83d" in text
    assert read(text, "r.json").tree == json.loads(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=6).filter(lambda k: k != "<<"), JSON_VALUES, max_size=4))
def test_every_json_document_is_read_as_json_does(tree: dict[str, object]) -> None:
    expected = json.loads(json.dumps(tree), parse_constant=lambda _: math.inf)
    text = json.dumps(tree)
    if "Infinity" not in text:
        assert read(text, "r.json").tree == expected


def test_an_alias_is_a_copy() -> None:
    tree = read("a: &x {k: [1]}\nb: *x\n", "r").tree
    assert tree["a"] == tree["b"] == {"k": [1]}
    assert tree["a"]["k"] is not tree["b"]["k"]


BOMB = "a0: &a0 [1,2,3,4,5,6,7,8,9]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"^r:3:\d+: 'a' is given twice \(first in line 1\)$"),
        ("a: 1\nb: !!python/object:os.system x", r"^r:2:\d+: tags are not read: .*os\.system$"),
        ("a: !mine x", r"^r:1:\d+: tags are not read: !mine$"),
        ("a: 1\n---\nb: 2", r"^r:\d:\d+: a second document begins here; a recipe is one$"),
        ("", r"^r: the text is empty$"),
        ("# nothing", r"^r: the text is empty$"),
        ("a: [1,", r"^r:1:\d+: not valid YAML: "),
        ("a: b\n  c: d", r"^r:2:\d+: not valid YAML: mapping values are not allowed here$"),
        ("\x00", r"^r: not valid YAML: "),
        ("a: *b", r"^r:1:\d+: alias \*b stands for nothing written before it; put words with a \* in quotes$"),
        ("a: &a [*a]", r"alias \*a stands for nothing"),
        ("b: {}\n<<: {a: 1}", r"^r:2:\d+: merge keys \(<<\) are not read; write the keys out$"),
        ("? [a]\n: b", r"^r:1:\d+: a key must be a word$"),
        ('{"a": "\\ud800"}', r"^r:1:\d+: '\\ud800' holds half a character"),
        (BOMB, r"^r:\d:\d+: more than 100,000 values \(aliases count as often as they are used\)$"),
        ("[" * 20_000, r"^r:1:\d+: nested more than 40 deep$"),
        ("{a: " * 20_000, r"^r:1:\d+: nested more than 40 deep$"),
        ("a: " + "x" * 1_000_001, r"^r: the text is 1,000,004 characters long; at most 1,000,000 are read$"),
    ],
)
def test_refused(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError, match=message):
        read(text, "r")
    assert time.process_time() - began < 5, "hostile text must be refused at once"


def test_depth_is_counted_not_guessed() -> None:
    deep = reader.MAX_DEPTH
    read("[" * deep + "]" * deep, "r")
    with pytest.raises(RecipeError, match="nested"):
        read("[" * (deep + 2) + "]" * (deep + 2), "r")
