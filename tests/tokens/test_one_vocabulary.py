"""Merging models of unlike vocabularies: the result loads in transformers, and every id has its token's row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith.core.errors import PlanError
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = ["<s>", "</s>", "<unk>", "red", "blue"]


def tokenizer_at(folder: Path, words: list[str], added: list[str] = (), special: list[str] = ()) -> None:  # type: ignore[assignment]
    """A word tokenizer; `added` and `special` come after the words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens(list(added))
    made.add_special_tokens([AddedToken(t, special=True) for t in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)


def model_at(folder: Path, rows: int, seed: int, tied: bool = False, hidden: int = 8) -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def merged(folder: Path, recipe: str) -> dict[str, torch.Tensor]:
    run(loads(recipe, "r.yaml", folder=folder), folder / "out", overwrite=True)
    return load_file(folder / "out" / "model.safetensors")


TASK = "base: base\nmodels: {x: x, y: y}\nmethod: task_arithmetic\nparameters: {lambda: 1.0}\n"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model with one more word and a special token, and one with other numbers and padding rows."""
    place = tmp_path_factory.mktemp("trio")
    tokenizer_at(place / "base", BASE)
    tokenizer_at(place / "x", [*BASE, "green"], special=["<|call|>"])
    tokenizer_at(place / "y", ["<unk>", "<s>", "</s>", "blue", "red"])
    for i, (name, rows) in enumerate((("base", 5), ("x", 7), ("y", 8))):
        model_at(place / name, rows, i)
    return place


def test_a_union_loads_and_gives_every_token_its_row(trio: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = merged(trio, TASK + "tokenizer: union\noutput: {dtype: float32}\n")
    tokenizer = AutoTokenizer.from_pretrained(trio / "out")
    model = AutoModelForCausalLM.from_pretrained(trio / "out")
    assert tokenizer("red green <|call|> blue")["input_ids"] == [3, 5, 6, 4]
    assert tokenizer.added_tokens_decoder[6].special
    assert not tokenizer.added_tokens_decoder[5].special
    assert model.config.vocab_size == 7 == model.get_input_embeddings().weight.shape[0]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    before = {name: load_file(trio / name / "model.safetensors") for name in ("base", "x", "y")}
    for tensor in (EMBED, HEAD):
        base, x, y = (before[name][tensor] for name in ("base", "x", "y"))
        red, green = x[3] + y[4] - base[3], x[5]  # green is x's in every model: no model has a task vector there
        assert torch.allclose(found[tensor][3], red, atol=1e-6)
        assert torch.allclose(found[tensor][5], green, atol=1e-6)
    assert model(torch.tensor([[3, 5, 6]])).logits.shape == (1, 3, 7)


def test_another_models_vocabulary_renumbers_the_config(trio: Path) -> None:
    from transformers import AutoTokenizer

    found = merged(trio, TASK.replace("x: x, y: y", "x: x") + "tokenizer: {source: ./y, pad_to_multiple_of: 8}\n")
    config = json.loads((trio / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (8, 1, 2)
    assert json.loads((trio / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    x = load_file(trio / "x" / "model.safetensors")[EMBED]
    ids = AutoTokenizer.from_pretrained(trio / "out")("red blue")["input_ids"]
    assert ids == [4, 3]
    assert torch.allclose(found[EMBED][ids], x[[3, 4]], atol=1e-6)
    assert torch.allclose(found[EMBED][5:], x[:5].mean(dim=0).expand(3, 8), atol=1e-6)


def test_rules_for_tokens(trio: Path) -> None:
    from transformers import AutoTokenizer

    rules = (
        "  tokens:\n    '<|new|>': {source: {kind: model_token, model: x, token: red}}\n"
        "    blue: {source: {kind: zero}, force: true}\n"
    )
    text = "models: {x: x, y: y}\nmethod: linear\ntokenizer:\n  source: x\n" + rules
    found = merged(trio, text)
    x, y = (load_file(trio / name / "model.safetensors")[EMBED] for name in ("x", "y"))
    assert torch.equal(found[EMBED][4], torch.zeros(8))
    assert torch.allclose(found[EMBED][7], x[3], atol=1e-6)
    assert torch.allclose(found[EMBED][3], (x[3] + y[4]) / 2, atol=1e-6)
    assert AutoTokenizer.from_pretrained(trio / "out")("red <|new|>")["input_ids"] == [3, 7]


def test_a_tied_embedding_is_written_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer_at(tmp_path / "a", BASE)
    tokenizer_at(tmp_path / "b", [*BASE, "green"])
    for i, name in enumerate("ab"):
        model_at(tmp_path / name, 5 + i, i, tied=True)
    found = merged(tmp_path, "models: {a: a, b: b}\nmethod: linear\ntokenizer: union\n")
    assert HEAD not in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.allclose(found[EMBED][5], load_file(tmp_path / "b" / "model.safetensors")[EMBED][5], atol=1e-6)


def test_a_nested_merge_has_the_vocabulary_it_was_given(trio: Path) -> None:
    from transformers import AutoTokenizer

    inner = "{model: {models: {x: x, y: y}, method: linear, tokenizer: y}}"
    found = merged(trio, f"models: {{m: {inner}, b: base}}\nmethod: linear\ntokenizer: b\n")
    x, y, base = (load_file(trio / name / "model.safetensors")[EMBED] for name in ("x", "y", "base"))
    red = AutoTokenizer.from_pretrained(trio / "out")("red")["input_ids"][0]
    assert red == 3
    assert json.loads((trio / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    assert torch.allclose(found[EMBED][red], ((x[3] + y[4]) / 2 + base[3]) / 2, atol=1e-6)
    alone = merged(trio, f"models: {{m: {inner}}}\nmethod: passthrough\n")
    assert AutoTokenizer.from_pretrained(trio / "out")("red")["input_ids"] == [4]
    assert torch.allclose(alone[EMBED][4], (x[3] + y[4]) / 2, atol=1e-6)
    assert json.loads((trio / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((trio / "out" / "config.json").read_text())["vocab_size"] == 5


def plain(folder: Path, words: list[str], rows: int, kind: str = "WordLevel") -> Path:
    folder.mkdir(exist_ok=True)
    vocabulary: object = {w: i for i, w in enumerate(words)}
    if kind == "Unigram":
        vocabulary = [[w, -1.0] for w in words]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": vocabulary}}))
    save_file({EMBED: torch.randn(rows, 4), "model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


PAIR = "models: {a: a, b: b}\nmethod: linear\n"


@pytest.mark.parametrize(
    ("words", "rows", "text"),
    [
        (["r", "g", "b"], 6, r"2 rows in a and 6 in b \(of the 4 further rows 1 are tokens, the first 'b'\); either"),
        (["r", "g"], 4, r"2 rows in a and 4 in b \(the 2 further rows are padding\); either give .*tokenizer: union"),
        (["g", "r"], 2, r"in a and b: 2 tokens differ.*; either .*tokenizer: union.* or keep .*exclude.* or leave b"),
    ],
)
def test_unlike_vocabularies_without_a_rule(words: list[str], rows: int, text: str, tmp_path: Path) -> None:
    plain(tmp_path / "a", ["r", "g"], 2)
    plain(tmp_path / "b", words, rows)
    with pytest.raises(PlanError, match=text):
        merged(tmp_path, PAIR)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ("tokenizer: union", r"1 tokens \(the first is 'b'\) cannot be added.*Unigram.*tokenizer: NAME"),
        ("tokenizer: {source: b, tokens: {q: {}}}", "1 tokens .*cannot be added.* which is a Unigram.*leave them out"),
        ("tokenizer: {source: b, tokens: {r: {source: c}}}", "tokenizer: tokens: the source of 'r' is 'c', no model"),
    ],
)
def test_what_cannot_be_done_is_refused(block: str, text: str, tmp_path: Path) -> None:
    plain(tmp_path / "a", ["r", "g"], 2, "Unigram")
    plain(tmp_path / "b", ["r", "g", "b"], 3, "Unigram")
    with pytest.raises(PlanError, match=text):
        merged(tmp_path, PAIR + block)


def test_a_model_without_a_tokenizer_is_asked_for_one(tmp_path: Path) -> None:
    plain(tmp_path / "a", ["r", "g"], 2)
    (plain(tmp_path / "b", ["r"], 3) / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"tokenizer: b has no tokenizer files.*put its tokenizer into its folder"):
        merged(tmp_path, PAIR + "tokenizer: union")


def test_tokens_and_stops_of_experts_that_the_result_lacks_are_said(tmp_path: Path) -> None:
    tokenizer_at(tmp_path / "base", BASE)
    tokenizer_at(tmp_path / "x", BASE, special=["<|im_start|>", "<|im_end|>"])
    for i, name in enumerate(("base", "x")):
        model_at(tmp_path / name, 8, i)  # with rows of padding, which the new tokens took
    config = tmp_path / "x/generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [1, 6]}))
    recipe = "base: base\nmodels: {x: x}\nmethod: task_arithmetic\n"
    said = [str(w) for w in run(loads(recipe, "r.yaml", folder=tmp_path), tmp_path / "out").warnings]
    assert any(
        text.startswith("x has special tokens that the result's tokenizer lacks: '<|im_start|>', '<|im_end|>' (")
        for text in said
    )
    assert any(
        text.startswith("x stops at the tokens [1, 6] (generation_config.json), the result at [1]") for text in said
    )
    said = [str(w) for w in run(loads(recipe + "tokenizer: x\n", "r.yaml", folder=tmp_path), tmp_path / "two").warnings]
    assert not any("special tokens" in text for text in said)


def test_a_fisher_information_follows_the_vocabulary(trio: Path) -> None:
    """Each token's row is weighed by its own Fisher information; a row that one model alone has is that model's."""
    weights, fishers = {}, {}
    for name in ("x", "y"):
        weights[name] = load_file(trio / name / "model.safetensors")
        draw = torch.Generator().manual_seed(len(name) + ord(name))
        fishers[name] = {n: torch.rand(t.shape, generator=draw) + 0.1 for n, t in weights[name].items()}
        notes = {"weightsmith": json.dumps({"stat": "fisher", "examples": 1})}
        save_file(fishers[name], trio / f"{name}.fisher.safetensors", notes)
    found = merged(trio, """\
base: base
models: {x: {model: x, stats: x.fisher.safetensors}, y: {model: y, stats: y.fisher.safetensors}}
method: {fisher: {normalize: false, floor: 0.0}}
tokenizer: union
exclude: [model.embed_tokens.weight]
""")  # fmt: skip
    (x, y), (fx, fy) = ([of[name][HEAD] for name in ("x", "y")] for of in (weights, fishers))
    red = (fx[3] * x[3] + fy[4] * y[4]) / (fx[3] + fy[4])  # y calls it 4
    assert torch.allclose(found[HEAD][3], red, atol=1e-6)
    assert torch.allclose(found[HEAD][5], x[5], atol=1e-6)  # green, which y lacks
    inner = "model.layers.0.mlp.up_proj.weight"
    (x, y), (fx, fy) = ([of[name][inner] for name in ("x", "y")] for of in (weights, fishers))
    assert torch.allclose(found[inner], (fx * x + fy * y) / (fx + fy), atol=1e-6)
