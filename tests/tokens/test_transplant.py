"""Moving a model to another tokenizer."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith.cli.main import main
from weightsmith.core.errors import WeightsmithError
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.transplant import transplant, transplanted
from weightsmith.tokens.match import byte_twin, keys_of, prefixes, spelling
from weightsmith.tokens.pairing import pair, undertrained
from weightsmith.tokens.transplant import METHODS, Transplant
from weightsmith.tokens.vocabulary import Vocabulary

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [f"w{i}" for i in range(24)]


def words_at(folder: Path, words: list[str], rows: int, width: int, seed: int, **config: object) -> Path:
    """A word tokenizer and a model with embedding and head, as files."""
    folder.mkdir()
    vocabulary = {"<s>": 0, "</s>": 1, **{w: i + 2 for i, w in enumerate(words)}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    found = {"vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1, "num_attention_heads": 2, **config}
    (folder / "config.json").write_text(json.dumps(found))
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(rows, width, generator=generator) for n in (EMBED, HEAD)}
    save_file({**tensors, "model.norm.weight": torch.ones(width)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A model of width 8, and a donor of width 12 with other numbers and 4 words that the model lacks."""
    model = words_at(tmp_path / "model", WORDS, 30, 8, 0)
    donor = words_at(tmp_path / "donor", ["n0", *reversed(WORDS), "n1", "w3w5", "n2"], 30, 12, 1)
    return model, donor


def test_shared_tokens_keep_their_rows_and_new_ones_follow_omp(two: tuple[Path, Path], tmp_path: Path) -> None:
    model, donor = two
    _, tokens = transplant(model, donor, tmp_path / "out", Transplant(k=3))
    old, new, theirs = (load_file(f / "model.safetensors") for f in (model, tmp_path / "out", donor))
    ours = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    numbers = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert new[EMBED].shape == (30, 8)
    shared = [t for t in numbers if t in ours]
    assert int((tokens.own >= 0).sum()) == len(shared) == 26
    for name in (EMBED, HEAD):
        for token in shared:
            assert torch.equal(new[name][numbers[token]], old[name][ours[token]])
        # By hand: the best of three greedily chosen shared rows.
        goal, atoms = theirs[name][numbers["n1"]].double(), theirs[name][[numbers[t] for t in shared]].double()
        taken: list[int] = []
        left = goal
        for _ in range(3):
            score = (atoms @ left).abs()
            score[taken] = -1
            taken.append(int(score.argmax()))
            fit = torch.linalg.lstsq(atoms[taken].T, goal).solution
            left = goal - atoms[taken].T @ fit
        wanted = old[name][[ours[shared[i]] for i in taken]].double().T @ fit
        assert torch.allclose(new[name][numbers["n1"]].double(), wanted, atol=1e-4)
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"])


