"""Made-up models as folders: dense ones, adapters, other formats, tokenizers, statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .models import AWKWARD, BFLOAT16, FLOAT32, LLAMA, MIXED, VARIED, Model, bell, family, fisher, gram, tensor

__all__ = ["make"]

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 13, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def dense(layers: int, vocabulary: int = 13, width: int = 8, inner: int = 12) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama without biases."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        block = f"model.layers.{i}."
        found |= {f"{block}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        found |= {f"{block}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found |= {f"{block}mlp.down_proj.weight": (width, inner)}
        found |= {f"{block}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write(folder: Path, state: Model, **config: Any) -> None:
    """One safetensors file, and the config."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=1))


def adapter(folder: Path, rank: int, seed: int, kept: Mapping[str, Tensor] | None = None, **config: Any) -> None:
    """A LoRA adapter of 'dense/base'; kept: tensors that it has in full."""
    folder.mkdir(parents=True)
    tensors: Model = {f"base_model.model.{name}": value for name, value in (kept or {}).items()}
    for module, (rows, columns) in {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.1.mlp.up_proj": (12, 8),
        "model.layers.1.mlp.down_proj": (8, 12),
    }.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = tensor(bell((rank, columns), module, seed, "a"))
        tensors[f"base_model.model.{module}.lora_B.weight"] = tensor(0.1 * bell((rows, rank), module, seed, "b"))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(
        json.dumps({**told, "base_model_name_or_path": "dense/base", "task_type": "CAUSAL_LM", **config})
    )


def words(folder: Path, vocabulary: list[str], width: int, seed: int) -> None:
    """A model with a word tokenizer."""
    shapes = dense(1, len(vocabulary), width)
    write(folder, {n: tensor(bell(s, n, seed)) for n, s in shapes.items()}, vocab_size=len(vocabulary),
          hidden_size=width, num_hidden_layers=1)  # fmt: skip
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(vocabulary)}, "unk_token": "<s>"}
    told = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def statistics(folder: Path, stats: Mapping[str, Mapping[str, Model]]) -> None:
    """Folders as `weightsmith observe` writes them."""
    for name, kinds in stats.items():
        (folder / name).mkdir(parents=True)
        for kind, tensors in kinds.items():
            told = {"weightsmith": json.dumps({"stat": kind, "examples": 20, "rows": 20, "model": name, "aliases": {}})}
            save_file(tensors, folder / name / f"{kind}.safetensors", metadata=told)


def make(root: Path) -> None:
    """Write everything that the cases of files read."""
    base, experts = family(3, LLAMA, BFLOAT16)
    base |= {"position_ids": torch.arange(7)}
    for name, state in {"base": base, **experts}.items():
        write(root / "llama" / name, {**state, "position_ids": torch.arange(7)})
    for name, extra in (("eye", "vision_tower.layers.0.fc1.weight"), ("ear", "audio_tower.layers.0.fc1.weight")):
        state = experts["e0" if name == "eye" else "e1"]
        write(root / "llama" / name, {**state, "position_ids": torch.arange(7), extra: tensor(bell((5, 4), extra))})
    start, tuned = family(3, {**LLAMA, **AWKWARD}, MIXED, special=("cancel", "same"), wider=True)
    for name, state in {"base": start, **tuned}.items():
        write(root / "odd" / name, state)
    statistics(root / "stats", {n: s | gram(tuned)[n] for n, s in fisher(tuned).items()})
    start, tuned = family(3, VARIED, MIXED, special=("cancel",), wider=True)
    for name, state in {"base": start, **tuned}.items():
        write(root / "varied" / name, state)
    full, fine = family(3, dense(3), FLOAT32)
    for name, state in {"base": full, **fine}.items():
        write(root / "dense" / name, state)
    for at, (rank, more) in enumerate(((2, {}), (3, {"lora_alpha": 3, "use_rslora": True}), (2, {}), (2, {}), (1, {}))):
        adapter(root / "lora" / f"a{at}", rank, at, **more)
    _formats(root / "formats", base, experts)
    for at, seed in (("kept0", 7), ("kept1", 8)):
        more = {"lm_head.weight": tensor(bell((13, 8), at)), "model.norm.weight": tensor(bell((8,), at, "norm"))}
        adapter(root / "lora" / at, 2, seed, more, modules_to_save=["lm_head", "norm"])
    seeing = {f"language_model.{name}": shape for name, shape in dense(3).items()}
    seeing |= {f"vision_tower.blocks.{i}.w": (3, 5) for i in range(2)} | {"projector.w": (2,)}
    start, tuned = family(2, seeing)
    for name, state in {"base": start, **tuned}.items():
        write(root / "sees" / name, state, text_config={"num_hidden_layers": 3}, vision_config={"depth": 2})
    _runs(root / "run", tuned)
    listed = [f"w{i}" for i in range(20)]
    words(root / "words" / "base", ["<s>", "</s>", *listed], 8, 0)
    words(root / "words" / "x", ["<s>", "</s>", *listed, "green", "blue"], 8, 1)
    words(root / "words" / "y", ["<s>", "</s>", "red", *reversed(listed)], 8, 2)
    words(root / "words" / "donor", ["<s>", "</s>", "n0", *reversed(listed), "n1", "w3w5"], 12, 3)
    (root / "scores.json").write_text(json.dumps({"e0": 0.7, "e1": 0.5, "e2": 0.6}))


def _formats(root: Path, base: Model, experts: Mapping[str, Model]) -> None:
    """The same model in other clothes."""
    write(root / "sharded", {})
    (root / "sharded/model.safetensors").unlink()
    names, index = list(experts["e0"]), {}
    for at, part in enumerate((names[:4], names[4:])):
        file = f"model-{at + 1:05}-of-00002.safetensors"
        save_file({n: experts["e0"][n] for n in part}, root / "sharded" / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (root / "sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write(root / "pickled", {})
    (root / "pickled/model.safetensors").unlink()
    torch.save(experts["e1"], root / "pickled/pytorch_model.bin")
    save_file(experts["e2"], root / "single.safetensors")
    for name, expert in (("tied", "e2"), ("tied_too", "e0")):
        state = {n: t for n, t in experts[expert].items() if n != "lm_head.weight"}
        write(root / name, state, tie_word_embeddings=True)
    write(root / "tied_base", {n: t for n, t in base.items() if n not in ("lm_head.weight", "position_ids")},
          tie_word_embeddings=True)  # fmt: skip
    scaled: Model = {}
    for name, value in experts["e1"].items():
        if value.dim() == 2 and "proj" in name:
            scaled[name] = (value.float() * 16).to(torch.float8_e4m3fn)
            scaled[f"{name}_scale_inv"] = torch.full([-(-size // 8) for size in value.shape], 0.0625)
        else:
            scaled[name] = value
    write(root / "fp8", scaled, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})


def _runs(root: Path, models: Mapping[str, Model]) -> None:
    """Checkpoints of adapters, and of models, with what the trainer logged."""
    losses = (2.0, 1.25, 1.5)
    for at in range(len(losses)):
        folder = root / f"checkpoint-{100 * (at + 1)}"
        adapter(folder, 2, 10 + at)
        log = [{"step": 100 * (i + 1), "loss": loss, "epoch": i + 1} for i, loss in enumerate(losses[: at + 1])]
        state = json.dumps({"global_step": 100 * (at + 1), "log_history": log})
        (folder / "trainer_state.json").write_text(state)
        if at < len(models):
            full = root.with_name("trained") / folder.name
            write(full, list(models.values())[at])
            (full / "trainer_state.json").write_text(state)
