"""Training in the tangent space: folders say so, run so, and merge with their like only (arXiv:2305.12827)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.align.barrier import curve
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.core.settings import Settings
from weightsmith.io.package.manifest import read_manifest, write_manifest
from weightsmith.io.read.open import open_source
from weightsmith.jobs.scratch import Workshop
from weightsmith.observe.collect import observe
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model
from weightsmith.observe.tangent import Linearized, linearize
from weightsmith.train.recipe import loads
from weightsmith.train.run import train
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.space import Free

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256


def text(kind: str) -> str:
    return "".join(f"{n} {kind} {n} is {2 * n}. " for n in range(120))


def trained(base: Path, data: Path, out: Path, tune: str = "linear: {}") -> Path:
    asked = loads(
        f"{{model: {base}, data: {data}, tune: {{{tune}}}, steps: 3, batch: 4, length: 24, every: 3,"
        " optimizer: {adamw: {lr: 0.01}}}"
    )
    loaded = load_model(base, device="cpu")
    train(asked, loaded, read_examples(data, loaded, examples=32, length=24), out)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (bfloat16), other; a, b, linearised around base; low, an adapter; c around other; plain, fine-tuned."""
    import transformers

    root = tmp_path_factory.mktemp("linear")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(vocab_size=256, **sizes)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / name)
    (root / "a.txt").write_text(text("plus"))
    (root / "b.txt").write_text(text("with"))
    trained(root / "base", root / "a.txt", root / "a")
    trained(root / "base", root / "b.txt", root / "b")
    trained(root / "base", root / "a.txt", root / "low", "linear: {rank: 4, modules: '.*(q|v)_proj'}")
    trained(root / "other", root / "b.txt", root / "c")
    trained(root / "base", root / "b.txt", root / "plain", "full: {}")
    return root


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder, device="cpu").logits(TOKENS)


def recipe(
    place: Path, tmp_path: Path, base: str | None = "base", method: str = "task_arithmetic", **models: str
) -> Path:
    lines = [f"base: {place / base}"] if base else []
    lines += ["models:", *(f"  {n}: {m}" for n, m in models.items()), f"method: {method}", "output: {dtype: float32}"]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def merged(path: Path, out: Path) -> Path:
    ws.Recipe.load(path).run(out)
    return out


def test_a_folder_says_what_it_is_and_runs_as_that(place: Path):
    noted = read_manifest(place / "a")
    assert noted["linearized"] is True
    assert noted["expansion"]["model"] == str(place / "base")
    assert "linearized" not in read_manifest(place / "plain")
    loaded = load_model(place / "a", device="cpu")
    assert isinstance(loaded.module, Linearized)
    # Small steps from a point in bfloat16 are kept in float32, and come back from the folder to the bit.
    base, found = open_source(place / "base"), open_source(place / "a")
    module = linearize(load_model(place / "base", device="cpu").module)
    module.load_delta(
        {n: found.read(n) - base.read(n).float() for n in base.keys if n in dict(module.origin.named_parameters())}
    )
    with torch.no_grad():
        assert torch.equal(module(TOKENS, use_cache=False), logits(place / "a"))
    ordinary = load_model(place / "base", device="cpu", state={n: found.read(n) for n in found.keys})
    with torch.no_grad():
        assert (ordinary.logits(TOKENS) - logits(place / "a")).abs().max() > 1e-4  # f is not f_lin


def test_outputs_of_a_merge_are_the_sum_of_the_parts(place: Path, tmp_path: Path):
    path = recipe(place, tmp_path, method="{task_arithmetic: {lambda: 0.7}}", a=str(place / "a"), b=str(place / "b"))
    out = merged(path, tmp_path / "out")
    assert read_manifest(out)["expansion"] == read_manifest(place / "a")["expansion"]
    start, a, b = (logits(place / name) for name in ("base", "a", "b"))
    torch.testing.assert_close(logits(out), start + 0.7 * (a - start) + 0.7 * (b - start), rtol=0, atol=1e-5)


