"""Checking and observing models of every kind: encoders, classifiers, two towers, speech, encoder and decoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observe_models import saved, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.cli.main import main
from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.io.architectures import GIVE_PROBABILITIES
from weightsmith.io.package.manifest import write_manifest
from weightsmith.io.read.stats import StatsSource
from weightsmith.jobs.compress import compress, restore
from weightsmith.observe.check import check, sample_text
from weightsmith.observe.collect import observe
from weightsmith.observe.kinds import KINDS, kind_of
from weightsmith.observe.model import load_model, text_coder
from weightsmith.observe.probe import Found, apart, probe
from weightsmith.recipe.schema import Recipe

torch.set_num_threads(1)

TEXT: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
WAV = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 10,
    "conv_dim": (8, 8), "conv_stride": (20, 20), "conv_kernel": (20, 20), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
T5 = {"vocab_size": 600, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "vocab_size": 600, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 16, "decoder_start_token_id": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP = {
    "text_config": {**TEXT, "projection_dim": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
    "vision_config": {**VISION, "projection_dim": 8}, "projection_dim": 8,
}  # fmt: skip

MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BertModel": ("encoder", "BertConfig", TEXT),
    "MPNetModel": ("encoder", "MPNetConfig", TEXT),
    "BertForMaskedLM": ("masked-lm", "BertConfig", TEXT),
    "BertForSequenceClassification": ("sequence-classification", "BertConfig", {**TEXT, "num_labels": 3}),
    "BertForTokenClassification": ("token-classification", "BertConfig", {**TEXT, "num_labels": 3}),
    "BertForQuestionAnswering": ("encoder", "BertConfig", TEXT),
    "T5ForConditionalGeneration": ("seq2seq-lm", "T5Config", T5),
    "CLIPModel": ("image-text", "CLIPConfig", CLIP),
    "ViTModel": ("image-encoder", "ViTConfig", VISION),
    "Wav2Vec2ForCTC": ("speech", "Wav2Vec2Config", WAV),
    "WhisperForConditionalGeneration": ("speech", "WhisperConfig", WHISPER),
}


def made(name: str, seed: int = 0, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    _, config, fields = MADE[name]
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**fields, **more))
    return model.eval()


def nudged(model: nn.Module, size: float) -> nn.Module:
    """The same, moved a little."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


def family(name: str, tmp_path: Path, words: bool = True) -> Path:
    """A base, two models near it, and their plain mean with a manifest that names them."""
    folders = {"base": 0.0, "a": 0.05, "out": 0.02}
    for folder, size in folders.items():
        saved(nudged(made(name), size), tmp_path / folder)
        if words:
            word_tokenizer(tmp_path / folder, sample_text())
    saved(made(name, seed=5), tmp_path / "far")
    recipe = {"base": str(tmp_path / "base"), "models": {"a": str(tmp_path / "a"), "far": str(tmp_path / "far")}}
    noted = {"kind": "merge", "recipe": recipe, "inputs": {}, "output": {"files": {}, "tensors": {}}}
    write_manifest(tmp_path / "out", noted)
    return tmp_path / "out"


