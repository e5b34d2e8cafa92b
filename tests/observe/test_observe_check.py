"""Checking a result: does it run, and do its parts agree?"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from observe_models import saved, tiny_llama, tiny_vit, word_tokenizer
from safetensors.torch import load_file, save_file

from weightsmith.cli.shown.check import show
from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.io.package.manifest import write_manifest
from weightsmith.observe.answer import answer
from weightsmith.observe.check import cheap_check, check, perplexity, recorded_parents, sample_text
from weightsmith.observe.model import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- check -----------------------------------------------------------------------------------------


def test_random_weights_are_as_good_as_guessing(folder: Path) -> None:
    report = check(folder, length=64)
    assert (report["kind"], report["ok"], report["finite"], report["problems"]) == ("causal-lm", True, True, [])
    merged = report["models"]["merged"]
    assert merged["perplexity"] == pytest.approx(256, rel=0.05)
    assert merged["bits_per_byte"] == pytest.approx(8, abs=0.1)
    assert merged["tokens"] == len(sample_text().encode()) - 1
    assert json.loads(json.dumps(report)) == report


def test_perplexity_is_that_of_every_next_token(folder: Path) -> None:
    text = "Short enough for one window."
    loaded = load_model(folder)
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(loaded.module(input_ids=ids).logits[0, :-1], ids[0, 1:])
    found = perplexity(loaded, text)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    assert perplexity(loaded, text, length=5)["tokens"] == found["tokens"] == len(text) - 1


def test_windows_begin_with_the_first_token_the_model_expects(tmp_path: Path) -> None:
    words = "the cat sat on the mat and the dog sat on the cat"
    folder = word_tokenizer(saved(tiny_llama(), tmp_path / "m"), words)
    loaded = load_model(folder)
    ids = word_ids(folder, words)
    expected = 0.0
    for start in range(0, len(ids), 4):  # windows of 5 tokens: <s>, the last of the window before, 3 more
        lead = [0, ids[start - 1]] if start else [0]
        window = ids[start : start + 4]
        inputs = torch.tensor([lead + window[:-1]])
        with torch.no_grad():
            logits = loaded.module(input_ids=inputs).logits[0, len(lead) - 1 :]
        expected += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum"))
    found = perplexity(loaded, words, length=5)
    assert found["tokens"] == len(ids)
    assert found["perplexity"] == pytest.approx(math.exp(expected / len(ids)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(words), rel=1e-4)


def word_ids(folder: Path, words: str) -> list[int]:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[word] for word in words.split()]


def noted(folder: Path, recipe: dict) -> None:
    write_manifest(folder, {"kind": "merge", "recipe": recipe, "inputs": {}, "output": {"files": {}, "tensors": {}}})


def test_parents_are_measured_beside_the_merge(folder: Path, original: Path, tmp_path: Path) -> None:
    other = saved(tiny_llama(seed=1), tmp_path / "other")
    recipe = {
        "base": {"model": str(original)},
        "models": {"other": {"model": "other"}, "gone": {"model": "no/where"}, "inner": {"model": {"models": {}}}},
    }
    noted(folder, recipe)
    report = check(folder, length=64)
    assert list(report["models"]) == ["merged", "base", "other"]
    assert report["models"]["base"] == report["models"]["merged"] != report["models"]["other"]
    assert report["missing"] == {
        "gone": "no/where is not a folder here",
        "inner": "a nested recipe; merge it on its own to compare with it",
    }
    given = check(folder, parents={"twin": other, "none": tmp_path / "none"}, length=64)
    assert list(given["models"]) == ["merged", "twin"]
    assert "not a model folder" in given["missing"]["none"]


def test_noise_is_far_from_its_parents(folder: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and every number is finite: only the parents show that nothing is left of them."""
    assert not check(folder, parents={"a": original}, length=64)["unlike"]
    edit_weights(folder, lambda tensors: tensors.update({n: 3 * torch.randn_like(t) for n, t in tensors.items()}))
    report = check(folder, parents={"a": original}, length=64)
    assert (report["ok"], report["unlike"]) == (True, True)
    (said,) = report["warnings"]
    assert re.fullmatch(r"\d+(\.\d+)? bits per byte, its parents at most 8(\.\d+)?; try a smaller lambda, .*", said)
    show(report)
    assert capsys.readouterr().out.endswith("runs, but is far from its parents\n")