def test_an_adapter_is_the_tangent_of_one(place: Path, tmp_path: Path):
    """Only U trains: the change is U V with the V that it began with, in the form of PEFT's LoRA."""
    ref = f"{{model: {place / 'base'}, adapter: {place / 'low'}}}"
    out = merged(recipe(place, tmp_path, low=ref, a=str(place / "a")), tmp_path / "out")
    alone = merged(recipe(place, tmp_path, low=ref), tmp_path / "alone")
    base, found = open_source(place / "base"), open_source(alone)
    moved = [n for n in base.keys if not torch.equal(base.read(n).float(), found.read(n))]
    assert sorted(n.rpartition("self_attn.")[2] for n in moved) == ["q_proj.weight", "v_proj.weight"]
    assert all(torch.linalg.matrix_rank(found.read(n) - base.read(n).float(), rtol=1e-4) <= 4 for n in moved)
    start, a, low = (logits(f) for f in (place / "base", place / "a", alone))
    torch.testing.assert_close(logits(out), a + low - start, rtol=0, atol=1e-5)
    assert (low - start).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("base", "models", "said"),
    [
        ("base", {"a": "a", "p": "plain"}, "p: an ordinary model, and a was linearised around .*base .*tangent: cast"),
        ("base", {"a": "a", "c": "c"}, "c: linearised around .*other .*, but a around .*base .*no tangent space"),
        ("other", {"a": "a", "b": "b"}, "base: an ordinary model, and a was linearised around"),
        (None, {"p": "plain", "b": "b"}, "p: an ordinary model, and b was linearised around"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(base: str | None, models: dict[str, str], said: str, place: Path, tmp_path: Path):
    method = "task_arithmetic" if base else "linear"
    with pytest.raises(PlanError, match=said):
        merged(
            recipe(place, tmp_path, base, method, **{n: str(place / m) for n, m in models.items()}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_another_model(place: Path, tmp_path: Path):
    ref = f"{{model: {place / 'other'}, adapter: {place / 'low'}}}"
    with pytest.raises(PlanError, match=r"low: .*low was linearised around .*base .*, and .*other is another model"):
        merged(recipe(place, tmp_path, None, "linear", low=ref, a=str(place / "a")), tmp_path / "out")


def test_a_cast_takes_weights_as_they_are(place: Path, tmp_path: Path):
    cast = f"{{model: {place / 'a'}, tangent: cast}}"
    out = merged(recipe(place, tmp_path, a=cast, p=str(place / "plain")), tmp_path / "out")
    assert "linearized" not in read_manifest(out)
    back = merged(
        recipe(place, tmp_path, a=str(place / "a"), p=f"{{model: {place / 'plain'}, tangent: cast}}"), tmp_path / "b"
    )
    assert read_manifest(back)["linearized"]  # an ordinary vector in the linearised model: post hoc
    assert all(torch.equal(open_source(out).read(n), open_source(back).read(n)) for n in open_source(out).keys)


def test_the_point_itself_may_be_averaged(place: Path, tmp_path: Path):
    shutil.copytree(place / "base", tmp_path / "copy")
    out = merged(
        recipe(place, tmp_path, None, "linear", zero=str(tmp_path / "copy"), a=str(place / "a")), tmp_path / "out"
    )
    start, a = logits(place / "base"), logits(place / "a")
    torch.testing.assert_close(logits(out), (start + a) / 2, rtol=0, atol=1e-5)


def test_what_would_forget_the_mark_is_refused(place: Path, tmp_path: Path):
    path = recipe(place, tmp_path, a=str(place / "a"), b=str(place / "b"))
    asked = ws.Recipe.load(path)
    said = r"models linearised around .*base .* are run from folders, which say so; merge to one, or cast them"
    failed = Workshop(tmp_path / "room", Settings()).make({"one": asked}, in_memory=True).failed
    assert re.search(said, str(failed["one"]))
    module = load_model(place / "base", device="cpu").module
    with pytest.raises(PlanError, match=said):
        ws.tune(path, space={"lambda": Free()}, objective=Entropy(), data={"a": [TOKENS], "b": [TOKENS]}, module=module)
    with pytest.raises(SourceError, match=r"a linearised model; statistics are of ordinary ones"):
        observe(place / "a", place / "a.txt", ("gram",), tmp_path / "stats", examples=2, length=8)
    narrow = ws.Recipe.load(path, ["output.dtype=bfloat16"]).run(tmp_path / "narrow")
    assert any("which bfloat16 rounds away" in warning.text for warning in narrow.warnings)


def test_marks_that_lead_nowhere(place: Path, tmp_path: Path):
    gone = tmp_path / "gone"
    shutil.copytree(place / "a", gone)
    noted = read_manifest(gone)
    write_manifest(gone, noted | {"expansion": noted["expansion"] | {"model": str(tmp_path / "nothing")}})
    with pytest.raises(SourceError, match=r"linearised around .*nothing .*, which is not there; it runs only beside"):
        load_model(gone, device="cpu")
    write_manifest(gone, noted | {"expansion": noted["expansion"] | {"model": str(place / "other")}})
    with pytest.raises(SourceError, match=r"but the model in .*other is another by now"):
        load_model(gone, device="cpu")
    write_manifest(gone, {n: v for n, v in noted.items() if n != "expansion"})
    with pytest.raises(SourceError, match=r"says linearized, but not around which point"):
        load_model(gone, device="cpu")
    with pytest.raises(PlanError, match=r"says linearized, but not around which point"):
        merged(recipe(place, tmp_path, a=str(gone)), tmp_path / "out")
    (gone / "weightsmith.json").write_text(json.dumps(noted))
    with pytest.raises(SourceError, match=r"damaged or was edited"):
        load_model(gone, device="cpu")


def test_lines_between_linearised_models(place: Path):
    a, b, c, base = (load_model(place / name, device="cpu").module for name in ("a", "b", "c", "base"))
    with pytest.raises(SourceError, match=r"one is linearised, the other an ordinary model"):
        curve(a, base, lambda module: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(SourceError, match=r"linearised around different points"):
        curve(a, c, lambda module: None)  # type: ignore[arg-type, return-value]
    del b


def test_what_cannot_be_trained(place: Path, tmp_path: Path):
    with pytest.raises(PlanError, match=r"modules: 'nothing' matches no module"):
        trained(place / "base", place / "a.txt", tmp_path / "x", "linear: {modules: nothing}")
    with pytest.raises(ws.RecipeError, match=r"tune.linear.modules.*is no regular expression"):
        loads("{model: m, data: d, steps: 1, batch: 1, tune: {linear: {modules: '('}}}")
