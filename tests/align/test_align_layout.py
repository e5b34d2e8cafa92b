"""The symmetries of whole models: found from names and shapes, proved by running a small one, frozen with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, saved
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from goldens import tiny_llama
from goldens.alignment import residual
from weightsmith.align import layout as layouts
from weightsmith.align import proof
from weightsmith.align.layout import layout
from weightsmith.align.match import match
from weightsmith.align.proof import drawn, proved, refuted, small_config
from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.core.symmetry import Axis, SymmetryGroup, identity, permute
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Origin, Source

_KEYS = "/keys"
_ROTATED = "rotary position embeddings turn pairs of them"
_NORMED = "a norm of queries and keys tells their entries apart"
FOUND: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, str]]] = {
    # kind -> groups inside it; ending of a frozen name -> reason
    "llama": ({"residual": (), "mlp": (), "kv": ("queries", "values")}, {_KEYS: _ROTATED}),
    "qwen3": ({"residual": (), "mlp": (), "kv": ("queries", "values")}, {_KEYS: _NORMED}),
    "olmo2": ({"residual": (), "mlp": (), "kv": ("queries", "values")}, {_KEYS: _NORMED}),
    "gpt2": ({"residual": (), "mlp": (), "kv": ("values", "keys")}, {}),
    "phi3": ({"residual": (), "mlp": (), "kv": ("queries", "values")}, {_KEYS: _ROTATED}),
    "gpt_neox": ({"residual": (), "mlp": (), "kv": ("values", "keys")}, {}),  # part of each head is not rotated
    "mixtral": ({"residual": (), "experts": ("hidden",), "kv": ("queries", "values")}, {_KEYS: _ROTATED}),
    "gpt_oss": ({"residual": (), "experts": ("hidden",), "kv": ("queries", "values")}, {_KEYS: _ROTATED}),
    "opt": ({"residual": (), "mlp": (), "kv": ("values", "keys")}, {}),
    "bert": (
        {"mlp": (), "kv": ("values", "keys")},
        {"residual": "cls.predictions.transform.dense.bias [40] may belong to it, and its name does not say how"},
    ),
    "vit": ({"residual": (), "mlp": (), "kv": ("values", "keys")}, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: saved(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_proved(family: str, folders: dict[str, Path]) -> None:
    source = open_source(folders[family])
    found = proved(source)
    kinds, frozen = FOUND[family]
    assert {g.kind: tuple(i.name for i in g.inside) for g in found.groups} == kinds
    assert len(found.groups) == len(layout(source).groups)  # nothing that was guessed is wrong
    assert {name[-len(end) :]: why for name, why in found.frozen.items() for end in frozen if name.endswith(end)} == (
        frozen
    )
    assert len(found.frozen) == sum(2 if end == _KEYS else 1 for end in frozen)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_planted_permutations_of_everything_come_back(family: str, folders: dict[str, Path]) -> None:
    """Among them key-value heads with their query heads: all four projections are the original's to the bit."""
    source = packed_like_memory(open_source(folders[family]))
    groups = layout(source).groups
    original = {name: source.read(name) for name in source.keys}
    draw = np.random.default_rng(0)
    tensors = original
    for group in groups:
        moved = {name: draw.permuted(order, axis=-1) for name, order in identity(group).items()}
        if group.size == 2:
            moved[group.name] = np.array([1, 0])  # key-value heads do swap
        tensors = {**tensors, **permute(tensors, group, moved)}
    assert sum(torch.equal(tensors[name], original[name]) for name in original) == 0
    orders = match(groups, original, tensors).orders
    for group in groups:
        tensors = {**tensors, **permute(tensors, group, orders)}
    assert all(torch.equal(tensors[name], original[name]) for name in original)


