"""LoRA views against the peft library, cut invariance, and adapters that do not fit."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith.core.errors import SourceError
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.source import Cost, MemorySource, Source
from weightsmith.io.read.updates import Update

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=48, num_labels=3, **sizes))


def train(model: torch.nn.Module) -> None:
    """Move every trainable weight, so that nothing stays at its initial zero or at the base's value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def oracle(folder: Path, make: Callable[[], torch.nn.Module], **config: Any) -> tuple[dict, dict]:
    """Save a trained adapter to `folder`; return (base state dict, state dict merged by peft)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
        train(wrapped)
        wrapped.save_pretrained(folder)
        # Through the files, not the live model: what was saved is what is compared.
        fresh = make()
        fresh.load_state_dict(base)
        merged = peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload()
    return base, merged.state_dict()


CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "all linear": (llama, {"r": 4, "target_modules": "all-linear"}),
    "rslora": (llama, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 3},
            "alpha_pattern": {"layers.0.mlp.gate_proj": 11, "o_proj": 5},
        },
    ),
    "patterns with rslora": (
        llama,
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.*": 2, "q_proj": 6}},
    ),
    "modules to save": (llama, {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "bias all": (llama, {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "bias of lora layers": (llama, {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora bias": (llama, {"r": 4, "target_modules": ["q_proj"], "lora_bias": True}),
    "lora bias on a trained bias": (
        llama,
        {"r": 4, "target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"},
    ),
    "embeddings": (llama, {"r": 4, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "output layer": (llama, {"r": 4, "target_modules": ["lm_head"]}),
    "dora": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on embeddings": (llama, {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True}),
    "fan in fan out": (
        gpt2,
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "square fan in fan out": (gpt2, {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "dora with fan in fan out": (
        gpt2,
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "bert with a trained head": (
        bert,
        {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_peft(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base, merged = oracle(tmp_path, make, **config)
    source = AdapterSource(tmp_path, MemorySource(base, "base"))
    changed = {name for name in source.keys if not torch.equal(base[name], merged[name])}
    assert changed, "the oracle changed nothing"
    # peft stores embeddings it adapts, and biases it trains, even if they are equal to the base's
    assert changed <= set(source.changed)
    for name in source.keys:
        torch.testing.assert_close(source.read(name), merged[name], rtol=1e-6, atol=1e-6)
        if not source.computes(name):
            assert torch.equal(source.read(name), merged[name])


def big_adapter(folder: Path, *, rows: int = 785, columns: int = 40, rank: int = 8, **config: Any) -> MemorySource:
    """A base with one large matrix (plain, and stored transposed), and an adapter on it."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    folder.mkdir(exist_ok=True)
    weight = random(columns, rows).T.contiguous() if config.get("fan_in_fan_out") else random(rows, columns)
    inputs, outputs = (rows, columns) if config.get("fan_in_fan_out") else (columns, rows)
    parts = {"lora_A.weight": random(rank, inputs), "lora_B.weight": random(outputs, rank)}
    if config.get("use_dora"):
        parts["lora_magnitude_vector"] = random(outputs).abs()
    save_file(
        {f"base_model.model.m.{name}": tensor for name, tensor in parts.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return MemorySource({"m.weight": weight, "other": torch.ones(3, dtype=torch.bfloat16)}, "base")


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"fan_in_fan_out": True}, {"fan_in_fan_out": True, "use_dora": True}]
)
def test_rows_cut_anywhere_give_the_same_bits(config: dict[str, Any], tmp_path: Path) -> None:
    base = big_adapter(tmp_path, **config)
    whole = AdapterSource(tmp_path, base).read("m.weight")
    rows = len(whole)
    for step in (1, 7, 100, Update.chunk, Update.chunk + 1, 700):
        source = AdapterSource(tmp_path, base)
        starts = range(0, rows, step) if step > 1 else (0, 1, Update.chunk - 1, Update.chunk, rows - 1)
        for start in starts:
            stop = min(start + step, rows)
            assert source.read("m.weight", start, stop).equal(whole[start:stop])
    assert AdapterSource(tmp_path, base).read("m.weight", 5, 5).shape == (0, 40)


