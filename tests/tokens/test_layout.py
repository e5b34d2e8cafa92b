"""Which row stands for which token: laws of the layout, and the rows that models then show."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from weightsmith.core.errors import WeightsmithError
from weightsmith.io.read.source import MemorySource
from weightsmith.tokens.layout import TokenRule, lay_out, read_rule
from weightsmith.tokens.view import RenumberedSource, gather
from weightsmith.tokens.vocabulary import Vocabulary, unite, with_tokens

NAME = "model.embed_tokens.weight"


def numbered(text: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(text)}


def views(vocabularies: dict[str, str], output: str, rows: int = 0, **options) -> dict[str, torch.Tensor]:
    """The embeddings of models 0, 1, ... in the output's vocabulary; row r of model m is [100 m + r, 1]."""
    known = {name: numbered(text) for name, text in vocabularies.items()}
    sizes = {name: max(len(text), rows) for name, text in vocabularies.items()}
    sources = {
        name: MemorySource({NAME: torch.tensor([[100.0 * m + r, 1.0] for r in range(sizes[name])])})
        for m, name in enumerate(known)
    }
    layout = lay_out(known, sizes, numbered(output), **options)
    return {n: RenumberedSource(s, n, sources, layout, [NAME]).read(NAME) for n, s in sources.items()}


def firsts(tensor: torch.Tensor) -> list[float]:
    return tensor[:, 0].tolist()


def test_equal_vocabularies_change_nothing() -> None:
    found = views({"base": "abc", "x": "abc"}, "abc", base="base")
    assert firsts(found["base"]) == [0, 1, 2]
    assert firsts(found["x"]) == [100, 101, 102]


def test_a_row_comes_from_its_owner_and_what_the_base_has_from_the_base() -> None:
    found = views({"base": "ab", "x": "acb", "y": "ac"}, "abcd", base="base", rules={"d": TokenRule("x", "a")})
    assert firsts(found["base"]) == [0, 1, (101 + 201) / 2, 100]  # c: the mean of those who have it
    assert firsts(found["x"]) == [100, 102, 101, 100]
    assert firsts(found["y"]) == [200, 1, 201, 100]  # b: the base's


def test_without_a_base_it_is_the_mean_of_those_that_have_it() -> None:
    found = views({"x": "ab", "y": "ba", "z": "c"}, "abc")
    assert firsts(found["x"]) == [0, 1, 200]
    assert firsts(found["z"]) == [(0 + 101) / 2, (1 + 100) / 2, 200]


def test_rules_force_and_zero() -> None:
    rules = {"a": TokenRule("y", number=1, force=True), "b": TokenRule(None)}
    found = views({"x": "a", "y": "ab"}, "ab", rules=rules)
    assert firsts(found["x"]) == [101, 0]
    assert found["x"][1].tolist() == [0, 0]
    assert firsts(found["y"]) == [101, 101]  # y has b itself, and nobody forces it


def test_padding_and_tokens_that_nobody_has_are_the_mean_of_the_others() -> None:
    found = views({"x": "ab", "y": "ba"}, "abq", multiple=4)
    assert firsts(found["x"]) == [0, 1, 0.5, 0.5]
    assert firsts(found["y"]) == [101, 100, 100.5, 100.5]


def test_tokens_beyond_the_rows_are_not_there() -> None:
    known = {"x": {"a": 0, "b": 5}, "y": {"a": 1, "b": 0}}
    layout = lay_out(known, {"x": 2, "y": 2}, {"a": 0, "b": 1})
    assert layout.own.tolist() == [[0, -1], [1, 0]]
    assert layout.fallback[:, 1].tolist() == [-1, 0]


def test_any_cut_gives_the_same_rows_and_a_view_survives_pickling() -> None:
    generator = np.random.default_rng(0)
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    known = {"x": {f"t{i}": int(n) for i, n in enumerate(generator.permutation(300))}}
    output = {f"t{i}": i for i in range(290)} | {"new": 290}
    sources = {"x": MemorySource({NAME: rows, "norm": torch.ones(2)})}
    view = RenumberedSource(sources["x"], "x", sources, lay_out(known, {"x": 300}, output, multiple=64), [NAME])
    whole = pickle.loads(pickle.dumps(view)).read(NAME)
    assert view.key(NAME).shape == (320, 5)
    assert torch.equal(torch.cat([view.read(NAME, a, a + 7) for a in range(0, 320, 7)]), whole)
    assert torch.equal(whole[:290], rows[[known["x"][f"t{i}"] for i in range(290)]])
    assert torch.allclose(whole[290:], whole[:290].mean(dim=0).expand(30, 5), atol=1e-6)
    assert view.computes(NAME)
    assert not view.computes("norm")


def test_gather_reads_any_rows_in_any_order() -> None:
    rows = torch.arange(500.0).reshape(250, 2)
    wanted = np.array([249, 3, 3, 100, 0, 117])
    assert torch.equal(gather(MemorySource({"e": rows}), "e", wanted), rows[torch.from_numpy(wanted)])
    assert gather(MemorySource({"e": rows}), "e", wanted[:0]).shape == (0, 2)


def test_a_union_keeps_the_first_and_appends_ordinary_tokens_before_added_ones() -> None:
    x = Vocabulary({"a": 0, "<s>": 1}, {"<s>": {"content": "<s>", "special": True}}, kind="BPE")
    y = Vocabulary({"<i>": 0, "b": 1, "a": 2, "late": 9}, {"<i>": {"id": 0, "content": "<i>", "special": True}})
    found = unite([(x, 2), (y, 5)])
    assert found.ids == {"a": 0, "<s>": 1, "b": 2, "<i>": 3}
    assert [e["special"] for e in found.fresh] == [False, True]
    assert with_tokens(found, {"a": {}, "new": {}}).ids["new"] == 4


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"source": "q"}, "the source of 't' is 'q', no model"),
        ({"source": {"kind": "one"}}, r"should be a model, \{kind: zero\}"),
        ({"source": {"kind": "model_token", "model": "x"}}, r"should have token \(a text\) or token_id"),
        ({"source": {"kind": "model_token", "model": "x", "token": "a", "token_id": 1}}, "should have token"),
        ({"force": True}, "has force but no source"),
        ({"source": "x", "force": "yes"}, "force of 't' should be true or false"),
        ("x", "should have source and force only"),
    ],
)
def test_bad_rules(given: object, text: str) -> None:
    with pytest.raises(WeightsmithError, match=text):
        read_rule("t", given, ("x", "y"))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (TokenRule("x"), "'b' is to come from x, which has no token 'b'"),
        (TokenRule("x", number=7), "row 7 of x, which has 1 rows"),
    ],
)
def test_rules_that_name_what_is_not_there(rule: TokenRule, text: str) -> None:
    with pytest.raises(WeightsmithError, match=text):
        lay_out({"x": {"a": 0}, "y": {"b": 0}}, {"x": 1, "y": 1}, {"a": 0, "b": 1}, rules={"b": rule})
