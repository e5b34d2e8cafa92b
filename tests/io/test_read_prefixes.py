"""Names that differ by a prefix: mapped where a recipe says how, or where just one way fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weightsmith as ws
from kit import noise
from weightsmith.core.errors import PlanError, RecipeError, WeightsmithError
from weightsmith.io.read.prefixes import named_like, renamed
from weightsmith.io.read.source import MemorySource

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
Model = dict[str, torch.Tensor]


def model(seed: int, names: tuple[str, ...] = NAMES) -> Model:
    return {name: noise(4, 3 + i, seed=seed) for i, name in enumerate(names)}


def prefixed(state: Model, prefix: str) -> Model:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",  # Lightning: model.model.layers..., model.lm_head
        lambda name: name.replace(".0.", ".0._checkpoint_wrapped_module."),
        lambda name: name.replace("up_proj.", "up_proj.base_layer."),  # peft, without the adapter
        lambda name: f"_fsdp_wrapped_module.{name.replace('.0.', '.0._fsdp_wrapped_module.')}",
    ],
)
def test_what_trainers_wrap_is_read_under_the_models_names(wrap: Any) -> None:
    base, tuned = model(0), model(1)
    made = ws.merge({"t": {wrap(name): tensor for name, tensor in tuned.items()}}, "task_arithmetic", base=base)
    assert list(made) == list(base)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, tuned[name])
    found = named_like(MemorySource({wrap(n): t for n, t in tuned.items()}), MemorySource(base))
    assert len(found.origin.remarks) == 1


def test_a_model_saved_without_its_head_and_one_with_it() -> None:
    inner = ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight")
    body, whole = model(0, inner), {**prefixed(model(1, inner), "bert."), "cls.predictions.bias": noise(4)}
    found = named_like(MemorySource(whole), MemorySource(body))
    assert set(found.keys) == {*inner, "cls.predictions.bias"}
    assert found.origin.remarks == ("names begin with 'bert.': read without it (as names: {'bert.': ''} says)",)
    found = named_like(MemorySource(body), MemorySource(whole))
    assert set(found.keys) == {f"bert.{name}" for name in inner}
    assert found.origin.remarks == ("names lack 'bert.': read with it (as names: {'': 'bert.'} says)",)


def test_doubtful_ways_are_not_taken() -> None:
    state = model(0)
    twice = {**prefixed(state, "student."), **prefixed(model(1), "teacher.")}
    reference = MemorySource(state)
    for other in (twice, prefixed({n: t.T.contiguous() for n, t in state.items()}, "module."), {"x.weight": noise(3)}):
        source = MemorySource(other)
        assert named_like(source, reference) is source
    same = MemorySource(model(1))
    assert named_like(same, reference) is same
    with pytest.raises(
        PlanError, match=r"8 tensors \(student\.model\.embed_tokens\.weight, .* are in t but not in base"
    ):
        ws.merge({"t": twice}, "task_arithmetic", base=state)


def test_names_of_a_recipe(tmp_path: Any) -> None:
    state = model(0)
    source = renamed(MemorySource(prefixed(state, "bert.")), {"bert.": "", "bert.model.": "inner."})
    assert set(source.keys) == {"inner.embed_tokens.weight", "inner.layers.0.mlp.up_proj.weight", "inner.norm.weight",
                                "lm_head.weight"}  # fmt: skip
    with pytest.raises(WeightsmithError, match=r"names: 'b\.w' and 'a\.w' would become 'w'"):
        renamed(MemorySource({"a.w": noise(2), "b.w": noise(3)}), {"a.": "", "b.": ""})
    from safetensors.torch import save_file

    save_file(prefixed(state, "a."), tmp_path / "a.safetensors")
    save_file(prefixed(model(1), "b."), tmp_path / "b.safetensors")
    models = {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}
    names = {"a.": "", "b.": ""}
    result = ws.Recipe.model_validate({"models": models, "method": "linear", "names": names}).run(tmp_path / "out")
    assert not [warning for warning in result.warnings if "names" in str(warning)]
    of_one = {"a": models["a"], "b": {"model": models["b"], "names": {"b.": "a."}}}
    ws.Recipe.model_validate({"models": of_one, "method": "linear"}).run(tmp_path / "one")
    with pytest.raises(PlanError, match=r"names: no tensor's name begins with 'c\.'"):
        ws.Recipe.model_validate({"models": models, "method": "linear", "names": {**names, "c.": ""}}).run(
            tmp_path / "x"
        )
    with pytest.raises(RecipeError, match="names"):
        ws.Recipe.model_validate({"models": models, "method": "linear", "names": {"a.": 1}})


def test_names_in_memory_are_read_as_those_of_files(tmp_path: Any) -> None:
    """As zero_to_fp32.py and torch.save(model.state_dict()) write them; Gemma 3, transformers 5."""
    import json

    from safetensors.torch import save_file

    pairs = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "vision_tower.vision_model.post_layernorm.weight": "model.vision_tower.post_layernorm.weight",
        "multi_modal_projector.mm_soft_emb_norm.weight": "model.multi_modal_projector.mm_soft_emb_norm.weight",
    }
    states = [model(seed, tuple(pairs)) for seed in range(2)]
    (tmp_path / "base").mkdir()
    save_file(states[0], tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "gemma3"}))
    torch.save({pairs[name]: tensor for name, tensor in states[1].items()}, tmp_path / "tuned.pt")
    made = ws.merge({"t": tmp_path / "tuned.pt"}, "task_arithmetic", base=tmp_path / "base")
    assert set(made) == set(pairs)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, states[1][name])
