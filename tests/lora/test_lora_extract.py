"""Adapters out of fine-tuned models: Eckart and Young, round trips through peft, what is kept, refused or said."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_models import adapter, gpt2, llama, loaded, logits, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from kit import texts
from lora import families
from weightsmith import lora
from weightsmith.core.errors import NumericError, PlanError, RecipeError, SourceError
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.io.read.open import open_source

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(folder: Path, delta: Tensor, **more: tuple[Tensor, Tensor]) -> tuple[Path, Path]:
    """(tuned, base) with one matrix changed by `delta`, and others as given (base, tuned)."""
    base = noise(*delta.shape, seed=7)
    states = [{WEIGHT: base, **{n: t[0] for n, t in more.items()}}]
    states.append({WEIGHT: base + delta, **{n: t[1] for n, t in more.items()}})
    return stored(folder / "tuned", states[1]), stored(folder / "base", states[0])


def product(folder: Path, name: str = WEIGHT) -> Tensor:
    found = read_adapter(folder)
    module = name.removesuffix(".weight")
    return found.factors(module)[0].product * found.modules[module].scale


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_that_of_eckart_and_young(tmp_path: Path, rank: int) -> None:
    tuned, base = pair(tmp_path, delta := noise(24, 16))
    result = lora.extract(tuned, base, tmp_path / "out", rank=rank)
    s = torch.linalg.svdvals(delta.double())
    (report,) = result.modules
    assert report.rank == rank
    assert report.error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-6)
    assert report.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-6)
    assert float((product(tmp_path / "out") - delta).norm() / delta.norm()) == pytest.approx(report.error, abs=1e-6)


def test_a_change_of_low_rank_is_found_exactly_at_its_rank(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, delta := noise(24, 3) @ noise(3, 16, seed=1))
    result = lora.extract(tuned, base, tmp_path / "out")
    assert result.rank == 3
    assert result.worst < 1e-6
    assert torch.allclose(product(tmp_path / "out"), delta, atol=1e-5)


def test_the_energy_decides_the_rank_of_each_module(tmp_path: Path) -> None:
    u, v = (torch.linalg.qr(noise(16, 16, seed=i))[0] for i in (1, 2))
    s = torch.tensor([4.0, 2.0, 1.0, *[0.0] * 13])  # squares 16, 4, 1 of 21
    other = torch.zeros(16, 16)
    flat = ("model.layers.0.mlp.gate_proj.weight", (other, other + u[:, :4] @ v[:4] * 0.5))
    tuned, base = pair(tmp_path, (u * s) @ v, **dict([flat]))
    ranks = {}
    for energy in (0.5, 0.8, 0.99, 1.0):
        result = lora.extract(tuned, base, tmp_path / f"e{energy}", energy=energy)
        ranks[energy] = [m.rank for m in sorted(result.modules, key=lambda m: m.name, reverse=True)]
        assert all(m.energy >= energy - 1e-6 for m in result.modules)
    assert ranks == {0.5: [1, 2], 0.8: [2, 4], 0.99: [3, 4], 1.0: [3, 4]}
    config = json.loads((tmp_path / "e0.5/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {r"^model\.layers\.0\.mlp\.up_proj": 1})
    capped = lora.extract(tuned, base, tmp_path / "capped", energy=0.99, max_rank=2)
    assert [m.rank for m in capped.modules] == [2, 2]
    same = lora.extract(tuned, base, tmp_path / "same", energy=0.5, uniform=True)
    assert {m.rank for m in same.modules} == {2}
    assert json.loads((same.out / "adapter_config.json").read_text())["rank_pattern"] == {}
    assert torch.allclose(product(same.out), product(tmp_path / "e0.5"), atol=1e-6)


def test_an_adapter_as_large_as_its_model_is_said(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, noise(40, 24))
    said = [str(w) for w in lora.extract(tuned, base, tmp_path / "whole").warnings]
    assert said == [
        "the adapter takes 6.14 kB, the model itself 3.84 kB: choose a lower rank (--rank 16), or a share of each "
        "change (--energy 0.9)"
    ]
    assert not lora.extract(tuned, base, tmp_path / "small", rank=4).warnings


def test_singular_values_up_to_epsilon_are_left_out(tmp_path: Path) -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    tuned, base = pair(tmp_path, delta)
    assert lora.extract(tuned, base, tmp_path / "out", epsilon=1.5).rank == 2


def test_the_largest_entry_of_each_column_is_positive(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, noise(24, 16))
    lora.extract(tuned, base, tmp_path / "out", rank=5)
    b = read_adapter(tmp_path / "out").factors(WEIGHT.removesuffix(".weight"))[0].b
    assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())


def moved(model: torch.nn.Module, seed: int = 5) -> dict[str, Tensor]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    return {n: t + 0.1 * noise(*t.shape, seed=seed + i) for i, (n, t) in enumerate(state.items())}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2 embeddings", "tied", "tied with embeddings", "embeddings"])
def test_a_whole_fine_tune_comes_back_through_peft(tmp_path: Path, kind: str) -> None:
    """Every tensor changed, norms, biases and embeddings too: at full rank the logits are the fine-tune's."""
    tied = "tied" in kind
    of_gpt2 = "gpt2" in kind
    make = gpt2 if of_gpt2 else lambda: llama(tie_word_embeddings=tied)
    base, tuned = make(), make()
    state = moved(base)
    if of_gpt2 or tied:
        state["lm_head.weight"] = state["transformer.wte.weight" if of_gpt2 else "model.embed_tokens.weight"]
    tuned.load_state_dict(state)
    with quiet():
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    result = lora.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", whole_embeddings="embeddings" not in kind
    )
    assert result.worst < 1e-5
    assert verify_folder(result.out) == []
    assert torch.allclose(logits(loaded(make, {"x": result.out})), logits(tuned), atol=2e-5)
    assert not torch.allclose(logits(base), logits(tuned), atol=0.1)
    back = open_source(result.out, base=open_source(tmp_path / "base"))
    for name in back.keys:
        assert torch.allclose(back.read(name).float(), state[name], atol=1e-5), name
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == of_gpt2
    assert config["task_type"] == "CAUSAL_LM"
    assert result.tried.startswith("tried: peft ")