def test_a_wrong_guess_is_frozen(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of gpt-oss's experts lie in turns; taken for one behind the other, only the experts are frozen."""
    monkeypatch.setattr(layouts, "INTERLEAVED_EXPERTS", frozenset())
    found = proved(open_source(folders["gpt_oss"]))
    assert {g.kind for g in found.groups} == {"residual", "kv"}
    assert "a permutation changes the outputs (by" in found.frozen["model.layers.1.mlp.experts"]


def test_a_forgotten_tensor_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layouts._stream_axis
    monkeypatch.setattr(
        layouts, "_stream_axis", lambda t, width: None if t.key.name == "model.norm.weight" else whole(t, width)
    )
    found = proved(open_source(folders["llama"]))
    assert "residual" in found.frozen
    assert {g.kind for g in found.groups} == {"mlp", "kv"}


def test_the_stream_of_the_small_llama_is_the_golden_cases() -> None:
    model = {name: torch.from_numpy(x) for name, x in tiny_llama.make(0, 1)[0].items()}
    found = layout(MemorySource(model))
    (stream,) = (g for g in found.groups if g.kind == "residual")
    assert set(stream.axes) == set(residual(model).axes)
    assert found.frozen["model.layers.0.self_attn"] == "config.json does not say how many heads it has"


class _Headers(Source):
    """A model of which nothing can be read but names and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
        self.keys = {name: Key(name, shape, "bfloat16") for name, shape in shapes.items()}
        self.origin = Origin("large", config=json.dumps(config))

    def block(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read")


def _large(heads: int = 14) -> _Headers:
    d, ff, kv, layers = 896, 4864, 128, 24
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, d), "model.norm.weight": (d,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (r, d) for n, r in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {f"{p}self_attn.{n}_proj.bias": (r,) for n, r in (("q", d), ("k", kv), ("v", kv))}
        shapes |= {f"{p}mlp.{n}_proj.weight": (ff, d) for n in ("gate", "up")}
        shapes |= {f"{p}mlp.down_proj.weight": (d, ff)}
        shapes |= {f"{p}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": d, "intermediate_size": ff,
        "num_attention_heads": heads, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": 151936,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151643,
    }  # fmt: skip
    return _Headers(shapes, config)


def test_a_large_model_is_proved_on_a_narrow_one() -> None:
    source = _large()
    small = small_config(source, source.origin.config or "")
    assert [small[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")] == [
        112, 2, 14, 608,
    ]  # fmt: skip
    found = proved(source)
    assert len(found.groups) == 1 + 2 * 24
    assert next((g.size, [i.size for i in g.inside]) for g in found.groups if g.kind == "kv") == (2, [7, 64])


def test_heads_that_share_a_table_of_another_block_are_frozen(tmp_path: Path) -> None:
    """T5's relative positions lie in the first block, by head, and hold for all: the proof says what names do not."""
    config = T5Config(d_model=40, d_ff=48, num_layers=2, num_heads=4, d_kv=10, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    found = proved(open_source(tmp_path))
    frozen = {name: why for name, why in found.frozen.items() if name.endswith("SelfAttention")}
    assert len(frozen) == 4
    assert sum(why.startswith("a permutation changes the outputs (by") for why in frozen.values()) == 2
    assert {g.kind for g in found.groups} == {"residual", "mlp", "kv"}
    assert all("EncDecAttention" in g.name for g in found.groups if g.kind == "kv")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_layout_that_lacks_any_axis_is_refuted(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(folders[family])
    with proof._doubles():
        small = proof.SmallModel(small_config(source, (folders[family] / "config.json").read_text()), tmp_path, family)
        for group in (g for g in layout(small.source).groups if ".1." not in g.name):
            lacking = [replace(group, inside=(), axes=_without(group.axes, i)) for i in range(len(group.axes))]
            for inner in group.inside:
                axes = [_without(inner.axes, i) for i in range(len(inner.axes))]
                lacking += [replace(group, inside=(replace(inner, axes=some),)) for some in axes]
            for one in lacking:
                assert small.change([one]) > 1e-4, one


def _without(axes: tuple[Axis, ...], number: int) -> tuple[Axis, ...]:
    return axes[:number] + axes[number + 1 :]


def test_what_proves_something_moves() -> None:
    for seed in range(20):
        for size in (2, 3, 4):
            group = SymmetryGroup("g", "kv", size, (), (SymmetryGroup("i", "values", 2, ()),))
            for name, order in drawn(group, np.random.default_rng(seed)).items():
                assert (np.sort(order, axis=-1) == identity(group)[name]).all()
                assert (order != identity(group)[name]).any(axis=-1).all()


def test_groups_that_fail_together_only_are_all_frozen() -> None:
    groups = [SymmetryGroup(name, "kv", 2, ()) for name in "abc"]
    found = refuted(groups, lambda some: float(len(some) == 1 and some[0].name == "a") or float(len(some) > 1))
    assert found["a"] == "a permutation changes the outputs (by 1 of the largest)"
    assert found["b"] == found["c"] == "a permutation changes the outputs (by 1 of the largest) together with others"
    assert refuted(groups, lambda some: 1e-9) == {}


def test_files_as_they_were_years_ago(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 without a prefix in its names, and with its masks: as much may be permuted as today."""
    state = load_file(folders["gpt2"] / "model.safetensors")
    old = {name.removeprefix("transformer."): t for name, t in state.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in (0, 1)}
    (tmp_path / "config.json").write_bytes((folders["gpt2"] / "config.json").read_bytes())
    save_file(old, tmp_path / "model.safetensors")
    then, now = (proved(open_source(folder)) for folder in (tmp_path, folders["gpt2"]))
    assert [(g.kind, g.size, len(g.axes)) for g in then.groups] == [(g.kind, g.size, len(g.axes)) for g in now.groups]
    assert not then.frozen


def test_heads_that_do_not_fit_are_frozen() -> None:
    found = layout(_large(heads=15))
    assert found.frozen["model.layers.3.self_attn"] == "its shapes do not fit 15 heads"


def test_what_cannot_be_proved_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match=r"no config\.json, so nothing proves that a permutation keeps"):
        proved(MemorySource(load_file(folders["llama"] / "model.safetensors")))
    source = _large()
    text = json.loads(source.origin.config or "")
    source.origin = Origin("large", config=json.dumps({**text, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(SourceError, match="transformers knows no OwnForCausalLM of the type 'qwen2'"):
        proved(source)