def test_what_is_no_model_is_said_to_be_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"adapter: an adapter, not a whole model; merge it into its base and check"):
        check(tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "swept" / "lambda=0.2")
    (tmp_path / "swept" / "lambda=0.2" / "weightsmith.json").write_text("{}")
    with pytest.raises(SourceError, match=r"swept: the folder of a sweep; check one variant at a time, as .*=0\.2"):
        check(tmp_path / "swept")


def test_the_parents_of_a_mixture_are_its_experts(folder: Path, original: Path) -> None:
    recipe = {"base": str(original), "experts": {"math": {"model": str(original), "prompts": ["1 + 1"]}}}
    noted(folder, recipe)
    report = check(folder, length=64)
    assert (list(report["models"]), report["missing"]) == (["merged", "base", "math"], {})


def test_a_stack_is_compared_with_what_it_was_cut_from(folder: Path, tmp_path: Path) -> None:
    saved(tiny_llama(vocabulary=300), tmp_path / "math")
    slices = [{"model": str(tmp_path / "math"), "layers": [0, 2]}, {"model": "gone"}, {"model": str(tmp_path / "math")}]
    noted(folder, {"models": {"joined": {"model": {"slices": slices}}, "modules": {"model": {"modules": {}}}}})
    found, missing = recorded_parents(folder)
    assert found == {"joined, part 1 (math)": tmp_path / "math"}
    assert missing == {
        "joined, part 2 (gone)": "gone is not a folder here",
        "modules": "a nested recipe; merge it on its own to compare with it",
    }


def test_an_adapter_among_the_parents_is_listed(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    recipe = {"base": None, "models": {"lora": str(adapter)}}
    noted(folder, recipe)
    assert check(folder, length=64)["missing"] == {"lora": f"{adapter} is an adapter, not a whole model"}


def test_nan_weights_are_found_and_named(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_weights(folder, damage)
    report = check(folder, length=64)
    assert not report["ok"]
    assert not report["finite"]
    assert report["problems"] == [
        f"{folder}: NaN or Inf in the logits",
        "model.layers.1.mlp.up_proj.weight: NaN or Inf in the weights",
    ]


def test_a_model_that_cannot_be_loaded_is_a_problem(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    report = check(folder, length=64)
    assert not report["ok"]
    assert "would be random (missing_keys: lm_head.weight)" in report["problems"][0]
    assert any("no output head" in text for text in report["warnings"])


def test_a_state_dict_without_config(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2), "b": torch.tensor(1)}, tmp_path / "model.safetensors")
    report = check(tmp_path)
    assert (report["kind"], report["ok"], report["models"]) == ("tensors", True, {})
    assert report["notes"] == ["only shapes and finiteness of the tensors were checked: no model could be built to run"]
    save_file({"a": torch.tensor([1.0, float("inf")])}, tmp_path / "model.safetensors")
    report = check(tmp_path)
    assert (report["ok"], report["problems"]) == (False, ["a: NaN or Inf in the weights"])


def test_an_image_classifier_is_run_on_noise(tmp_path: Path) -> None:
    report = check(saved(tiny_vit(), tmp_path / "vit"))
    assert (report["kind"], report["ok"]) == ("image-classification", True)


def test_no_tokenizer_means_no_perplexity_but_a_run(tmp_path: Path) -> None:
    report = check(saved(tiny_llama(vocabulary=300), tmp_path / "m"))
    assert (report["ok"], report["models"]) == (True, {})
    assert "no tokenizer files" in report["notes"][0]


def test_own_text_and_missing_places(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hello there")
    assert check(folder, text=tmp_path / "t.txt")["models"]["merged"]["tokens"] == 10
    with pytest.raises(SourceError, match="not readable as UTF-8"):
        check(folder, text=tmp_path / "none.txt")
    with pytest.raises(SourceError, match="not a folder"):
        check(tmp_path / "none")


def test_the_sample_is_a_few_hundred_words() -> None:
    assert 300 < len(sample_text().split()) < 800


# --- cheap_check -----------------------------------------------------------------------------------


def test_a_sound_folder_has_no_warnings(folder: Path, tmp_path: Path) -> None:
    assert cheap_check(folder) == []
    assert cheap_check(saved(tiny_vit(), tmp_path / "vit")) == []
    assert cheap_check(saved(tiny_llama(tied=True), tmp_path / "tied")) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"vocab_size": 300}, "model.embed_tokens.weight has 256 rows, config.json says vocab_size = 300"),
        ({"hidden_size": 64}, "model.embed_tokens.weight is 32 wide, config.json says hidden_size = 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, the weights hold 2 blocks in model.layers"),
        ({"intermediate_size": 50}, "gate_proj.weight is [48, 32], config.json says [50, 32]"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [16, 32], config.json says [32, 32]"),
        ({"eos_token_id": [2, 256]}, "eos_token_id = 256, model.embed_tokens.weight has 256 rows"),
    ],
)
def test_config_and_weights_disagree(folder: Path, fields: dict[str, Any], text: str) -> None:
    edit_config(folder, **fields)
    warnings = cheap_check(folder)
    assert any(text in warning for warning in warnings), warnings