@pytest.mark.parametrize("name", MADE)
def test_every_kind_is_run_and_compared(name: str, tmp_path: Path) -> None:
    report = check(family(name, tmp_path, words="CLIP" not in name))
    assert (report["kind"], report["ok"], report["finite"], report["problems"]) == (MADE[name][0], True, True, [])
    assert list(report["models"]) == ["base", "a", "far"]
    assert report["models"]["base"]["cosine"] > 0.97, "the very model is near"
    assert report["models"]["far"]["lowest"] < min(0.97, report["models"]["base"]["lowest"])
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("name", MADE)
def test_nan_is_found_in_every_kind(name: str, tmp_path: Path) -> None:
    folder = saved(made(name), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    ends = ("fc1.weight", "wi.weight", "intermediate_dense.weight", "intermediate.dense.weight")
    hurt = next(n for n in tensors if n.endswith(ends))
    tensors[hurt].view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = check(folder)
    assert (report["ok"], report["finite"]) == (False, False)
    assert f"{hurt}: NaN or Inf in the weights" in report["problems"]


def test_why_outputs_cannot_be_compared_is_said() -> None:
    def found(rows: int, width: int, tokens: int = 4, logits: bool = True) -> Found:
        return Found(torch.zeros(rows, width), logits, "1 texts", True, texts=(torch.zeros(tokens),))

    mine = found(4, 7)
    assert apart(mine, found(4, 9)) == "it gives 9 logits (another vocabulary, or other labels), the result 7"
    assert apart(mine, found(6, 7, tokens=6)).startswith("its tokenizer makes 6 tokens of the texts, the result's 4")
    assert apart(mine, found(1, 7, logits=False)) == "it has another head: only one of the two gives logits"
    assert apart(found(1, 7, logits=False), found(1, 9, logits=False)).startswith("it gives 9 numbers for each input")


def test_the_comparison_is_that_of_mean_pooled_tokens(tmp_path: Path) -> None:
    out = family("BertModel", tmp_path)
    vectors = {}
    for name in ("out", "base"):
        loaded = load_model(tmp_path / name)
        coder = text_coder(loaded)
        sentences = sample_text().replace("\n", " ").split(". ")[:1]
        ids = torch.tensor([coder.example(sentences[0] + ".", 64)])
        with torch.no_grad():
            vectors[name] = loaded.module(input_ids=ids).last_hidden_state.mean(1)[0].double()
        assert torch.allclose(probe(loaded, sentences[0] + ".").features[0], vectors[name], atol=1e-6)
    want = float(torch.nn.functional.cosine_similarity(vectors["out"], vectors["base"], dim=0))
    text = tmp_path / "t.txt"
    text.write_text(sample_text().replace("\n", " ").split(". ")[0] + ".")
    assert check(out, text=text)["models"]["base"] == {"cosine": pytest.approx(want), "lowest": pytest.approx(want)}


def test_sentence_encoders_pool_as_they_say(tmp_path: Path) -> None:
    folder = saved(made("BertModel"), tmp_path / "m")
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    loaded = load_model(folder)
    with torch.no_grad():  # no tokenizer: made-up ids, of which the first are 0, 1, 2, ...
        hidden = loaded.module(input_ids=torch.arange(64)[None]).last_hidden_state[0].double()
    wanted = {
        "mean_tokens": hidden.mean(0),
        "cls_token": hidden[0],
        "lasttoken": hidden[-1],
        "max_tokens": hidden.amax(0),
    }
    for mode, want in wanted.items():
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
        assert torch.allclose(probe(loaded, "").features[0], want, atol=1e-6), mode


def test_a_sentence_encoder_out_of_a_language_model(tmp_path: Path) -> None:
    from observe_models import tiny_llama

    folder = saved(tiny_llama(), tmp_path / "m")
    (folder / "modules.json").write_text("[]")
    report = check(folder)
    assert (report["kind"], report["ok"]) == ("encoder", True)


def test_a_missing_pooler_is_not_missed(tmp_path: Path) -> None:
    folder = saved(made("BertModel"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert check(folder)["ok"]
    save_file({n: t for n, t in tensors.items() if "query" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert "would be random (missing_keys: encoder.layer.0.attention.self.query" in check(folder)["problems"][0]


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = saved(made("BertModel"), tmp_path / "m")
    told = json.loads((folder / "config.json").read_text())
    told |= {"architectures": ["StrangeModel"], "auto_map": {"AutoModel": "bad.StrangeModel"}}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "bad.py").write_text(f"open({str(tmp_path / 'hurt')!r}, 'w')")
    report = check(folder)
    assert (report["ok"], report["kind"]) == (True, "tensors")
    assert "transformers has no model called 'StrangeModel'" in report["notes"][0]
    assert not (tmp_path / "hurt").exists()


def test_position_ids_and_variances_are_looked_at(tmp_path: Path) -> None:
    folder = saved(made("BertModel"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert check(folder)["ok"]
    tensors["embeddings.position_ids"] = torch.arange(64)[None] * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = check(folder)
    assert report["problems"] == [
        "embeddings.position_ids: not 0, 1, 2, ...; keep it as the base has it (exclude)"
    ]  # fmt: skip
    assert not report["ok"]


def test_what_is_not_run_is_not_said_to_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    folder = saved(transformers.BertForMultipleChoice(transformers.BertConfig(**TEXT)), tmp_path / "m")
    assert main(["check", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "note: not run: its forward pass does not take texts (shape '[-1, 64]' is invalid" in shown
    assert shown.endswith(f"{folder}: all values are finite; it was not run\n")


def test_pictures_are_not_tried(tmp_path: Path) -> None:
    import transformers as hf

    text = hf.LlamaConfig(**{**TEXT, "vocab_size": 256, "num_key_value_heads": 1})
    config = hf.LlavaConfig(text_config=text, vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=255)
    report = check(saved(hf.LlavaForConditionalGeneration(config), tmp_path / "m"), length=32)
    assert (report["kind"], report["ok"], report["ran"]) == ("causal-lm", True, True)
    assert report["models"]["merged"]["perplexity"] == pytest.approx(256, rel=0.1)
    assert report["notes"] == ["run on text alone: pictures were not tried"]


def test_the_kinds_that_names_tell() -> None:
    for name, kind in {
        "LlamaModel": "encoder",
        "GPT2LMHeadModel": "causal-lm",
        "Qwen2_5_VLForConditionalGeneration": "causal-lm",
        "BartForConditionalGeneration": "seq2seq-lm",
        "SiglipModel": "image-text",
        "ASTForAudioClassification": "speech",
        "DetrForObjectDetection": "image-encoder",
    }.items():
        assert kind_of([name], "x") == kind
    with pytest.raises(SourceError, match=r"transformers has no model called 'Foo'; pass kind= \(--kind of observe\)"):
        kind_of(["Foo"], "x")
    with pytest.raises(SourceError, match="no architectures in"):
        kind_of([], "x")


def test_the_command_says_how_alike_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = family("BertForSequenceClassification", tmp_path)
    assert main(["check", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Outputs beside those of the parents, on the same inputs" in shown
    assert "mean cosine" in shown
    assert "note: run on 16 texts: that tells whether it works, not how well" in shown
    assert f"{out}: works" in shown


def test_a_restored_model_is_compared_with_what_it_was(tmp_path: Path) -> None:
    out = family("BertModel", tmp_path)
    models = {name: {"model": str(tmp_path / name)} for name in ("a", "out")}
    recipe = Recipe.model_validate({"base": str(tmp_path / "base"), "models": models, "method": "exact"})
    compress(recipe, tmp_path / "small", accept_loss=True)
    with pytest.raises(SourceError, match=r"small: a compressed folder; .* restore \S+ OUT --expert NAME \(a, out\)"):
        check(tmp_path / "small")
    report = check(restore(tmp_path / "small", "a", tmp_path / "again").out)
    assert (list(report["models"]), report["missing"]) == (["base", "a"], {})
    assert report["models"]["a"]["lowest"] == pytest.approx(1)
    assert report["models"]["base"] == check(tmp_path / "a", parents={"base": tmp_path / "base"})["models"]["base"]
    assert out.is_dir()


# --- observing -----------------------------------------------------------------------------------


def by_hand(layer: nn.Linear, run: Callable[[], Any]) -> torch.Tensor:
    """X^T X / rows of all that a layer gets."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        run()
    handle.remove()
    x = torch.cat(seen).double()
    return (x.T @ x / len(x)).float()


def test_gram_of_an_encoder(tmp_path: Path) -> None:
    folder = saved(made("BertModel"), tmp_path / "m")
    rows = [[1, 5, 9, 4], [2, 6], [7, 7, 8]]
    out = observe(folder, rows, ["gram"], tmp_path / "stats", batch=2)
    source = StatsSource(out / "gram.safetensors")
    module: Any = load_model(folder).module
    layer = module.encoder.layer[0].attention.self.query
    want = by_hand(layer, lambda: [module(input_ids=torch.tensor([ids])) for ids in rows])
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.allclose(source.read(name), want, atol=1e-5)
    assert source.origin.metadata["kind"] == "encoder"
    assert source.rows == 9


def test_texts_get_what_the_encoder_expects_around_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = saved(made("BertModel"), tmp_path / "m")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[CLS]", "[SEP]", "[UNK]", "a", "b"])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=4)
    own.save_pretrained(folder)
    coder = text_coder(load_model(folder))
    assert (coder.prefix, coder.suffix) == ((0,), (1,))
    assert coder.example("a b a b", 5) == [0, 3, 4, 3, 1]
    (tmp_path / "t.txt").write_text("a b a b a")
    logger = logging.getLogger("transformers")  # which hands nothing on
    logger.addHandler(caplog.handler)
    out = observe(folder, tmp_path / "t.txt", ["gram"], tmp_path / "stats", length=5)
    logger.removeHandler(caplog.handler)
    assert StatsSource(out / "gram.safetensors").rows == 9, "3 and 2 words, each between [CLS] and [SEP]"
    assert "longer than" not in caplog.text, "a text is cut into pieces that the model takes"


def test_fisher_of_a_classifier_of_texts(tmp_path: Path) -> None:
    folder = saved(made("BertForSequenceClassification"), tmp_path / "m")
    rows = [[1, 5, 9, 4], [2, 6]]
    out = observe(folder, rows, ["fisher"], tmp_path / "stats")
    source = StatsSource(out / "fisher.safetensors")
    assert source.origin.metadata["fisher"] == "exact"
    module: Any = load_model(folder).module
    bias = module.classifier.bias
    want = torch.zeros(3)
    for ids in rows:
        log_p = torch.log_softmax(module(input_ids=torch.tensor([ids])).logits[0], -1)
        for i in range(3):
            (gradient,) = torch.autograd.grad(log_p[i], bias, retain_graph=True)
            want += log_p[i].exp().detach() * gradient.square() / len(rows)
    assert torch.allclose(source.read("classifier.bias"), want, atol=1e-6)
    labelled = [([1, 5, 9, 4], 2), ([2, 6], 0)]
    observe(folder, labelled, ["fisher"], tmp_path / "own", fisher="empirical")


def test_either_tower_of_clip(tmp_path: Path) -> None:
    folder = saved(made("CLIPModel"), tmp_path / "m")
    texts = observe(folder, [[1, 5, 2], [1, 7, 9, 2]], ["gram"], tmp_path / "texts")
    images = observe(folder, list(torch.randn(3, 3, 8, 8)), ["gram"], tmp_path / "images")
    towers = [{n.partition(".")[0] for n in StatsSource(p / "gram.safetensors").keys} for p in (texts, images)]
    assert towers == [{"text_model", "text_projection"}, {"vision_model", "visual_projection"}]


def test_arrays_of_sounds_are_found_by_the_name_that_models_give_them(tmp_path: Path) -> None:
    folder = saved(made("WhisperForConditionalGeneration"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    sounds = torch.randn(3, config["num_mel_bins"], 2 * config["max_source_positions"]).numpy()
    np.savez(tmp_path / "sounds.npz", input_features=sounds)
    np.savez(tmp_path / "noise.npz", noise=sounds)
    observe(folder, tmp_path / "sounds.npz", ["gram"], tmp_path / "found")
    observe(folder, tmp_path / "noise.npz", ["gram"], tmp_path / "named", field="noise")
    grams = [(tmp_path / out / "gram.safetensors").read_bytes()[-64:] for out in ("found", "named")]
    assert grams[0] == grams[1]
    with pytest.raises(SourceError, match=r"input_values; it has noise \(--field names one\)$"):
        observe(folder, tmp_path / "noise.npz", ["gram"], tmp_path / "refused")


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "ViTModel"])
def test_fisher_where_there_are_no_probabilities(name: str, tmp_path: Path) -> None:
    folder = saved(made(name), tmp_path / "m")
    with pytest.raises(WeightsmithError, match=r"fisher needs a model that gives probabilities \(causal-lm, image-"):
        observe(folder, [[1, 2]], ["fisher"], tmp_path / "stats")


def test_plans_and_observe_agree_on_who_gives_probabilities() -> None:
    """So that no plan advises a Fisher information that observe refuses."""
    endings = {ending for about in KINDS.values() if about.classes for ending in about.endings}
    assert set(GIVE_PROBABILITIES) == endings | {"ForConditionalGeneration"}


def test_an_encoder_with_a_decoder_is_not_observed(tmp_path: Path) -> None:
    folder = saved(made("T5ForConditionalGeneration"), tmp_path / "m")
    with pytest.raises(WeightsmithError, match="nothing can be observed of an encoder with a decoder"):
        observe(folder, [[1, 2]], ["gram"], tmp_path / "stats")
