"""SVFit as a tuner of the installed peft: wrap, train, save, load, merge, unmerge, several adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers

import weightsmith as ws
from weightsmith.core.errors import PlanError, RecipeError, SourceError
from weightsmith.train import svfit
from weightsmith.train.svfit_peft import SVFitConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).view(2, 12) % 60


def base(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # weights stored [in, out]
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=12, n_layer=1, n_head=2)
        ).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def wrapped(kind: str = "llama", **options) -> peft.PeftModel:
    return peft.get_peft_model(base(kind), SVFitConfig(target_modules=TARGETS[kind], **options))


def trained(model: peft.PeftModel) -> peft.PeftModel:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bases", [True, False])
def test_a_trained_adapter_loads_merges_and_is_an_expert(tmp_path: Path, kind: str, bases: bool):
    count = {"r": 6} if bases else {}
    model = wrapped(kind, **count, bases=bases, parametrize="delta" if bases else "value")
    assert torch.equal(logits(model), logits(base(kind)))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"train_values"}
    assert model.get_nb_trainable_parameters()[0] == (
        count.get("r", 16 if kind == "llama" else 12) * (4 if kind == "llama" else 1)
    )
    running = logits(trained(model))
    assert not torch.allclose(running, logits(base(kind)), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(kind)))
    model.save_pretrained(tmp_path / "values")

    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "values")
    assert torch.equal(logits(again), running) if bases else torch.allclose(logits(again), running, atol=1e-5)
    again.merge_adapter()
    assert torch.allclose(logits(again), running, atol=1e-5)
    again.unmerge_adapter()
    weights = {
        n.replace("base_layer.", ""): p for n, p in again.get_base_model().named_parameters() if "svfit" not in n
    }
    assert all(torch.equal(weights[name], p) for name, p in base(kind).named_parameters())
    whole = again.merge_and_unload()
    assert type(whole) is type(base(kind))
    assert torch.allclose(logits(whole), running, atol=1e-5)

    base(kind).save_pretrained(tmp_path / "base")
    merged = ws.merge({"one": tmp_path / "values"}, "average", base=tmp_path / "base")
    assert all(torch.allclose(merged[n], p, atol=1e-6) for n, p in whole.named_parameters() if n in merged)
    ours = base(kind)
    svfit.load(ours, tmp_path / "values")
    assert torch.allclose(logits(ours), running, atol=1e-5)


def test_our_folders_load_in_peft(tmp_path: Path):
    model = base()
    tuned = svfit.wrap(model, energy=0.8)
    with torch.no_grad():
        for own in tuned.modules.values():
            own.train_values += 0.1
    tuned.save(tmp_path / "values")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "values")), logits(model), atol=1e-6)


def test_two_adapters_share_a_model(tmp_path: Path):
    first = trained(wrapped(r=4))
    first.save_pretrained(tmp_path / "a")
    both = peft.PeftModel.from_pretrained(base(), tmp_path / "a", adapter_name="a")
    both.add_adapter("b", SVFitConfig(r=2, target_modules=["v_proj", "o_proj"]))
    assert torch.allclose(logits(both), logits(first), atol=1e-6)
    both.set_adapter("b")
    assert torch.allclose(logits(both), logits(base()), atol=1e-6)
    assert {n.split(".")[-2] for n, p in both.named_parameters() if p.requires_grad} == {"b"}
    running = logits(trained(both))
    both.save_pretrained(tmp_path / "both")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "both" / "b")
    assert torch.allclose(logits(again), running, atol=1e-6)
    both.set_adapter("a")
    both.delete_adapter("b")
    assert torch.allclose(logits(both), logits(first), atol=1e-6)


def test_what_cannot_be(tmp_path: Path):
    trained(wrapped(r=4, bases=False)).save_pretrained(tmp_path / "values")
    other = base()
    other.model.layers[1].self_attn.q_proj.weight.data += 1e-3
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.q_proj\.weight of this model is not the weight that"):
        peft.PeftModel.from_pretrained(other, tmp_path / "values")
    with pytest.raises(RecipeError, match="give r or energy, not both"):
        SVFitConfig(r=1, energy=0.5)
    with pytest.raises(PlanError, match=r"q_proj\.weight r must be in 1 \.\. 16 for a weight \[16, 16\], got 17"):
        wrapped(r=17)
    broken = base()
    broken.model.layers[0].self_attn.v_proj.weight.data.zero_()
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.v_proj\.weight is zero everywhere"):
        peft.get_peft_model(copy.deepcopy(broken), SVFitConfig(target_modules=["v_proj"]))
