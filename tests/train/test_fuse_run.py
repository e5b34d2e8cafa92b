"""`weightsmith train fuse`: models with unlike tokenizers, their cached distributions, the run and its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from kit import noise
from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, PlanError, RecipeError
from weightsmith.core.settings import Settings
from weightsmith.observe.model import TextCoder, load_model
from weightsmith.train import fuse
from weightsmith.train.fuse import run as fuse_run
from weightsmith.train.fuse.cache import Cached
from weightsmith.train.fuse.recipe import loads
from weightsmith.train.fuse.run import train_fused
from weightsmith.train.fuse.texts import Tokenizer

WORDS = ["the", "cat", "sees", "a", "bird", "and", "then", "it", "runs", "under", "an", "unbelievable", "tree"]
TEXTS = [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(2 + i % 7)) + ". Ünï." for i in range(40)]


def tokenizers(root: Path) -> dict[str, int]:
    """Two of unlike kinds: pieces with ▁ and <s> in front, bytes with Ġ and one token for both ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    pieces.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer, merged.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = transformers.PreTrainedTokenizerFast
    for name in ("target", "twin", "broken"):
        fast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(root / name)
    for name in ("gpt2", "small"):
        fast(tokenizer_object=merged, bos_token="<e>", eos_token="<e>").save_pretrained(root / name)
    return {"pieces": pieces.get_vocab_size(), "merged": merged.get_vocab_size()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    sizes = tokenizers(root)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}

    def llama(name: str, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **shape, **ends)
        model = transformers.LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(root / name)
        return model

    llama("target", sizes["pieces"], 0, torch.bfloat16)
    llama("twin", sizes["pieces"], 1)
    llama("bytes", 256, 2)
    llama("small", sizes["merged"] - 9, 3)  # fewer rows than its tokenizer has tokens
    broken = llama("broken", sizes["pieces"], 4)
    broken.lm_head.weight.data.fill_(torch.nan)
    broken.save_pretrained(root / "broken")
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=sizes["merged"] + 6, n_embd=16, n_layer=1, n_head=2, n_positions=14, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    vit = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **shape)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return root


RECIPE = {
    "target": "target", "sources": ["gpt2", "bytes"], "data": "texts.jsonl", "k": 8, "length": 24, "steps": 6,
    "batch": 4, "accumulation": 2, "every": 2, "valid": 0.2, "gate": {"trained": {"lr": 0.05}},
    "optimizer": {"adamw": {"lr": 0.01}},
}  # fmt: skip


def words(folder: Path, out: str, **changes: Any) -> list[str]:
    (folder / f"{out}.yaml").write_text(json.dumps(RECIPE | changes))
    return ["train", "fuse", str(folder / f"{out}.yaml"), str(folder / out), "--device", "cpu"]


def recipe(folder: Path, **changes: Any) -> Any:
    return loads(json.dumps(RECIPE | changes), folder=folder)


# --- the command -------------------------------------------------------------------------------------


