"""GGUF files: Hugging Face's names and order, bit for bit; what is quantised, unknown or damaged is refused."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from gguf_files import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB, tensors, write
from safetensors.torch import load_file, save_file

import weightsmith as ws
from kit import texts
from safety.readers import gguf_seeds
from weightsmith.core.errors import MissingExtra, SourceError
from weightsmith.io.read.gguf import GgufSource
from weightsmith.io.read.open import open_source


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_names_order_and_bits_are_those_of_hugging_face(arch: str, dtype: str, tmp_path: Path) -> None:
    state = tensors(arch)
    source = open_source(write(tmp_path / "model.gguf", state, arch, dtype))
    assert set(source.keys) == set(state)
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for name, value in state.items():
        want = value.to(stored) if value.ndim > 1 else value
        assert torch.equal(source.read(name), want), name
        assert not source.computes(name)


def test_any_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    state = tensors()
    source = pickle.loads(pickle.dumps(GgufSource(write(tmp_path / "model.gguf", state))))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        rows = state[name].shape[0]
        for start, stop in ((0, 1), (1, 6), (7, 9), (5, rows), (rows - 1, rows), (3, 3)):
            assert torch.equal(source.read(name, start, stop), state[name][start:stop])


def test_transformers_undoes_the_order_alike(tmp_path: Path) -> None:
    import gguf
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    source = GgufSource(write(tmp_path / "model.gguf", tensors()))
    theirs = LlamaTensorProcessor({"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS})
    found = 0
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            layer, part = tensor.name.split(".")[1], tensor.name.split(".")[2][-1]
            mine = source.read(f"model.layers.{layer}.self_attn.{part}_proj.weight").numpy()
            assert (theirs.process(weights=tensor.data, name=tensor.name).weights == mine).all()
            found += 1
    assert found == 4


def test_it_merges_with_a_folder(tmp_path: Path) -> None:
    base, tuned = tensors(seed=0), tensors(seed=1)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    write(tmp_path / "tuned.gguf", tuned)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: base\nmodels: {t: tuned.gguf}\nmethod: task_arithmetic\nparameters: {lambda: 0.5}\n")
    ws.Recipe.load(recipe).run(tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    for name, value in base.items():
        torch.testing.assert_close(out[name], value + 0.5 * (tuned[name] - value))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_merge_with_a_folder_loads_in_transformers(dtype: str, tmp_path: Path) -> None:
    """Names, order of rows and numbers: the logits are those of the mean of the two models."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    models[0].save_pretrained(tmp_path / "one")
    other = dict(models[1].state_dict())
    write(tmp_path / "two.gguf", other, dtype=dtype)
    tree = {"models": {"one": str(tmp_path / "one"), "two": str(tmp_path / "two.gguf")}, "method": "linear"}
    ws.Recipe.model_validate(tree).run(tmp_path / "out")
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    two = {name: value.to(stored).float() if value.ndim > 1 else value for name, value in other.items()}
    models[0].load_state_dict({name: (value + two[name]) / 2 for name, value in models[0].state_dict().items()})
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(made.eval()(ids).logits, models[0](ids).logits)
        assert made.generate(ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (1, 11)
    tree["models"] = {name: str(tmp_path / "two.gguf") for name in ("one", "two")}
    alone = ws.Recipe.model_validate(tree).run(tmp_path / "alone")
    assert not (tmp_path / "alone/config.json").exists()
    assert any("one is a GGUF file, so the result has no config.json" in text for text in texts(alone.warnings))


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    state = tensors()
    with pytest.raises(SourceError, match=r"token_embd.weight is quantised \(Q8_0\), and merging needs the weights"):
        open_source(write(tmp_path / "q8.gguf", state, dtype="Q8_0"))
    with pytest.raises(
        SourceError, match=r"GGUF of architecture 'gemma', whose tensors cannot be mapped back; known: llama"
    ):
        open_source(write(tmp_path / "gemma.gguf", state, arch="gemma"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.gguf", tensors()).read_bytes()
    bad = tmp_path / "bad.gguf"
    for raw, text in (
        (b"", r"bad\.gguf"),
        (b"GGUF", r"not a GGUF file that can be read"),
        (good[:200], r"not a GGUF file that can be read \(the header goes beyond"),
        (b"XXXX" + good[4:], r"not a GGUF file that can be read \(GGUF magic invalid\)"),
        (good[:-4096], r"truncated: .* ends at byte"),
        (good.replace(b"blk.0.attn_q.", b"blk.0.attn_z."), r"'blk.0.attn_z.weight' has no Hugging Face name"),
        (good.replace(b"blk.1.attn_q.", b"blk.0.attn_q."), r"Found duplicated|is there twice|duplicate"),
    ):
        bad.write_bytes(raw)
        with pytest.raises(SourceError, match=text):
            open_source(bad)


def test_attention_of_no_rows_is_read_as_such(tmp_path: Path) -> None:
    (good,) = gguf_seeds()
    name, path = b"blk.0.attn_q.weight", tmp_path / "m.gguf"
    path.write_bytes(good.replace(name + struct.pack("<IQQ", 2, 2, 4), name + struct.pack("<IQQ", 2, 2, 0)))
    source = GgufSource(path)
    assert source.bits("model.layers.0.self_attn.q_proj.weight").shape == (0, 2)


def test_endless_lists_end(tmp_path: Path) -> None:
    """A list that says it has 2^60 values is refused at the end of the file, not counted through."""
    import struct

    name = b"general.tags"
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name
    raw += struct.pack("<IIQ", 9, 4, 1 << 60) + b"\0" * 64
    (tmp_path / "endless.gguf").write_bytes(raw)
    with pytest.raises(SourceError, match="goes beyond the end of the file"):
        open_source(tmp_path / "endless.gguf")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'weightsmith\[gguf\]'"):
        open_source(path)


def test_any_part_of_a_split_model_stands_for_all(tmp_path: Path) -> None:
    """Split by the gguf package itself; the metadata are in the first part alone."""
    state = tensors()
    write(tmp_path / "m.gguf", state, split=8)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert len(others) == 2
    for part in (first, others[-1]):
        source = pickle.loads(pickle.dumps(open_source(part)))
        assert set(source.keys) == set(state)
        assert all(torch.equal(source.read(name), value) for name, value in state.items())
        assert set(source.fingerprint()["files"]) == {path.name for path in (first, *others)}
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"one of 3 parts of a model, but its name does not end in -00001-of-00003"):
        open_source(renamed)
    renamed.rename(first)
    others[0].unlink()
    with pytest.raises(SourceError, match=rf"one of 3 parts of a model, of which {others[0].name} is not there"):
        open_source(first)
    write(tmp_path / "other.gguf", {name: state[name] for name in list(state)[:11]}, split=10)
    short = sorted(tmp_path.glob("other-*.gguf"))[-1]
    write(tmp_path / "third.gguf", state, split=8)
    (tmp_path / "third-00003-of-00003.gguf").write_bytes(short.read_bytes())
    with pytest.raises(SourceError, match=r"split\.tensors\.count = \d+, but the 3 parts hold \d+ tensors"):
        open_source(tmp_path / "third-00001-of-00003.gguf")


def test_a_file_without_an_output_layer_ties_it(tmp_path: Path) -> None:
    """As llama.cpp reads it; merged with a model that has a head of its own, it is untied."""
    base, tuned = tensors(seed=0), tensors(seed=1)
    head = tuned.pop("lm_head.weight")
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    source = open_source(write(tmp_path / "tuned.gguf", tuned))
    assert dict(source.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in source.keys
    assert head.shape == source.key("lm_head.weight").shape
    made = ws.merge({"t": tmp_path / "tuned.gguf"}, "task_arithmetic", base=tmp_path / "base")
    torch.testing.assert_close(made["lm_head.weight"], tuned["model.embed_tokens.weight"])