def speech() -> torch.nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 8}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=48, max_target_positions=16, **sizes, **tokens))


def t5() -> torch.nn.Module:
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


FAMILIES: dict[str, tuple[Any, str | None]] = {
    "Qwen2.5-VL": (families.qwen_vl, None),
    "Gemma 3": (families.gemma3, None),
    "ViT": (families.vit, None),
    "Swin, by transformers": (families.swin, None),
    "GPT-NeoX": (families.neox, "CAUSAL_LM"),
    "Linear and Conv1D": (families.vision_to_text, None),
    "Mixtral": (families.mixtral, "CAUSAL_LM"),
    "Qwen3-MoE": (families.qwen_moe, "CAUSAL_LM"),
    "GPT-OSS": (families.gpt_oss, "CAUSAL_LM"),
    "Qwen3-VL-MoE": (lambda: families.qwen_vl_moe(12), None),
    "Llama 4, square experts": (lambda: families.llama4(16), "CAUSAL_LM"),
    "Whisper": (speech, None),
    "T5": (t5, "SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_applies_what_was_extracted(tmp_path: Path, family: str) -> None:
    """Every matrix changed, by names in memory, square and fused ones too: peft computes what the fine-tune does."""
    make, task = FAMILIES[family]
    base = families.made(make, tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad(), quiet():
        for name, tensor in tuned.named_parameters():
            kept = ("embed_tokens", "shared", "relative", "wte", "mm_input", "in_proj")
            if tensor.ndim > 1 and name.endswith(("weight", "_proj")) and not any(word in name for word in kept):
                tensor += 0.1 * torch.randn_like(tensor)
        tuned.save_pretrained(tmp_path / "tuned")
    result = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert result.tried.startswith("tried: peft "), result.warnings
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config["task_type"] == task
    with quiet():
        wrapped = PeftModel.from_pretrained(copy.deepcopy(base), result.out).eval()
    assert float((families.outputs(tuned) - families.outputs(base)).abs().max()) > 0.01
    got = families.outputs(wrapped.base_model.model)
    torch.testing.assert_close(got, families.outputs(tuned), rtol=1e-4, atol=1e-4)
    back = open_source(result.out, base=open_source(tmp_path / "base"))
    want = packed_like_memory(open_source(tmp_path / "tuned"))
    for name in want.keys:
        torch.testing.assert_close(packed_like_memory(back).read(name), want.read(name), rtol=1e-4, atol=1e-4)


def test_an_adapter_baked_into_its_base_comes_back(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", llama, 3, r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    with quiet():
        llama().save_pretrained(tmp_path / "base")
        loaded(llama, {"x": path}).merge_and_unload().save_pretrained(tmp_path / "tuned")
    result = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=0.999999)
    want = read_adapter(path)
    assert {m.name for m in result.modules} == set(want.modules)
    assert {m.rank for m in result.modules} == {3}
    for name, module in want.modules.items():
        got = product(tmp_path / "out", f"{name}.weight")
        assert torch.allclose(got, want.factors(name)[0].product * module.scale, atol=1e-5)


def test_rounding_of_what_is_stored_counts(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, delta := noise(24, 2) @ noise(2, 16, seed=1))
    result = lora.extract(tuned, base, tmp_path / "out", dtype="bfloat16")
    assert 1e-4 < result.worst < 1e-2
    assert float((product(tmp_path / "out") - delta).norm() / delta.norm()) == pytest.approx(result.worst, rel=1e-3)


def test_what_is_no_matrix_is_kept_or_left_out(tmp_path: Path) -> None:
    norm = {"model.norm.weight": (torch.ones(4), torch.ones(4) * 2)}
    tuned, base = pair(tmp_path, noise(24, 16), **norm)
    kept = lora.extract(tuned, base, tmp_path / "kept")
    assert kept.saved == ("model.norm",)
    assert torch.equal(
        load_file(kept.out / "adapter_model.safetensors")["base_model.model.model.norm.weight"], torch.ones(4) * 2
    )
    left = lora.extract(tuned, base, tmp_path / "left", rank=4, skip=True)
    assert left.saved == ()
    assert texts(left.warnings) == ["left out although changed: model.norm.weight"]
    only = lora.extract(tuned, base, tmp_path / "only", rank=4, exclude=("*norm*",))
    assert (only.saved, only.warnings) == ((), ())
    inside = lora.extract(tuned, base, tmp_path / "inside", include=("*norm*",))
    assert (inside.saved, inside.modules) == (("model.norm",), ())


def test_a_longer_vocabulary_is_kept_in_full(tmp_path: Path) -> None:
    grown = {"model.embed_tokens.weight": (noise(10, 4), noise(12, 4))}
    tuned, base = pair(tmp_path, noise(24, 16), **grown)
    result = lora.extract(tuned, base, tmp_path / "out")
    assert result.saved == ("model.embed_tokens",)
    assert "12 rows, the base 10" in result.warnings[0].text


REFUSED = [
    ({"cls_token": (noise(1, 4), noise(1, 4, seed=1))}, "cls_token changed, but an adapter cannot hold it: it is no"),
    ({"x.weight": (torch.arange(3), torch.arange(3) + 1)}, "its dtype is int64; --skip leaves it out"),
    ({"model.x.weight": (noise(3, 4), noise(4, 3))}, r"is \[4, 3\] in .*tuned, but \[3, 4\] in .*; is this its base"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_nothing_is_lost_silently(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    tuned, base = pair(tmp_path, noise(24, 16), **more)
    with pytest.raises((PlanError, SourceError), match=message) as caught:
        lora.extract(tuned, base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_wrong_wishes(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, noise(24, 16))
    for given, message in (
        ({"rank": 0}, "rank = 0 is outside [1, inf)"),
        ({"energy": 90}, "energy = 90 is outside (0, 1]; write 90% as 0.9"),
        ({"rank": 4, "energy": 0.9}, "a rank or an energy, not both"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            lora.extract(tuned, base, tmp_path / "out", **given)
    with pytest.raises(PlanError, match="differ in nothing"):
        lora.extract(base, base, tmp_path / "out")
    with pytest.raises(PlanError, match="is also an input"):
        lora.extract(tuned, base, tuned, overwrite=True)
    bad = stored(tmp_path / "bad", {WEIGHT: torch.full((24, 16), float("nan"))})
    with pytest.raises(NumericError, match=r"up_proj\.weight holds NaN or Inf"):
        lora.extract(bad, base, tmp_path / "out")


def test_an_adapter_is_resized(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", llama, 3, r=6, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    found = read_adapter(path)
    result = lora.resize(path, tmp_path / "small", rank=2)
    for report in result.modules:
        full = found.factors(report.name)[0].product.double() * found.modules[report.name].scale
        s = torch.linalg.svdvals(full)
        assert report.rank == 2
        assert report.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
    assert {m.rank for m in lora.resize(path, tmp_path / "same", energy=1.0).modules} == {6}
    model = loaded(llama, {"x": tmp_path / "same"})
    assert torch.allclose(logits(model), logits(loaded(llama, {"x": path})), atol=1e-5)
    with pytest.raises(RecipeError, match="give a rank or an energy"):
        lora.resize(path, tmp_path / "none")