def test_a_model_and_its_gate_come_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*words(folder, "fused"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, last = told["rows"][0], told["rows"][-1]
    assert last["valid"] < first["valid"]
    assert {"lm", "fused", "weight/target", "weight/gpt2", "weight/bytes"} == set(last["figures"])
    assert last["loss"] > 0.9 * last["figures"]["lm"] + 0.1 * last["figures"]["fused"]  # and the balance
    assert [one["name"] for one in told["candidates"]] == ["target", "gpt2", "bytes"]
    assert told["candidates"][0]["matched"] == 1
    assert all(0 < one["matched"] < 1 for one in told["candidates"][1:])
    assert sum(one["weight"] for one in told["candidates"]) == pytest.approx(1)
    assert last["figures"]["weight/gpt2"] != first["figures"]["weight/gpt2"]
    out = folder / "fused"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    gate = fuse.Gate(3)
    gate.load_state_dict(load_file(out / "gate.safetensors"))
    assert bool((gate.mlp[-1].weight != 0).all())  # it began at zero
    page = (out / "training.html").read_text()
    assert all(word in page for word in ("Parts of the training loss", "Weights", "gpt2", "fused distribution"))
    assert main(["verify", str(out)]) == 0
    assert not (folder / "fused.training").exists()


def test_an_interrupted_run_goes_on_to_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Broken off among the second candidate's texts, after a checkpoint, and behind the last one."""
    whole = train_fused(recipe(folder), folder / "whole")
    passed = fuse_run._Progress.forward
    out = folder / "broken-off"

    def until(count: int) -> None:
        def forward(self: Any, more: int = 1) -> None:
            passed(self, more)
            if self.done >= count:
                raise KeyboardInterrupt

        monkeypatch.setattr(fuse_run._Progress, "forward", forward)

    each = -(-len(TEXTS) // 4)
    for count, left in [(each + 2, ["candidate-0"]), (3 * each + 8, None), (3 * each + 12, None)]:
        until(count)
        with pytest.raises(KeyboardInterrupt):
            train_fused(recipe(folder), out, Settings(resume=True))
        if left:
            assert [path.name for path in (folder / "broken-off.training/candidates").glob("candidate-?")] == left
        else:
            assert len(list((folder / "broken-off.training").glob("step-*"))) == 1
    monkeypatch.undo()
    with pytest.raises(OutputError, match="a previous run was interrupted; pass --resume"):
        train_fused(recipe(folder), out)
    with pytest.raises(OutputError, match="belongs to a run with another recipe"):
        train_fused(recipe(folder, steps=7), out, Settings(resume=True))
    resumed = train_fused(recipe(folder), out, Settings(resume=True))
    assert resumed.rows == whole.rows
    assert resumed.candidates == whole.candidates
    for name in ("model.safetensors", "gate.safetensors"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_cache_is_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    cache = str(folder / "kept")
    assert main(words(folder, "one", cache=cache)) == 0
    loaded: list[Any] = []
    monkeypatch.setattr(fuse_run, "load_model", lambda model, **more: loaded.append(model) or load_model(model, **more))
    assert main(words(folder, "two", cache=cache, gate="min_ce", seed=0)) == 0
    assert loaded == [str(folder / "target")]
    capsys.readouterr()
    assert main(words(folder, "never", cache=cache, k=7)) == 2
    assert "candidate-0: what is there is of another k; name another cache" in capsys.readouterr().err
    damaged = folder / "kept/candidate-1/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(words(folder, "never", cache=cache)) == 2
    assert "candidate-1: what is there is damaged" in capsys.readouterr().err
    assert main(["verify", str(folder / "kept/candidate-0")]) == 0


# --- distributions -----------------------------------------------------------------------------------


def cached(folder: Path, name: str, **changes: Any) -> tuple[list[Cached], list[Any], Any]:
    """The candidates of a run without training, the texts in the target's tokens, and the recipe."""
    asked = recipe(folder, cache=str(folder / f"cache-{name}"), steps=1, sources=[name], **changes)
    train_fused(asked, folder / f"run-{name}", Settings(overwrite=True))
    texts, _ = fuse_run._texts(asked, Tokenizer.of(load_model(folder / "target", device="cpu"), asked.length))
    lengths = [len(text.ids) for text in texts]
    return [Cached.at(folder / f"cache-{name}/candidate-{i}", lengths) for i in range(2)], texts, asked


def test_a_candidate_with_other_tokens(folder: Path):
    """Its loss counts bytes; where both tokenizers end a word at the same character, its own words are mapped."""
    (own, other), texts, _ = cached(folder, "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2").eval()
    coder, target = (transformers.AutoTokenizer.from_pretrained(folder / name) for name in ("gpt2", "target"))
    number = 13
    text = texts[number].text
    ids = coder(text, add_special_tokens=False)["input_ids"][:14]  # the positions that it has
    logits = model(torch.tensor([ids])).logits[0].detach()
    loss = cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    assert float(other.losses[number]) == pytest.approx(float(loss) / len(coder.decode(ids[1:]).encode()), rel=1e-5)
    found, before = other.of([number]), own.of([number])
    spans = [t(text, return_offsets_mapping=True)["offset_mapping"] for t in (coder, target)]
    stripped = [[(b - len(text[a:b].strip()), b) for a, b in own] for own in spans]
    mapped = fuse.map_vocabulary(coder.get_vocab(), target.get_vocab(), logits.shape[1])
    mapped[0] = target.eos_token_id
    seen = 0
    for at, place in enumerate(stripped[1]):
        if place[0] < place[1] and place in stripped[0][:14]:
            values, likely = logits[stripped[0].index(place)].topk(8)
            kept = mapped[likely] >= 0
            if not bool(kept.any()):
                continue
            want = torch.zeros(len(target)).index_add(0, mapped[likely[kept]], values[kept].softmax(0))
            p = torch.zeros(len(target)).index_add(0, found.ids[0, at].long(), found.probabilities()[0, at])
            assert torch.allclose(p, want, atol=2e-3)
            seen += 1
    assert seen >= 3
    assert torch.equal(found.ids[0, 0], before.ids[0, 0])  # it has no <s>: the target's own distribution
    assert 0 < other.matched < 1


def test_equal_tokenizers_are_taken_as_they_are(folder: Path):
    (_, other), texts, _ = cached(folder, "twin")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "twin").eval()
    for number in (0, 9):
        want = fuse.top_k(model(texts[number].ids[None]).logits, 8)
        found = other.of([number])
        assert torch.equal(found.ids, want.ids)
        assert torch.allclose(found.logits.float(), want.logits.float(), atol=2e-3)
    assert other.matched == 1


def test_files_are_cut_into_pieces_that_lose_nothing(folder: Path):
    text = "  ".join(TEXTS)
    for name in ("target", "gpt2", "bytes"):
        pieces = Tokenizer.of(load_model(folder / name, device="cpu"), 10).cut(text, 10)
        assert "".join(pieces) == text
        assert len(pieces) > 20


def test_vocabularies_without_a_common_token_are_refused():
    coders = [SimpleNamespace(get_vocab=lambda n=n: {n: 0}, bos_token=None, eos_token=None) for n in ("one", "zwei")]
    one, other = (Tokenizer(f"m{i}", TextCoder(coder), 1, 9) for i, coder in enumerate(coders))
    with pytest.raises(PlanError, match="m0: the two vocabularies share no token"):
        one.to(other)


# --- training ----------------------------------------------------------------------------------------


def test_micro_batches_change_nothing(folder: Path):
    """One pass of 8 and four of 2 make the same step, balance and gate included."""
    models = []
    for batch, accumulation in [(8, 1), (2, 4)]:
        out = folder / f"batch-{batch}"
        more = {"batch": batch, "accumulation": accumulation, "steps": 3, "clip": None}
        train_fused(recipe(folder, target="twin", **more), out)
        models.append(load_file(out / "model.safetensors") | load_file(out / "gate.safetensors"))
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], atol=2e-4), name


