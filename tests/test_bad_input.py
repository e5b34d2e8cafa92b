"""Bad input: one clear line each (what, where, which value, what to do), exit code 2, nothing written, no traceback."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main

SHAPES = {"model.embed_tokens.weight": (16, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}


def state(seed: int, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} | {
        n.replace("__", "."): t for n, t in changed.items()
    }


class Desk:
    """A folder with base, a and b, and a recipe that is right until a test spoils something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.recipe: dict[str, Any] = {
            "base": str(folder / "base"),
            "models": {"a": str(folder / "a"), "b": str(folder / "b")},
            "method": "task_arithmetic",
        }
        for seed, name in enumerate(("base", "a", "b")):
            self.model(name, state(seed))

    def model(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        save_file(tensors, self.folder / name / "model.safetensors")
        return self.folder / name

    def merge(self, *options: str) -> int:
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.recipe))
        return call(["merge", str(path), str(self.out), *options])


def call(arguments: list[str]) -> int:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    return int(code or 0)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def unknown_method(d: Desk) -> str:
    d.recipe["method"] = "tise"
    return r"recipe\.yaml:\d+:\d+: unknown method 'tise'; did you mean 'ties'\?"


def unknown_parameter(d: Desk) -> str:
    d.recipe["parameters"] = {"wieght": 1.0}
    return r"recipe\.yaml:\d+:\d+: unknown key 'wieght' in parameters; did you mean 'weight'\?"


def unknown_key(d: Desk) -> str:
    d.recipe["modles"] = {}
    return r"recipe\.yaml:\d+:\d+: unknown key 'modles'.*did you mean 'models'\?"


def out_of_range(d: Desk) -> str:
    d.recipe |= {"method": "ties", "parameters": {"density": 20}}
    return r"density = 20 is outside \(0, 1\]; write 20% as 0\.2"


def missing_base(d: Desk) -> str:
    del d.recipe["base"]
    return r"task_arithmetic needs a base model: add 'base:' to the recipe"


def missing_model(d: Desk) -> str:
    d.recipe["models"]["a"] = str(d.folder / "aa")
    return r"a: .*/aa\b.*(does not exist|no such)"


def missing_tensor(d: Desk) -> str:
    tensors = state(1)
    del tensors["model.norm.weight"]
    d.model("a", tensors)
    return r"model\.norm\.weight is missing in a \(.*/a\); to keep it from the base add it to \"exclude\""


def extra_tensor(d: Desk) -> str:
    d.model("a", state(1, mtp__weight=torch.zeros(3)))
    return r"mtp\.weight is in a but not in base; to carry it over unchanged add it to \"exclude\""


def unlike_shapes(d: Desk) -> str:
    d.model("b", state(2, model__layers__0__mlp__up_proj__weight=torch.zeros(6, 5)))
    return r"up_proj\.weight has shape \[6, 4\] in base but \[6, 5\] in b"


def unlike_vocabularies(d: Desk) -> str:
    d.model("b", state(2, model__embed_tokens__weight=torch.zeros(18, 4)))
    return r"unlike vocabularies: model\.embed_tokens\.weight has 16 rows in base and 18 in b; either .* or .* or "


def vocabulary(d: Desk, name: str, *tokens: str) -> None:
    found = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": []}
    (d.folder / name / "tokenizer.json").write_text(json.dumps(found))


def unlike_token_numbers(d: Desk) -> str:
    vocabulary(d, "base", "a", "b", "c")
    vocabulary(d, "a", "a", "b", "c")
    vocabulary(d, "b", "a", "c", "b", "d")
    return r"unlike vocabularies in base and b: 2 tokens differ, the first is 'b': 1 against 2; either .* or .* or "


def tokenizer_without_files(d: Desk) -> str:
    d.recipe["tokenizer"] = "a"
    return r"tokenizer: .*/a holds no tokenizer files; name another model or folder"


def truncated(d: Desk) -> str:
    path = d.folder / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    return r"a: .*model\.safetensors.*"


def lying_header(d: Desk) -> str:
    path = d.folder / "a" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[6,4]', b'"shape":[6,5]', 1))
    return r"a: .*model\.safetensors.*up_proj"