def test_a_linear_relation_between_the_spaces_is_carried_over(two: tuple[Path, Path], tmp_path: Path) -> None:
    model, donor = two
    tensors = load_file(model / "model.safetensors")
    relation = torch.randn(8, 12, generator=torch.Generator().manual_seed(7)) / 3
    ours, theirs = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in two)
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(8))
    for token, number in theirs.items():
        if token in ours:
            rows[number] = tensors[EMBED][ours[token]]
    save_file({EMBED: rows @ relation, HEAD: rows @ relation, "n": torch.ones(1)}, donor / "model.safetensors")
    transplant(model, donor, tmp_path / "out", Transplant(k=8))
    found = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    assert torch.allclose(found[theirs["n0"]], rows[theirs["n0"]], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_rows_for_every_cut(method: str, two: tuple[Path, Path]) -> None:
    model, donor = map(open_source, two)
    view = pickle.loads(pickle.dumps(transplanted(model, donor, Transplant(method=method, k=4, batch=7))))
    for name in (EMBED, HEAD):
        whole = view.read(name)
        assert whole.shape == (30, 8)
        assert whole.isfinite().all()
        again = transplanted(model, donor, Transplant(method=method, k=4, batch=7))
        assert torch.equal(torch.cat([again.read(name, i, min(i + 4, 30)) for i in range(0, 30, 4)]), whole)
        new = whole[[2, 27, 28, 29]]
        rows = model.read(name)
        if method == "mean":
            assert torch.allclose(new, rows.mean(dim=0).expand(4, 8), atol=1e-6)
        elif method == "zero":
            assert not new.any()
        else:
            assert (new != 0).any()


def test_random_rows_have_the_moments_of_the_models() -> None:
    from weightsmith.tokens.numbering import Numbering
    from weightsmith.tokens.transplant import TransplantedSource

    old = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) @ torch.tensor(
        [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]]
    ) + torch.tensor([1.0, 0.0, -3.0])
    model = Vocabulary({f"o{i}": i for i in range(500)})
    donor = Vocabulary({f"n{i}": i for i in range(20000)})
    tokens = pair(model, donor, (500, 20000))
    source, other = MemorySource({EMBED: old}), MemorySource({EMBED: torch.zeros(20000, 3)})
    how = Transplant(method="john_hewitt", batch=20000)
    numbering = Numbering(model, donor, (500, 20000))
    found = TransplantedSource(source, other, {EMBED: EMBED}, {EMBED: tokens}, how, numbering).read(EMBED)
    assert torch.allclose(found.mean(dim=0), old.mean(dim=0), atol=0.05)
    assert torch.allclose(found.T.cov(), old.T.cov(correction=0), atol=0.12)
    how = replace(how, method="randn")
    found = TransplantedSource(source, other, {EMBED: EMBED}, {EMBED: tokens}, how, numbering).read(EMBED)
    assert float(found.square().mean()) == pytest.approx(float(old.square().mean()), rel=0.03)


@pytest.mark.parametrize(
    ("subword", "embed", "head"),
    [("mean", [0.5, 0.5], [0.5, 0.5]), ("sum", [1, 1], [1, 1]), ("weighted_mean", [1 / 3, 2 / 3], [2 / 3, 1 / 3]),
     ("first_last", [0, 1], [1, 0])],
)  # fmt: skip
def test_subwords(subword: str, embed: list[float], head: list[float], tmp_path: Path) -> None:
    model = words_at(tmp_path / "model", ["w3", "w5"], 4, 8, 0)
    donor = words_at(tmp_path / "donor", ["w3 w5"], 3, 8, 1)
    view = transplanted(open_source(model), open_source(donor), Transplant(method="subword", subword=subword))
    old = load_file(model / "model.safetensors")
    for name, shares in ((EMBED, embed), (HEAD, head)):
        assert torch.allclose(view.read(name)[2], shares[0] * old[name][2] + shares[1] * old[name][3], atol=1e-6)


def test_noise_and_scale_touch_new_rows_only(two: tuple[Path, Path]) -> None:
    model, donor = map(open_source, two)
    plain, twice, noisy = (
        transplanted(model, donor, Transplant(k=4, scale=scale, noise=noise)).read(EMBED)
        for scale, noise in ((1.0, 0.0), (2.0, 0.0), (1.0, 0.5))
    )
    new = torch.zeros(30, dtype=torch.bool)
    new[[2, 27, 28, 29]] = True
    assert torch.equal(twice[~new], plain[~new])
    assert torch.allclose(twice[new], 2 * plain[new])
    assert torch.equal(noisy[~new], plain[~new])
    assert 0.3 < float((noisy - plain)[new].std()) < 0.7


def vocabulary(*tokens: str, kind: str = "BPE", folder: Path | None = None) -> Vocabulary:
    return Vocabulary({t: i for i, t in enumerate(tokens)}, {}, folder, kind)


def test_tokens_match_across_spellings() -> None:
    gpt = vocabulary("\u0120the", "ing", "\u010a", "\u00c3\u00a9")  # byte-wise: ' the', 'ing', newline, 'é'
    llama = vocabulary("\u2581the", "ing", "\n", "é")
    bert = vocabulary("the", "##ing", kind="WordPiece")
    assert [spelling(v) for v in (gpt, llama, bert)] == ["bytes", "blocks", "hashes"]
    assert pair(llama, gpt, (9, 9)).own.tolist() == [0, 1, 2, 3]
    assert pair(bert, llama, (9, 9)).own.tolist() == [0, 1, -1, -1]


