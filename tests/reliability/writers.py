"""The other commands that write a folder, each on inputs of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reliability.runs import Scene, make_scene
from weightsmith.jobs.compress import compress
from weightsmith.protect.run import lock
from weightsmith.recipe.load import load

QUIET = ("--quiet", "--threads", "1")
HIDDEN, INNER, ROWS = 8, 12, 16


def make_writers(folder: Path) -> dict[str, Scene]:
    """Scenes by the name of the command; `sweep` is a merge into several folders."""
    folder.mkdir()
    merged = make_scene(folder / "merge", "[{dare: {density: 0.5}}, average]", hidden=16, layers=0, shard="700B")
    squeezed = make_scene(folder / "compress", "tall_masks", hidden=16, layers=0, shard="700B")
    squeezed.recipe.write_text(squeezed.recipe.read_text().replace("output: {shard_size: 700B}\n", ""))
    compress(load(squeezed.recipe), folder / "small", threads=1, accept_loss=True)
    return {
        "compress": Scene(
            folder, squeezed.recipe, words=("compress", str(squeezed.recipe), "{out}", "--accept-loss", *QUIET)
        ),
        "restore": Scene(
            folder, squeezed.recipe, words=("restore", str(folder / "small"), "{out}", "--expert", "math", *QUIET)
        ),
        "sweep": Scene(
            folder, merged.recipe, words=("merge", str(merged.recipe), "{out}", "--set", "seed=1,2", *QUIET), apart=True
        ),
        "moe": _moe(folder / "moe"),
        "shrink": _shrink(folder / "shrink"),
        "lora": _lora(folder / "lora"),
        **_locks(folder / "locks"),
        "transplant": _transplant(folder / "transplant"),
    }


def _moe(folder: Path) -> Scene:
    folder.mkdir()
    for seed, name in enumerate(("base", "one", "two")):
        _llama(folder / name, seed)
    experts = {name: {"model": str(folder / name)} for name in ("one", "two")}
    recipe = folder / "recipe.json"
    made = {"base": str(folder / "base"), "experts": experts, "router": "random", "experts_per_token": 1}
    recipe.write_text(json.dumps(made))
    return Scene(folder, recipe, words=("moe", str(recipe), "{out}", *QUIET))


def _shrink(folder: Path) -> Scene:
    """Four experts of one layer become two."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    layer = "model.layers.0.mlp"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN), "lm_head.weight": (ROWS, HIDDEN)}
    shapes |= {f"{layer}.gate.weight": (4, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"{layer}.experts.{e}.{part}_proj.weight": (INNER, HIDDEN) for e in range(4) for part in ("gate", "up")}
    shapes |= {f"{layer}.experts.{e}.down_proj.weight": (HIDDEN, INNER) for e in range(4)}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 1,
              "tie_word_embeddings": False}  # fmt: skip
    _model(folder / "model", {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}, config)
    seen = {"counts": torch.tensor([4.0, 3, 2, 1]), "saliency": torch.tensor([1.0, 2, 3, 4])}
    grams = ("logits_gram", "outputs_cosine", "means_gram", "gated_means_gram")
    seen |= {gram: torch.eye(4) + 0.1 * torch.ones(4, 4) for gram in grams}
    notes = {"stat": "routing", "examples": 1, "rows": 10}
    (folder / "stats").mkdir()
    save_file({f"{layer}.experts.{n}": t for n, t in seen.items()}, folder / "stats" / "routing.safetensors",
              {"weightsmith": json.dumps(notes)})  # fmt: skip
    words = ("moe", "shrink", str(folder / "model"), "{out}", "--stats", str(folder / "stats"), "--experts", "2")
    return Scene(folder, folder / "model", words=(*words, "--by", "m_smoe", *QUIET))


def _llama(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    square, wide = (HIDDEN, HIDDEN), (INNER, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN), "lm_head.weight": (ROWS, HIDDEN)}
    layer = "model.layers.0"
    shapes |= {f"{layer}.self_attn.{part}_proj.weight": square for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": wide for part in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS, "hidden_size": HIDDEN,
              "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "tie_word_embeddings": False}  # fmt: skip
    _model(folder, {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}, config)


def _locks(folder: Path) -> dict[str, Scene]:
    """A model locked with a key that is made on the way, and unlocked."""
    folder.mkdir()
    _llama(folder / "model", 0)
    model, lone = str(folder / "model"), ("--no-compare", *QUIET)
    lock(model, folder / "locked", folder / "key", seed=1, compare=False, threads=1)
    unlocks = ("unlock", str(folder / "locked"), "{out}", "--key", str(folder / "key"), *lone)
    locks = ("lock", model, "{out}", "--key", "{out}.key", "--seed", "1", *lone)
    return {
        "lock": Scene(folder, folder / "model", words=locks, beside=("out.key",)),
        "unlock": Scene(folder, folder / "model", words=unlocks),
    }


def _lora(folder: Path) -> Scene:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {}
        for module in ("base_model.model.layers.0.q", "base_model.model.layers.1.q"):
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(INNER, 2, generator=generator)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"models: {{a: {folder / 'a'}, b: {folder / 'b'}}}\nmethod: cat\n")
    return Scene(folder, recipe, words=("lora", "merge", str(recipe), "{out}", "--quiet"), resumes=False)


def _transplant(folder: Path) -> Scene:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in range(ROWS - 2)]
    for name, own in (("model", words), ("donor", [*reversed(words[2:]), "n1", "w3w5"])):
        vocabulary = {"<s>": 0, "</s>": 1, **{word: i + 2 for i, word in enumerate(own)}}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"}
        tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
        tensors = {
            n: torch.randn(ROWS, HIDDEN, generator=generator) for n in ("model.embed_tokens.weight", "lm_head.weight")
        }
        config = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1, "num_attention_heads": 2}
        _model(folder / name, {**tensors, "model.norm.weight": torch.ones(HIDDEN)}, config)
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(roles))
    words_ = ("tokenizer", "transplant", str(folder / "model"), str(folder / "donor"), "{out}", "--k", "3", *QUIET)
    return Scene(folder, folder / "model", words=words_)


def _model(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