def index_names_missing_file(d: Desk) -> str:
    index = {"weight_map": dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")}
    (d.folder / "a" / "model.safetensors").unlink()
    (d.folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"a: .*shards are missing: .*model-00001-of-00002\.safetensors"


def index_names_outside_file(d: Desk) -> str:
    index = {"weight_map": dict.fromkeys(SHAPES, "../base/model.safetensors")}
    (d.folder / "a" / "model.safetensors").unlink()
    (d.folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"a: .*\.\./base/model\.safetensors"


class Bomb:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/weightsmith-was-here",)


def pickle_with_code(d: Desk) -> str:
    path = d.folder / "a.bin"
    path.write_bytes(pickle.dumps({"w": Bomb()}))
    d.recipe["models"]["a"] = str(path)
    return r"a: .*a\.bin.*"


def nan_input(d: Desk) -> str:
    tensors = state(1)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 2] = float("nan")
    d.model("a", tensors)
    return r"model\.layers\.0\.mlp\.up_proj\.weight in a holds NaN at \[3, 2\]"


def unequal_integers(d: Desk) -> str:
    for seed, name in enumerate(("base", "a", "b")):
        d.model(name, state(seed, steps=torch.tensor([seed])))
    return r"steps \(int64\) differs between base and a and cannot be averaged.*exclude"


def zero_weights(d: Desk) -> str:
    d.recipe |= {"method": "linear", "parameters": {"weight": {"a": 1.0, "b": -1.0}}}
    return r"linear: weights .* sum to zero"


def model_twice(d: Desk) -> str:
    d.recipe["models"]["b"] = d.recipe["models"]["a"]
    return r"'?b'? .*(twice|same)|same.*"


def zero_experts(d: Desk) -> str:
    d.recipe["models"] = {}
    return r"(no models|at least one|zero experts)"


def wrong_count(d: Desk) -> str:
    d.recipe |= {"method": "slerp", "parameters": {"t": 0.5}}
    return r"slerp.*2"


def missing_statistics(d: Desk) -> str:
    d.recipe |= {"method": "fisher"}
    return r"fisher needs the statistic 'fisher' of a, b; make it with \"weightsmith observe MODEL .* --stat fisher"


def no_fisher_of_an_encoder(d: Desk) -> str:
    (d.folder / "a" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    d.recipe |= {"method": "fisher"}
    return (
        r"fisher needs the statistic 'fisher' of a, b; a Fisher information is of probabilities, and BertModel gives "
        r"none: .* or take regmean, .*--stat gram"
    )


def no_statistic_of_an_encoder_with_a_decoder(d: Desk) -> str:
    config = '{"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}'
    (d.folder / "a" / "config.json").write_text(config)
    d.recipe |= {"method": "regmean"}
    return r"'gram' of a, b; none can be made of T5ForConditionalGeneration, an encoder with a decoder; take the second"


def yaml_is_broken(d: Desk) -> str:
    (d.folder / "recipe.yaml").write_text("models: [a\n")
    d.merge = lambda *o: call(["merge", str(d.folder / "recipe.yaml"), str(d.out), *o])  # type: ignore[method-assign]
    return r"recipe\.yaml:\d+:\d+: "


CASES: list[Callable[[Desk], str]] = [
    unknown_method, unknown_parameter, unknown_key, out_of_range, missing_base, missing_model, missing_tensor,
    extra_tensor, unlike_shapes, unlike_vocabularies,
    unlike_token_numbers, tokenizer_without_files, truncated, lying_header, index_names_missing_file,
    index_names_outside_file, pickle_with_code, nan_input, unequal_integers, zero_weights, model_twice, zero_experts,
    wrong_count, missing_statistics, no_fisher_of_an_encoder, no_statistic_of_an_encoder_with_a_decoder, yaml_is_broken,
]  # fmt: skip


@pytest.mark.parametrize("spoil", CASES, ids=lambda f: f.__name__)
def test_one_line_and_exit_code_2(spoil: Callable[[Desk], str], desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = spoil(desk)
    assert desk.merge() == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip()]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), lines[0]
    assert "Traceback" not in shown.err
    assert not desk.out.exists()
    assert not Path("/tmp/weightsmith-was-here").exists()


def test_the_recipe_is_right_until_spoilt(desk: Desk) -> None:
    assert desk.merge() == 0
    assert (desk.out / "model.safetensors").exists()


def test_more_tokens_at_the_end_are_no_contradiction(desk: Desk) -> None:
    for name, tokens in (("base", "ab"), ("a", "abc"), ("b", "abcd")):
        vocabulary(desk, name, *tokens)
    assert desk.merge() == 0


def test_unlike_vocabularies_are_fine_where_the_rows_are_kept(desk: Desk) -> None:
    unlike_token_numbers(desk)
    desk.recipe["exclude"] = ["*embed*"]
    assert desk.merge() == 0


def test_output_folder_is_not_touched(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.out.mkdir()
    (desk.out / "model-00007-of-00009.safetensors").write_text("precious")
    assert desk.merge() == 2
    assert re.search(r"out exists and is not empty; .*--overwrite", capsys.readouterr().err)
    assert [p.name for p in desk.out.iterdir()] == ["model-00007-of-00009.safetensors"]
    assert desk.merge("--overwrite") == 0
    assert not (desk.out / "model-00007-of-00009.safetensors").exists(), "a stale shard survived"


def test_disk_too_small(desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert desk.merge() == 2
    assert re.search(r"needs .* but .* free on its disk", capsys.readouterr().err)
    assert not desk.out.exists()


def test_output_over_an_input(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.out = desk.folder / "a"
    before = (desk.out / "model.safetensors").read_bytes()
    assert desk.merge("--overwrite") == 2
    assert "input" in capsys.readouterr().err
    assert (desk.out / "model.safetensors").read_bytes() == before


def test_all_problems_together(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    missing_tensor(desk)
    unlike_shapes(desk)
    desk.out.mkdir()
    (desk.out / "x").write_text("x")
    assert desk.merge() == 2
    shown = capsys.readouterr().err
    for pattern in (r"3 problems", r"model\.norm\.weight is missing in a", r"has shape \[6, 4\]", r"not empty"):
        assert re.search(pattern, shown), shown


def test_traceback_with_debug(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    missing_base(desk)
    assert desk.merge("--debug") == 2
    assert "Traceback" in capsys.readouterr().err