def test_special_tokens_match_by_role(tmp_path: Path) -> None:
    for name, tokens in (("a", {"eos_token": "<|end|>", "pad_token": "<|end|>"}), ("b", {"eos_token": "</s>"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(tokens))
    a = vocabulary("x", "<|end|>", folder=tmp_path / "a")
    b = vocabulary("</s>", "x", folder=tmp_path / "b")
    assert pair(a, b, (2, 2)).own.tolist() == [1, 0]
    assert [keys for _, keys in keys_of(a)][1] == ("\0eos", "\0pad", "<|end|>")


def test_prefixes_and_bytes_stand_in_where_asked() -> None:
    model, donor = vocabulary("ab", "<0x41>", "\u2581"), vocabulary("abcd", "A", "zz", "\u2581ab")
    assert pair(model, donor, (3, 4)).own.tolist() == [-1, -1, -1, -1]
    found = pair(model, donor, (3, 4), by_prefix=True, by_byte=True)
    assert found.own.tolist() == [0, 1, -1, -1]
    assert found.anchors.size == 0  # what stands in is no anchor
    assert list(prefixes(" ab")) == [" a"]
    assert [byte_twin(t) for t in ("A", "<0x41>", "é", "ab", "<0xZZ>")] == ["<0x41>", "A", None, None, None]


def test_under_trained_tokens_are_found_by_their_likeness_to_unused_rows() -> None:
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    never = torch.randn(32, generator=torch.Generator().manual_seed(1))
    rows[7] = never * 0.9
    rows[390:] = never
    known = Vocabulary({f"t{i}": i for i in range(390)})
    found = undertrained(MemorySource({EMBED: rows}), (EMBED,), known)
    assert np.flatnonzero(found).tolist() == [7, *range(390, 400)]
    tokens = pair(known, known, (400, 400), bad=(found, found))
    assert 7 not in tokens.anchors
    assert tokens.own[7] == 7


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, donor = words_at(tmp_path / "a", WORDS, 26, 8, 0), words_at(tmp_path / "b", ["q", "w1"], 4, 8, 1)
    with pytest.raises(WeightsmithError, match="k: 64 is more than the 3 tokens that both vocabularies share"):
        transplant(model, donor, tmp_path / "out")
    with pytest.raises(WeightsmithError, match=r"method: 'ompp' is none of .*did you mean 'omp'"):
        Transplant(method="ompp")
    assert main(["tokenizer", "transplant", str(model), str(donor), str(tmp_path / "out"), "--k", "0"]) == 2
    assert "k: 0 is outside" in capsys.readouterr().err
    (donor / "tokenizer.json").unlink()
    (donor / "tokenizer_config.json").unlink()
    assert main(["tokenizer", "transplant", str(model), str(donor), str(tmp_path / "out")]) == 2
    assert "has no tokenizer files; put its tokenizer into its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    for name, words, width, seed in (("m", ["red", "blue"], 8, 0), ("d", ["green", "blue", "red"], 16, 1)):
        words_at(tmp_path / name, words, len(words) + 2, width, seed)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words) + 2, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=name == "m",
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    words = ["tokenizer", "transplant", str(tmp_path / "m"), str(tmp_path / "d"), str(out)]
    assert main([*words, "--k", "2", "--pad-to-multiple-of", "8", "--quiet"]) == 0
    model, before = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "m"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("red green blue", add_special_tokens=False)["input_ids"]
    assert ids == [4, 2, 3]
    rows, old = (each.get_input_embeddings().weight for each in (model, before))
    assert rows.shape == (8, 8)
    assert model.config.vocab_size == 8
    assert torch.equal(rows[[4, 3]], old[[2, 3]])
    assert rows is model.get_output_embeddings().weight
    assert HEAD not in load_file(out / "model.safetensors")