def test_threads_of_the_matrix_product_do_not_show(tmp_path: Path) -> None:
    base = big_adapter(tmp_path, rows=700, columns=1000, rank=64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(AdapterSource(tmp_path, base).read("m.weight"))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def product_of(source: Source, base: Source) -> tuple[torch.Tensor, torch.Tensor]:
    found = source.factors("m.weight", base)
    assert found is not None
    left, right = found.read()
    assert left.shape[1] == right.shape[0] == found.rank
    return left, right


def test_the_closed_form_and_its_factors(tmp_path: Path) -> None:
    base = big_adapter(tmp_path, use_rslora=True)
    source = AdapterSource(tmp_path, base)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.m.lora_{part}.weight"].double() for part in "AB")
    expected = base.read("m.weight").double() + 16 / math.sqrt(8) * b @ a
    torch.testing.assert_close(source.read("m.weight").double(), expected, rtol=1e-6, atol=2e-5)
    left, right = product_of(source, base)
    assert (left.shape, right.shape) == ((785, 8), (8, 40))
    torch.testing.assert_close(base.read("m.weight") + left @ right, source.read("m.weight"))
    assert source.factors("other", base) is None


def test_untouched_tensors_are_served_as_stored(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    source = AdapterSource(tmp_path, base)
    assert not source.computes("other")
    assert source.bits("other").tolist() == [0x3F80] * 3
    assert source.computes("m.weight")
    with pytest.raises(SourceError, match=r"'m\.weight' is calculated on reading and has no stored bits"):
        source.bits("m.weight")
    assert source.changed == ("m.weight",)


def test_factors_of_a_transposed_weight_and_none_for_dora(tmp_path: Path) -> None:
    base = big_adapter(tmp_path / "t", fan_in_fan_out=True)
    source = AdapterSource(tmp_path / "t", base)
    left, right = product_of(source, base)
    torch.testing.assert_close(base.read("m.weight") + left @ right, source.read("m.weight"))
    base = big_adapter(tmp_path / "d", use_dora=True)
    assert AdapterSource(tmp_path / "d", base).factors("m.weight", base) is None


def test_low_precision_bases_give_float32(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    half = MemorySource({name: tensor.bfloat16() for name, tensor in base._tensors.items()}, "half")
    read = AdapterSource(tmp_path, half).read("m.weight")
    assert read.dtype == torch.float32
    exact = MemorySource({name: tensor.bfloat16().float() for name, tensor in base._tensors.items()}, "exact")
    assert read.equal(AdapterSource(tmp_path, exact).read("m.weight"))
    assert AdapterSource(tmp_path, half).keys["m.weight"].dtype == "bfloat16"


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    once = AdapterSource(tmp_path, base)
    twice = AdapterSource(tmp_path, once)
    delta = once.read("m.weight") - base.read("m.weight")
    torch.testing.assert_close(twice.read("m.weight"), base.read("m.weight") + 2 * delta, rtol=1e-5, atol=1e-4)


def test_a_base_that_is_still_elsewhere_is_fetched_through_the_view(tmp_path: Path) -> None:
    class Elsewhere(MemorySource):
        prepared = False

        def prepare(self) -> None:
            self.prepared = True

    base = Elsewhere(big_adapter(tmp_path)._tensors, "far")
    base.origin = replace(base.origin, cost=Cost(download=7))
    view = AdapterSource(tmp_path, base)
    assert view.origin.cost.download == 7
    view.prepare()
    assert base.prepared


def test_pickling_and_fingerprint(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    source = AdapterSource(tmp_path, base)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("m.weight", 3, 9).equal(source.read("m.weight", 3, 9))
    before = source.fingerprint()
    assert json.dumps(before)
    edit(tmp_path, lora_alpha=5)
    assert AdapterSource(tmp_path, base).fingerprint() != before


def test_names_of_an_unsaved_state_dict(tmp_path: Path) -> None:
    """As in `model.state_dict()`: with the adapter's name in them."""
    base = big_adapter(tmp_path)
    expected = AdapterSource(tmp_path, base).read("m.weight")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in stored.items()}
    renamed["base_model.model.other.modules_to_save.default.weight"] = torch.full((2,), 7.0)
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    base = MemorySource({**base._tensors, "other.weight": torch.zeros(2)}, "base")
    source = AdapterSource(tmp_path, base)
    assert source.read("m.weight").equal(expected)
    assert source.read("other.weight").tolist() == [7.0, 7.0]
    assert source.bits("other.weight").tolist() == [0x40E00000] * 2


# --- adapters that do not fit ----------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": "OFT"}, "peft_type 'OFT'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"some_new_option": 3}, "some_new_option = 3 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changed the base"),
        ({"r": 0}, "r = 0 is not a positive number"),
        ({"r": "8"}, "r = '8' is not a positive number"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"rank_pattern": {"m": -1}}, "m = -1 is not a positive"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern '\(' is not a regular expression"),
        ({"rank_pattern": [1]}, "not a mapping"),
        ({"r": 9}, r"'m' has rank 8 in its tensors, but adapter_config\.json says 9"),
        ({"use_dora": True}, r"'m' lacks a lora_magnitude_vector, with use_dora = True"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(SourceError, match=text) as error:
        AdapterSource(tmp_path, base)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({}, "the adapter changes none of the 2 tensors of base"),
        ({A: (8, 40)}, "'m' lacks a lora_B"),
        ({B: (785, 8)}, "'m' lacks a lora_A"),
        ({A: (8, 40), B: (785, 4)}, "has rank 8 in A and 4 in B"),
        ({A: (8, 41), B: (785, 8)}, r"adapts a weight of shape \[785, 41\], but 'm\.weight' in base is \[785, 40\]"),
        ({A: (8, 40, 1, 1), B: (785, 8, 1, 1)}, r"adapts a weight of shape \[785, 40, 1, 1\], but 'm\.weight' in base"),
        ({A: (8, 40, 1, 1), B: (785, 4, 1, 1)}, "adapts a grouped convolution; its change takes in the inputs of all"),
        (
            {A.replace(".m.", ".mm."): (8, 40), B.replace(".m.", ".mm."): (785, 8)},
            r"belongs to 'mm\.weight', which base lacks; did you mean 'm\.weight'\?",
        ),
        ({"base_model.model.other": (4,)}, r"'base_model\.model\.other' is \[4\], but 'other' in base is \[3\]"),
        ({"base_model.model.new": (4,)}, r"belongs to 'new', which base lacks"),
        ({A: (8, 40), A.replace(".weight", ".x.weight"): (8, 40)}, "is stored twice, differently"),
        ({A: (8, 40), B: (785, 8), "base_model.model.m.lora_magnitude_vector": (785,)}, "has a lora_magnitude_vector"),
        (
            {A: (8, 40), B: (785, 8), "base_model.model.m.lora_B.bias": (785,)},
            r"belongs to 'm\.bias', which base lacks",
        ),
        (
            {"base_model.model.m.token_adapter.trainable_tokens_delta": (2, 4)},
            r"has 2 rows, adapter_config\.json names \(\) as their tokens",
        ),
    ],
)
def test_tensors_that_do_not_fit(stored: dict[str, tuple[int, ...]], text: str, tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    save_file({name: torch.ones(shape) for name, shape in stored.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=text) as error:
        AdapterSource(tmp_path, base)
    assert "\n" not in str(error.value)


def test_tied_and_quantised_bases_are_refused(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    weight = base._tensors["m.weight"]
    with pytest.raises(SourceError, match=r"changes 'm\.weight', which tied ties to 'a\.weight'"):
        AdapterSource(tmp_path, MemorySource({"a.weight": weight, "m.weight": weight}, "tied"))
    with pytest.raises(SourceError, match=r"'m\.weight' in small is int8"):
        AdapterSource(tmp_path, MemorySource({"m.weight": weight.to(torch.int8)}, "small"))


def test_square_weights_among_both_orientations_are_refused(tmp_path: Path) -> None:
    shapes = {"plain": (8, 4), "turned": (4, 8), "square": (4, 4)}
    sizes = {"plain": (4, 8), "turned": (4, 8), "square": (4, 4)}  # in, out
    stored = {}
    for name, (inputs, outputs) in sizes.items():
        stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"] = torch.ones(2, inputs), torch.ones(outputs, 2)
    save_file(stored, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(SourceError, match=r"'square\.weight' is square"):
        AdapterSource(tmp_path, MemorySource(base, "base"))


def test_a_folder_without_its_files(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        AdapterSource(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"adapter_config\.json: not valid JSON"):
        AdapterSource(tmp_path, base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"adapter_config\.json: cannot be read"):
        AdapterSource(tmp_path, base)


def test_a_pickled_adapter(tmp_path: Path) -> None:
    base = big_adapter(tmp_path)
    expected = AdapterSource(tmp_path, base).read("m.weight")
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert AdapterSource(tmp_path, base).read("m.weight").equal(expected)
