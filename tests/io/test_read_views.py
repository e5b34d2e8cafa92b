"""Renamed and sliced views, and statistics."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.core.errors import SourceError
from weightsmith.io.read.source import Cost, MemorySource, Source
from weightsmith.io.read.stack import stack_slices
from weightsmith.io.read.stats import StatsSource, open_stats
from weightsmith.io.read.views import RenamedSource, SliceSource


def stacked() -> MemorySource:
    """A model with six text blocks, three vision blocks, an embedding and a head tied to it."""
    embed = torch.full((4, 2), -1.0)
    tensors = {"model.embed_tokens.weight": embed}
    tensors |= {f"model.layers.{i}.mlp.experts.{e}.w1": torch.tensor([i, e]) for i in range(6) for e in range(2)}
    tensors |= {f"vision.blocks.{i}.weight": torch.tensor([100 + i]) for i in range(3)}
    return MemorySource({**tensors, "lm_head.weight": embed}, "six")


def test_a_slice_renumbers_its_blocks_and_keeps_the_rest() -> None:
    view = SliceSource(stacked(), 2, 5)
    blocks = sorted(name for name in view.keys if name.startswith("model.layers."))
    assert blocks == [f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(3) for e in range(2)]
    assert view.read("model.layers.0.mlp.experts.1.w1").tolist() == [2, 1]
    assert view.read("model.layers.2.mlp.experts.0.w1").tolist() == [4, 0]
    # three vision blocks are fewer than 5: that stack is not meant
    assert [view.read(f"vision.blocks.{i}.weight").item() for i in range(3)] == [100, 101, 102]
    assert view.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert view.origin.label == "six[2:5]"
    assert pickle.loads(pickle.dumps(view)).read("model.layers.0.mlp.experts.1.w1").tolist() == [2, 1]


def test_a_slice_cuts_every_stack_that_is_long_enough() -> None:
    view = SliceSource(stacked(), 1, 3)
    assert view.read("vision.blocks.0.weight").item() == 101
    assert "vision.blocks.2.weight" not in view.keys
    assert SliceSource(stacked(), 0, 6).keys == stacked().keys


@pytest.mark.parametrize(("start", "end"), [(0, 7), (-1, 2), (3, 3), (4, 2)])
def test_a_slice_that_cannot_be(start: int, end: int) -> None:
    with pytest.raises(SourceError, match=r"six: cannot take blocks \[.*\): model\.layers has 6, vision\.blocks has 3"):
        SliceSource(stacked(), start, end)
    with pytest.raises(SourceError, match="it has none"):
        SliceSource(MemorySource({"w": torch.ones(1)}), 0, 1)


def test_renamed_tensors_and_ties() -> None:
    source = stacked()
    both = RenamedSource(source, {"head": "lm_head.weight", "embed": "model.embed_tokens.weight"})
    assert list(both.keys) == ["embed"]
    assert both.aliases == {"head": "embed"}
    alone = RenamedSource(source, {"head": "lm_head.weight"}, "head only")
    assert list(alone.keys) == ["head"]
    assert alone.aliases == {}
    assert alone.read("head", 1, 3).shape == (2, 2)
    assert alone.bits("head").shape == (4, 2)
    with pytest.raises(SourceError, match="head only: no tensor 'embed'"):
        alone.read("embed")
    with pytest.raises(SourceError, match="six: no tensor 'nothing'"):
        RenamedSource(source, {"x": "nothing"})


class Calculated(MemorySource):
    def computes(self, name: str) -> bool:
        return True

    def read_cost(self, name: str) -> float:
        return 2.5

    def fingerprint(self) -> dict[str, Any]:
        return {"made": "here"}


def test_a_view_passes_on_what_its_source_says() -> None:
    source: Source = Calculated({"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1)}, "made")
    view = SliceSource(source, 1, 2)
    assert view.computes("layers.0.w")
    assert view.read_cost("layers.0.w") == 2.5
    assert view.fingerprint() == {"view": "made[1:2]", "source": {"made": "here"}}
    assert view.origin.cost == Cost()
    view.prepare()


def test_a_slice_keeps_what_lies_beside_its_model(tmp_path: Path) -> None:
    """Most of all how its rows are numbered, where that is not as its folder's tokenizer does it."""
    source = MemorySource({f"layers.{i}.w": torch.ones(1) for i in range(3)}, "made")
    source.origin = replace(source.origin, folder=tmp_path, numbering="another", remarks=("old",), cost=Cost(3, 4, 5))
    for view in (SliceSource(source, 1, 2), stack_slices([SliceSource(source, 0, 1), SliceSource(source, 2, 3)])):
        origin = view.origin
        assert (origin.folder, origin.numbering, origin.remarks) == (tmp_path, "another", ("old",))
        assert origin.cost in (Cost(3, 4, 5), Cost(6, 8, 10))
        assert origin.cut.stacks == ("layers",)


# --- statistics ------------------------------------------------------------------------------------


def write(path: Path, notes: Any, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    text = notes if isinstance(notes, str) else json.dumps(notes)
    save_file(tensors or {"q.weight": torch.eye(2)}, path, {"weightsmith": text})
    return path


GRAM = {"stat": "gram", "examples": 8, "rows": 32, "model": "m", "aliases": {"k.weight": "q.weight"}}


def test_statistics_are_a_source(tmp_path: Path) -> None:
    source = StatsSource(write(tmp_path / "s" / "gram.safetensors", GRAM))
    assert (source.stat, source.examples, source.rows, source.model) == ("gram", 8, 32, "m")
    assert source.read("k.weight").equal(torch.eye(2))
    assert source.key("k.weight").name == "q.weight"
    assert source.bits("k.weight", 0, 1).shape == (1, 2)
    assert pickle.loads(pickle.dumps(source)).examples == 8
    assert "files" in source.fingerprint()


def test_all_statistics_of_some_folders(tmp_path: Path) -> None:
    write(tmp_path / "one" / "gram.safetensors", GRAM)
    write(tmp_path / "two" / "fisher.safetensors", {"stat": "fisher", "examples": 4})
    found = open_stats([tmp_path / "one", str(tmp_path / "two")])
    assert set(found) == {"gram", "fisher"}
    assert open_stats([tmp_path / "one" / "gram.safetensors"])["gram"].read("q.weight").equal(torch.eye(2))
    assert open_stats([]) == {}
    write(tmp_path / "two" / "again.safetensors", GRAM)
    with pytest.raises(SourceError, match=r"two/again\.safetensors: the statistic 'gram' is also in .*one/gram"):
        open_stats([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize(
    ("notes", "text"),
    [
        ("{", "not a JSON object"),
        ([], "not a JSON object"),
        ({"examples": 4}, "'stat' in its 'weightsmith' metadata is None, not str"),
        ({"stat": "gram"}, "'examples' .* is None, not int"),
        ({"stat": "gram", "examples": "4"}, "'examples' .* is '4', not int"),
        ({**GRAM, "aliases": {"k.weight": "v.weight"}}, "the alias 'k.weight' -> 'v.weight' does not fit"),
        ({**GRAM, "aliases": {"q.weight": "q.weight"}}, "does not fit"),
        ({**GRAM, "aliases": {"k.weight": ["q.weight"]}}, "does not fit"),
    ],
)
def test_statistics_that_lie(notes: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=text):
        StatsSource(write(tmp_path / "gram.safetensors", notes))


def test_what_holds_no_statistics(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="holds no statistics; make them with: weightsmith observe"):
        open_stats([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no statistics here"):
        open_stats([tmp_path / "empty"])
    with pytest.raises(SourceError, match="No such file"):
        open_stats([tmp_path / "absent"])