def test_a_gap_in_the_blocks(folder: Path) -> None:
    def renumber(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.1." in n]:
            tensors[name.replace(".1.", ".2.")] = tensors.pop(name)

    edit_weights(folder, renumber)
    assert cheap_check(folder) == ["model.layers lacks block 1 although block 2 is there; renumber the blocks"]


def test_what_only_looks_like_a_fault(folder: Path) -> None:
    """The layers of a Sequential have numbers too (Qwen2.5-VL's merger); a gated q_proj has twice the rows."""

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"visual.merger.mlp.{i}.weight": torch.ones(2, 2) for i in (0, 2)}
        for name in [n for n in tensors if n.endswith("q_proj.weight")]:
            tensors[name] = torch.cat([tensors[name]] * 2)

    edit_weights(folder, more)
    assert any("q_proj.weight is [64, 32]" in warning for warning in cheap_check(folder))
    for field, value in {"attn_output_gate": True, "kv_lora_rank": 8, "global_head_dim": 512, "v_head_dim": 4}.items():
        edit_config(folder, **{field: value})
        assert cheap_check(folder) == []
        edit_config(folder, **{field: None})
        assert cheap_check(folder)
    edit_config(folder, model_type="qwen3_5_moe", text_config={"model_type": "qwen3_5_moe_text"})
    assert cheap_check(folder) == []


def test_other_towers_have_sizes_of_their_own(folder: Path) -> None:
    """Qwen2.5-VL: the text model's intermediate_size is not that of the blocks that see."""
    name = "visual.blocks.0.mlp.gate_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(32, 32)}))
    assert cheap_check(folder) == []
    edit_config(folder, intermediate_size=50)
    rest = "is [48, 32], config.json says [50, 32] (intermediate_size, hidden_size); loaders will refuse it"
    assert cheap_check(folder) == [f"model.layers.0.mlp.{kind}_proj.weight {rest}" for kind in ("gate", "up")]


