"""Locked models answer as before and come back with their key; keys stay where they are."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from locked_models import MODELS, answers, moved, saved
from safetensors.torch import load_file, save_file

from weightsmith.align import agree
from weightsmith.align.commute import commutant, dense, refuse_unless_commuting
from weightsmith.cli.main import main
from weightsmith.core.errors import NotKept, OutputError, PlanError, RecipeError, SourceError
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.protect.adapter import lock_adapter, unlock_adapter
from weightsmith.protect.key import read_key
from weightsmith.protect.run import lock, unlock

peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def _moved(a: Source, b: Source) -> dict[str, float]:
    return {n: float((a.read(n).double() - b.read(n).double()).norm() / a.read(n).double().norm()) for n in a.keys}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the model locked, and the key."""
    folder = tmp_path_factory.mktemp("llama")
    saved("llama", folder / "model")
    lock(folder / "model", folder / "locked", folder / "key")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_and_weights_come_back(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model")
    made = lock(model, tmp_path / "locked", tmp_path / "key", condition=10)
    assert made.agreement is not None
    assert made.agreement.holds
    assert made.agreement.before is not None
    assert moved(answers(model), answers(tmp_path / "locked")) < 1e-4
    unlock(tmp_path / "locked", tmp_path / "back", tmp_path / "key", compare=False)
    first, there, back = (open_source(tmp_path / n) for n in ("model", "locked", "back"))
    assert max(_moved(first, back).values()) < 1e-5
    far = _moved(first, there)
    said = read_manifest(tmp_path / "locked")["made_by"]
    assert {n for n, distance in far.items() if distance} <= set(said["locked"])
    assert not {n for n, distance in far.items() if distance} & set(said["copied"])
    heads = [d for n, d in far.items() if n.endswith("weight") and re.search(r"v_proj|o_proj|qkv|c_attn|kv_b|value", n)]
    assert min(heads) >= 0.9
    assert max(heads) >= 1


def test_outputs_that_moved_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written model is run: what the proof on a small one cannot see is not kept."""
    saved("llama", tmp_path / "model")
    monkeypatch.setattr(agree, "TOLERANCES", {"float32": 1e-12})
    with pytest.raises(NotKept, match="nothing is kept: outputs moved by"):
        lock(tmp_path / "model", tmp_path / "locked", tmp_path / "key")
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" in p.name) == []


def test_positions_that_only_the_class_knows_of(tmp_path: Path) -> None:
    """Old config files do not speak of rotations: what the small model does counts for the large one."""
    model = saved("wide_heads", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    (model / "config.json").write_text(json.dumps(config))
    lock(model, tmp_path / "locked", tmp_path / "key")
    (scheme,) = read_key(tmp_path / "key").known.schemes.values()
    assert scheme[0] is not None
    assert (scheme[0].pairing, scheme[0].turned) == ("half", scheme[0].width)


def test_bfloat16_within_its_tolerance(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "model", torch.bfloat16)
    made = lock(tmp_path / "model", tmp_path / "locked", tmp_path / "key")
    assert made.agreement is not None
    assert made.agreement.tolerance == 2e-2
    assert made.agreement.before is not None
    assert made.agreement.before < 1e-5 < made.agreement.after < 2e-2
    assert {k.dtype for k in open_source(tmp_path / "locked").keys.values()} == {"bfloat16"}


def test_equal_gains_may_be_turned_and_unequal_ones_only_flipped(tmp_path: Path) -> None:
    """Pairs with equal gains in both norms turn by any angle, which the others must not."""
    model = saved("qwen3", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name in (n for n in tensors if "q_norm" in n or "k_norm" in n):
        tensors[name][[0, 4]] = 1.25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    lock(model, tmp_path / "locked", tmp_path / "key", parts=("qk",))
    assert read_key(tmp_path / "key").equal == {f"model.layers.{i}.self_attn": ("1000",) for i in (0, 1)}
    there = load_file(tmp_path / "locked" / "model.safetensors")
    first, now = (t["model.layers.0.self_attn.k_proj.weight"] for t in (tensors, there))
    assert torch.allclose(now[1].abs(), first[1].abs(), atol=1e-5)
    assert not torch.allclose(now[0].abs(), first[0].abs(), atol=1e-2)
    assert moved(answers(model), answers(tmp_path / "locked")) < 1e-4


def test_what_turns_in_pairs_takes_no_dense_matrix() -> None:
    draw = np.random.default_rng(0)
    with pytest.raises(RecipeError, match="does not commute with rotary position embeddings"):
        refuse_unless_commuting(dense(draw, 8, 4), commutant(8, 8))
    refuse_unless_commuting(dense(draw, 8, 4), commutant(8, 8, "half", np.zeros(4)))  # theta collapsed to 0
    for allowed in (commutant(8, 4), commutant(8, 8, "interleaved"), commutant(8, 8, "half", np.array([1, 1, 2, 0]))):
        drawn = allowed.drawn(draw, 4)
        refuse_unless_commuting(drawn, allowed)
        assert np.linalg.cond(drawn) <= 4 * (1 + 1e-9)
    mirrored = np.eye(8)
    mirrored[0, 0] = -1
    with pytest.raises(RecipeError, match="does not commute"):
        refuse_unless_commuting(mirrored, commutant(8, 8))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_drawn_matrices_keep_scores_at_every_distance(pairing: str) -> None:
    allowed = commutant(8, 6, pairing)  # type: ignore[arg-type]
    a = allowed.drawn(np.random.default_rng(1), 10)
    c = np.linalg.inv(a).T
    for distance in (0, 1, 17, 40_000):
        r = np.eye(8)
        for i, (p, q) in enumerate(allowed.pairs):
            cos, sin = np.cos(distance * 10.0**-i), np.sin(distance * 10.0**-i)
            r[np.ix_((p, q), (p, q))] = [[cos, -sin], [sin, cos]]
        assert np.allclose(a.T @ r @ c, r, atol=1e-10)


# --- keys ------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_file(llama: Path, tmp_path: Path) -> None:
    lock(llama / "model", tmp_path / "again", llama / "key", compare=False)
    lock(llama / "model", tmp_path / "other", tmp_path / "other_key", compare=False)
    read = [(folder / "model.safetensors").read_bytes() for folder in (llama / "locked", tmp_path / "again")]
    assert read[0] == read[1]
    assert read[0] != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_key_is_nobodys_to_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("llama", tmp_path / "model")
    key = tmp_path / "secret.key"
    words = ["lock", str(tmp_path / "model"), str(tmp_path / "locked"), "--key", str(key)]
    assert main(words) == 0
    assert main(["unlock", str(tmp_path / "locked"), str(tmp_path / "back"), "--key", str(key), "--json"]) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    secret = read_key(key).secret
    assert secret not in repr(read_key(key))
    said = capsys.readouterr()
    assert secret not in said.out + said.err
    for file in (p for folder in ("locked", "back") for p in (tmp_path / folder).rglob("*") if p.is_file()):
        assert secret.encode() not in file.read_bytes(), file
        assert bytes.fromhex(secret) not in file.read_bytes(), file
    manifest = json.loads((tmp_path / "locked" / "weightsmith.json").read_text())
    assert manifest["lock"]["key"] == read_key(key).hash
    card = (tmp_path / "locked" / "README.md").read_text()
    assert "is **locked**" in card
    assert read_key(key).hash in card
    assert "protected" not in card


def test_a_key_has_its_name_only_when_it_is_whole(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, half = tmp_path / "key", tmp_path / ".key.partial"

    def full(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("weightsmith.protect.key.write_all", full)
        with pytest.raises(OutputError, match="No space left"):
            lock(llama / "model", tmp_path / "out", key, compare=False)
    assert [path.name for path in tmp_path.iterdir()] == []
    half.write_text("left by a kill before the link")
    lock(llama / "model", tmp_path / "out", key, compare=False)
    assert not half.exists()
    assert key.stat().st_mode & 0o777 == 0o600
    half.write_text("left by a kill behind the link")
    unlock(tmp_path / "out", tmp_path / "back", key, compare=False)
    lock(llama / "model", tmp_path / "again", key, compare=False)
    assert not half.exists()


def test_wrong_keys_are_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved("llama", tmp_path / "model2", seed=1)
    lock(tmp_path / "model2", tmp_path / "locked2", tmp_path / "key2", compare=False)
    with pytest.raises(SourceError, match=r"is not the key that .* was locked with"):
        unlock(llama / "locked", out, tmp_path / "key2")
    (tmp_path / "locked2" / "weightsmith.json").unlink()
    with pytest.raises(SourceError, match="is not what this key locked"):
        unlock(tmp_path / "locked2", out, llama / "key")
    with pytest.raises(SourceError, match="is the key of another model; choose another file"):
        lock(tmp_path / "model2", out, llama / "key")
    saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(SourceError, match=r"is the key of another model: .* has other tensors"):
        unlock(tmp_path / "gpt2", out, llama / "key")
    with pytest.raises(SourceError, match="is locked already"):
        lock(llama / "locked", out, tmp_path / "key3")
    with pytest.raises(SourceError, match="was made for another lock of this model"):
        lock(llama / "model", out, llama / "key", parts=("vo",))
    assert not out.exists()


def test_damaged_keys_are_refused(llama: Path, tmp_path: Path) -> None:
    text = (llama / "key").read_text()
    secret = read_key(llama / "key").secret
    damaged = {
        text.replace(secret[:8], "00000000"): "the key is damaged",
        text.replace('"condition"', '"condition": 4.0, "condition"'): "names 'condition' twice",
        text[: len(text) // 2]: "not valid JSON",
        "[]": "is no key of weightsmith lock",
        text.replace('"version": 1', '"version": 9'): "a key of version 9",
    }
    for i, (content, said) in enumerate(damaged.items()):
        path = tmp_path / f"key{i}"
        path.touch(0o600)
        path.write_text(content)
        with pytest.raises(SourceError, match=said) as caught:
            unlock(llama / "locked", tmp_path / "out", path)
        assert secret[8:] not in str(caught.value)
    path = tmp_path / "open"
    path.write_text(text)
    path.chmod(0o644)
    with pytest.raises(SourceError, match="others may read this key"):
        unlock(llama / "locked", tmp_path / "out", path)
    with pytest.raises(SourceError, match="the key cannot be read"):
        unlock(llama / "locked", tmp_path / "out", tmp_path / "none")


def test_a_key_lies_in_no_model(llama: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "out" / "key", llama / "model" / "key"):
        with pytest.raises(OutputError, match="which may be shared; keep the key elsewhere"):
            lock(llama / "model", tmp_path / "out", place)
    assert not (llama / "model" / "key").exists()


def test_a_changed_locked_model_is_unlocked_with_a_warning(llama: Path, tmp_path: Path) -> None:
    """Training goes on after a lock: what it changed comes along."""
    target = tmp_path / "tuned"
    target.mkdir()
    for file in (llama / "locked").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    save_file({n: x + 0.01 for n, x in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    made = unlock(target, tmp_path / "back", llama / "key")
    assert "was changed since it was locked" in str(made.result.warnings[-1])
    assert moved(answers(target), answers(tmp_path / "back")) < 1e-4


def test_a_change_of_the_last_layer_alone_is_seen(tmp_path: Path) -> None:
    """A merge of late layers, without the manifest, is not unlocked as if nothing were."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=6, **sizes)).save_pretrained(tmp_path / "model")
    lock(tmp_path / "model", tmp_path / "locked", tmp_path / "key", compare=False)
    (tmp_path / "locked" / "weightsmith.json").unlink()
    tensors = load_file(tmp_path / "locked" / "model.safetensors")
    for part in ("self_attn", "mlp"):
        merged = {n: x + 0.01 if f"layers.5.{part}" in n else x for n, x in tensors.items()}
        save_file(merged, tmp_path / "locked" / "model.safetensors", {"format": "pt"})
        with pytest.raises(SourceError, match="is not what this key locked"):
            unlock(tmp_path / "locked", tmp_path / "back", tmp_path / "key")


def test_a_seed_is_a_key(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lock(llama / "model", tmp_path / name, tmp_path / f"key_{name}", seed=3, compare=False)
    assert read_key(tmp_path / "key_a").hash == read_key(tmp_path / "key_b").hash
    with pytest.raises(SourceError, match="another key than that of seed 4"):
        lock(llama / "model", tmp_path / "c", tmp_path / "key_a", seed=4)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": ("vq",)}, "parts: 'vq' is no part of a lock; known: heads, mlp, qk, vo"),
        ({"parts": ()}, "parts: name at least one"),
        ({"condition": 0.5}, r"condition = 0.5 is outside \[1, 10000\]"),
        ({"seed": -1}, "seed = -1 is negative"),
        ({"modules": ("decoder.*",)}, "no attention and no MLP is called decoder"),
    ],
)
def test_bad_words(llama: Path, tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises((RecipeError, SourceError), match=said):
        lock(llama / "model", tmp_path / "out", tmp_path / "key", **options)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_unknown_layouts_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model" / "model.safetensors")
    tensors["model.layers.1.self_attn.strange"] = torch.ones(32, 3)
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text((llama / "model" / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match=r"the layout of model\.layers\.1\.self_attn: .*strange \[32, 3\] may belong"):
        lock(folder, tmp_path / "out", tmp_path / "key")
    config = json.loads((llama / "model" / "config.json").read_text())
    save_file(load_file(llama / "model" / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(SourceError, match="is quantised"):
        lock(folder, tmp_path / "out", tmp_path / "key")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="no attention and no MLP whose layout is known"):
        lock(folder, tmp_path / "out", tmp_path / "key")
    assert not (tmp_path / "key").exists()


def test_parts_and_modules_are_all_that_moves(llama: Path, tmp_path: Path) -> None:
    lock(llama / "model", tmp_path / "out", tmp_path / "key", parts=("vo",), modules=("model.layers.1.*",))
    far = _moved(open_source(llama / "model"), open_source(tmp_path / "out"))
    names = ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    assert {n for n, d in far.items() if d} == {f"model.layers.1.self_attn.{n}" for n in names}


def test_a_run_that_was_cut_short_goes_on(llama: Path, tmp_path: Path) -> None:
    lock(llama / "model", tmp_path / "out", tmp_path / "key", compare=False)
    made = lock(llama / "model", tmp_path / "out", tmp_path / "key", compare=False, resume=True)
    assert made.result.complete
    with pytest.raises(PlanError, match="exists and is not empty"):
        lock(llama / "model", tmp_path / "out", tmp_path / "key")


# --- adapters --------------------------------------------------------------------------------------


@peft_warns
@pytest.mark.parametrize(
    ("name", "target"), [("llama", ["q_proj", "o_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_an_adapter_is_carried_over(name: str, target: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = saved(name, tmp_path / "model")
    config = peft.LoraConfig(r=3, target_modules=target, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(tmp_path / "adapter")
    lock(model, tmp_path / "locked", tmp_path / "key", compare=False)
    lock_adapter(tmp_path / "adapter", model, tmp_path / "carried", tmp_path / "key")
    unlock_adapter(tmp_path / "carried", tmp_path / "locked", tmp_path / "back", tmp_path / "key")
    ids = torch.randint(3, 60, (2, 9))

    def run(base: str, adapter: str) -> torch.Tensor:
        whole = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / base), tmp_path / adapter
        )
        with torch.no_grad():
            return torch.as_tensor(whole.eval()(ids).logits)

    expected = run("model", "adapter")
    assert float((run("locked", "carried") - expected).abs().max()) < 1e-4
    assert float((run("model", "back") - expected).abs().max()) < 1e-4
    assert float((run("locked", "adapter") - expected).abs().max()) > 0.1


@peft_warns
def test_adapters_that_cannot_be_carried_over_are_refused(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama / "model"), config).save_pretrained(
        tmp_path / "dora"
    )
    with pytest.raises(SourceError, match=r"lora_magnitude_vector.*cannot be carried over"):
        lock_adapter(tmp_path / "dora", llama / "model", tmp_path / "out", llama / "key")
    assert not (tmp_path / "out").exists()


@peft_warns
def test_biases_of_an_adapter_are_carried_over(tmp_path: Path) -> None:
    """Under peft's name for a wrapped layer."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, mlp_bias=True, **sizes))
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    lock(tmp_path / "model", tmp_path / "locked", tmp_path / "key", compare=False)
    lock_adapter(tmp_path / "adapter", tmp_path / "model", tmp_path / "carried", tmp_path / "key")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "locked")
    carried = peft.PeftModel.from_pretrained(whole, tmp_path / "carried").eval()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert float((carried(ids).logits - adapted.eval()(ids).logits).abs().max()) < 1e-4


@peft_warns
def test_an_adapter_is_carried_once_and_to_its_own_model(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(llama / "model")
    peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    key = llama / "key"
    lock_adapter(tmp_path / "adapter", llama / "model", tmp_path / "carried", key)
    noted = json.loads((tmp_path / "carried" / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] is None  # where the locked model lies is not known
    with pytest.raises(SourceError, match="was locked with this key already"):
        lock_adapter(tmp_path / "carried", llama / "locked", tmp_path / "twice", key)
    lock_adapter(tmp_path / "adapter", llama / "locked", tmp_path / "known", key)
    noted = json.loads((tmp_path / "known" / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == str(llama / "locked")
    other = saved("llama", tmp_path / "other", seed=1)
    with pytest.raises(SourceError, match="the key of another model"):
        lock_adapter(tmp_path / "adapter", other, tmp_path / "twice", key)
    assert not (tmp_path / "twice").exists()


def test_a_merge_of_a_locked_model_is_warned_of(llama: Path, tmp_path: Path) -> None:
    """Models of one lock go together; one among others does not."""
    from weightsmith.core.problem import Code
    from weightsmith.jobs.merge import run
    from weightsmith.recipe.schema import Recipe

    def said(*models: Path) -> list[str]:
        recipe = Recipe.model_validate({"models": {f"m{i}": str(m) for i, m in enumerate(models)}, "method": "linear"})
        return [str(one) for one in run(recipe, tmp_path / "out", overwrite=True).warnings if one.code is Code.SOURCE]

    model, locked = llama / "model", llama / "locked"
    assert [text for text in said(model, locked) if "m1: locked, so in another basis than the rest" in text]
    assert not said(locked, locked)
    assert not said(model, model)
