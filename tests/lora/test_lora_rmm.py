"""Adapters through `rmm` and back: what is rebuilt becomes an adapter again, and peft loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft_models import adapter, llama, loaded, logits, quiet
from safetensors.torch import load_file

from weightsmith import lora
from weightsmith.jobs.compress import compress, restore
from weightsmith.recipe.schema import Recipe


def test_a_rebuilt_adapter_loads_with_peft_and_gives_the_logits_of_the_rebuilt_weights(tmp_path: Path) -> None:
    base, names = tmp_path / "base", ("a", "b", "c", "d")
    with quiet():
        llama().save_pretrained(base)
    scales = ({"lora_alpha": 6}, {"lora_alpha": 3}, {"use_rslora": True}, {})
    models = {
        name: {
            "model": str(base),
            "adapter": str(adapter(tmp_path / name, llama, i, r=3, target_modules=["q_proj"], **scale)),
        }
        for i, (name, scale) in enumerate(zip(names, scales, strict=True))
    }
    tree = {"base": str(base), "models": models, "method": {"rmm": {"rank": 3, "basis": 1}}}
    small = compress(Recipe.model_validate(tree), tmp_path / "small", accept_loss=True)
    assert small.storage is not None
    for name in names:
        back = restore(small.out, name, tmp_path / f"{name}-weights").out
        made = lora.extract(back, base, tmp_path / f"{name}-again", rank=3)
        assert made.worst < 1e-4, "the rebuilt change is of rank 3"
        rebuilt = llama()
        rebuilt.load_state_dict(load_file(back / "model.safetensors"))
        want = logits(rebuilt.eval())
        again = logits(loaded(llama, {"x": tmp_path / f"{name}-again"}))
        original = logits(loaded(llama, {"x": tmp_path / name}))
        assert torch.allclose(again, want, atol=1e-4)
        assert 0.05 < small.storage.error[name] < 1
        assert not torch.allclose(original, want, atol=1e-4)