def test_parts_by_their_own_configuration(folder: Path) -> None:
    """Video-LLaVA's video_tower by its name, any other by its sizes; the language model's stay checked."""
    sees = {"hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 24}
    names = [f"{part}.layers.0.self_attn.q_proj.weight" for part in ("video_tower.encoder", "model.eye.encoder")]
    edit_weights(folder, lambda tensors: tensors.update(dict.fromkeys(names[:1], torch.ones(16, 16))))
    assert cheap_check(folder) == []
    edit_weights(folder, lambda tensors: tensors.update({names[1]: torch.ones(20, 20)}))
    assert any(names[1] in warning for warning in cheap_check(folder))
    edit_config(folder, eye_config=sees)
    assert cheap_check(folder) == []
    edit_config(folder, num_attention_heads=8, head_dim=16)
    assert any("q_proj.weight is [32, 32], config.json says [128, 32]" in warning for warning in cheap_check(folder))


def test_blocks_that_are_gone_through_several_times(folder: Path) -> None:
    """HRM counts the calls of its blocks in num_hidden_layers."""
    edit_config(folder, num_hidden_layers=16, num_layers_per_stack=2)
    assert cheap_check(folder) == []
    edit_config(folder, num_layers_per_stack=3)
    assert any("num_layers_per_stack = 3, the weights hold 2 blocks" in warning for warning in cheap_check(folder))


def test_a_head_that_loaders_would_ignore(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert len(cheap_check(folder)) == 1
    assert "lm_head.weight differs from model.embed_tokens.weight" in cheap_check(folder)[0]

    def equal(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, equal)
    assert cheap_check(folder) == []


def test_a_tokenizer_with_more_tokens_than_rows(folder: Path) -> None:
    word_tokenizer(folder, " ".join(f"w{i}" for i in range(254)))
    assert cheap_check(folder) == []
    word_tokenizer(folder, " ".join(f"w{i}" for i in range(255)))
    (warning,) = cheap_check(folder)
    assert warning.startswith("tokenizer.json has token ids up to 256, model.embed_tokens.weight has 256 rows; ")
    (folder / "tokenizer.json").write_text("{")
    assert cheap_check(folder)[0].startswith("tokenizer.json cannot be read")


def test_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert cheap_check(folder)[0].startswith("config.json cannot be read")
    (folder / "config.json").write_text("[]")
    assert cheap_check(folder) == ["config.json holds list, not an object; the folder will not load"]
    (folder / "config.json").unlink()
    assert cheap_check(folder) == []


def test_cheap_check_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from weightsmith.observe.check import cheap_check; "
        "assert cheap_check(Path(sys.argv[1])) == []; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- answers and scores ----------------------------------------------------------------------------


def test_an_answer_is_the_likeliest_token_again_and_again(original: Path) -> None:
    """Without the cache of keys and values, too."""
    loaded = load_model(original)
    ids = list(b"one and one")
    for _ in range(9):
        with torch.no_grad():
            ids.append(int(loaded.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer(loaded, "one and one", tokens=9) == bytes(ids[-9:]).decode(errors="replace")
    loaded.module.generation_config.eos_token_id = [ids[-1], 999]  # type: ignore[union-attr]
    loaded.module.generation_config.do_sample = True  # type: ignore[union-attr]
    first = ids[11:].index(ids[-1])
    assert answer(loaded, "one and one", tokens=9) == bytes(ids[11 : 11 + first]).decode(errors="replace")


def test_an_answer_ends_where_the_model_has_no_more_positions(original: Path) -> None:
    loaded = load_model(original)
    loaded.module.generation_config.eos_token_id = None  # type: ignore[union-attr]
    assert len(answer(loaded, "x" * 125).encode(errors="replace")) >= 3
    with pytest.raises(WeightsmithError, match=r"128 tokens, .* room for fewer"):
        answer(loaded, "x" * 128)
    with pytest.raises(WeightsmithError, match="no token"):
        answer(loaded, "")


def test_a_chat_template_is_the_tokenizers(folder: Path) -> None:
    word_tokenizer(folder, "user: you assistant: hello")
    edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    loaded = load_model(folder)
    with pytest.raises(SourceError, match="no chat template"):
        answer(loaded, "hello", chat=True)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    assert answer(loaded, "hello", 3, chat=True) == answer(loaded, "user: hello assistant:", 3)


def test_models_beside_are_measured_by_the_names_they_were_given(original: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(original, tmp_path / "merged"))
    report = check(original, beside=[str(other), "none"], length=64, ask=lambda loaded: loaded.label,
                   score=lambda path: {"letters": len(path.name)})  # fmt: skip
    assert list(report["models"]) == list(report["answers"]) == [str(original), str(other)]
    assert report["answers"][str(other)] == str(other)
    assert report["scores"] == {str(original): {"letters": len(original.name)}, str(other): {"letters": 6},
                                "none": {"letters": 4}}  # fmt: skip
    assert "none" in report["missing"]["none"]
    with pytest.raises(SourceError, match="named twice"):
        check(original, beside=[str(original)])


def test_a_model_without_an_answer_still_has_its_figures(original: Path) -> None:
    def none(loaded: Any) -> str:
        raise SourceError(f"{loaded.label}: nothing to say")

    report = check(original, length=64, ask=none)
    assert report["ok"]
    assert report["models"]["merged"]["perplexity"] > 1
    assert report["notes"] == [f"no answer: {original}: nothing to say"]
