"""What a rule calls `role`: the part of a block, of a model that sees and hears, or a bias."""

from __future__ import annotations

import pytest
import torch

import weightsmith
from weightsmith.core.keys import RULE_ROLES, Key, plays
from weightsmith.recipe.cases import applies

NAMES = {
    "model.layers.0.self_attn.q_proj.weight": {"q"},
    "model.layers.0.self_attn.q_proj.bias": {"q", "bias"},
    "model.embed_tokens.weight": {"embed"},
    "visual.blocks.3.attn.qkv.weight": {"qkv", "vision"},
    "visual.blocks.3.attn.qkv.bias": {"qkv", "vision", "bias"},
    "visual.merger.mlp.0.weight": {"other", "connector"},
    "model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": {"up", "vision"},
    "model.multi_modal_projector.linear_1.weight": {"other", "connector"},
    "mlp1.vision_projection.weight": {"other", "connector"},
    "audio_tower.layers.0.self_attn.k_proj.weight": {"k", "audio"},
    "speech_encoder.layers.0.fc2.weight": {"down", "audio"},
    "video_tower.embeddings.position_embedding.weight": {"embed", "video"},
    "thinker.audio_projector.weight": {"other", "connector"},
    "model.image_newline": {"other", "vision"},
    "model.layers.0.mlp.down_proj.weight": {"down"},
    "bert.encoder.layer.0.attention.output.dense.weight": {"o"},
    "bert.encoder.layer.0.attention.output.dense.bias": {"o", "bias"},
    "encoder.layer.0.output.dense.weight": {"down"},
    "encoder.layer.0.intermediate.dense.weight": {"up"},
    "encoder.layer.0.attention.output.LayerNorm.weight": {"norm"},
    "pooler.dense.weight": {"other"},
    "cls.predictions.transform.dense.weight": {"other"},
    "gpt_neox.layers.0.attention.dense.weight": {"o"},
    "transformer.h.0.attn.c_proj.weight": {"o"},
    "blocks.0.attn.proj.weight": {"o"},
    "encoder.block.0.layer.0.SelfAttention.o.weight": {"o"},
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": {"down"},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tensor_plays(name: str) -> None:
    found = {role for role in RULE_ROLES if plays(name, role)}
    assert found == NAMES[name]
    assert applies(Key(name, (2, 2), "float32"), ("*",), ("router", *NAMES[name]), None)


def test_parts_of_a_model_that_sees_are_kept_by_role() -> None:
    base = {name: torch.zeros(2, 2) for name in NAMES if name.endswith("weight")}
    experts = {f"e{i}": {name: tensor + i for name, tensor in base.items()} for i in (1, 3)}
    for expert in experts.values():
        expert["audio_tower.extra.weight"] = torch.full((2, 2), 7.0)
    kept = {"role": ["vision", "audio", "video", "connector", "embed", "bias"], "method": "keep"}
    kept["optional"] = True  # there are no biases
    merged = weightsmith.merge(experts, "linear", base, rules=[kept], extra="first")
    changed = {name for name, tensor in merged.items() if float(tensor[0, 0]) == 2.0}
    assert changed == {n for n in base if not NAMES[n] & set(kept["role"])}
    assert torch.equal(merged["audio_tower.extra.weight"], torch.full((2, 2), 7.0))