def test_sums_of_parts_are_the_mean_of_the_whole():
    """`parts` of two halves add up; without a last position that predicts nothing they are `forward`."""
    logits, labels = noise(4, 5, 12), noise(4, 5, seed=1).abs().long()
    labels[1, 3:] = -100
    candidates = [fuse.top_k(noise(4, 5, 12, seed=i), 3) for i in (2, 3)]
    fusion, weights = fuse.Fusion(fuse.uniform), torch.full((4, 2), 0.5)
    whole = fusion.parts(logits, labels, candidates, weights)

    def half(rows: slice) -> Any:
        some = [fuse.TopK(c.ids[rows], c.logits[rows]) for c in candidates]
        return fusion.parts(logits[rows], labels[rows], some, weights[rows])

    for total, one, other in zip(whole, half(slice(2)), half(slice(2, 4)), strict=True):
        assert float(total) == pytest.approx(float(one) + float(other), rel=1e-5)
    fusion(logits, labels, candidates, torch.ones(4, 2))
    assert float(whole[0]) / whole[2] == pytest.approx(fusion.last["lm"], rel=1e-5)


def test_rules_take_the_place_of_the_gate(folder: Path):
    found = {}
    for rule in ("average", "min_ce", "avg_ce"):
        result = train_fused(recipe(folder, gate=rule, cache=str(folder / "rules"), steps=2), folder / f"rule-{rule}")
        found[rule] = [one.weight for one in result.candidates]
        assert not (folder / f"rule-{rule}/gate.safetensors").exists()
        chosen = [one.chosen for one in result.candidates]
        assert sum(chosen) == pytest.approx(1 if rule == "min_ce" else 3)
    assert found["average"] == pytest.approx([1 / 3] * 3)
    losses = torch.tensor([one.loss for one in result.candidates])
    assert found["avg_ce"] == pytest.approx((-losses).softmax(0).tolist(), abs=0.05)


# --- what is in the way ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources is empty; name at least one model"),
        ({"gate": {"trained": {"threshold": 1.5}}}, "threshold should be less than or equal to 1, is 1.5"),
        ({"gate": "mince"}, "gate: names no kind, is 'mince'; did you mean 'min_ce'"),
        ({"lm_weight": -1}, "lm_weight should be greater than or equal to 0"),
        ({"loss": "kd"}, "loss .*'ce' or 'kl'"),
    ],
)
def test_wrong_recipes_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        loads(json.dumps(RECIPE | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ["vit", "nowhere"]}, "vit: a model for image-classification, not a causal language model"),
        ({"sources": ["vit", "nowhere"]}, "nowhere: not a model folder"),
        ({"k": 999}, r"target: k is 999, its vocabulary \d+; lower k"),
        ({"sources": "bytes", "data": "short.jsonl", "target": "bytes"}, "no text has two tokens of"),
        ({"sources": "small"}, "small: its tokenizer gives token 28., but the model has 281"),
        ({"sources": "broken"}, "broken: its loss is nan on text 0"),
        ({"data": "texts.csv"}, "texts.csv: no such file or folder of texts"),
        ({"field": "txet"}, "line 1: no text in field 'txet'; did you mean 'text'"),
        ({"optimizer": {"adamw": {"lr": 1e30}}, "warmup": 0}, r"step 2: the loss is nan on examples \[\d+, \d+"),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str):
    (folder / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert main([*words(folder, "never", **changes), "--overwrite"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if re.search(message, line)]
    assert len(lines) == 1, lines
    assert not (folder / "never").exists()


def test_short_texts_and_small_steps_are_told(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "mixed.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a", "ab", "the cat", "b")))
    more = {"target": "bytes", "sources": "gpt2", "data": "mixed.jsonl", "valid": 0, "accumulation": 1}
    assert main(words(folder, "told", **more)) == 0
    shown = capsys.readouterr().out
    assert "2 texts of fewer than two tokens were left out" in shown
    assert "a step of 4 texts is few for the balance" in shown
