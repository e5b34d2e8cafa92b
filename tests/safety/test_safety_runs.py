"""Whole runs: nothing leaves the machine, no model's code runs, no input is overwritten, nothing skipped silently."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from kit import texts
from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, PlanError, SourceError
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.manifest import MANIFEST, read_manifest, verify_folder, write_manifest
from weightsmith.io.read import hub
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.jobs.api import merge
from weightsmith.jobs.compress import compress
from weightsmith.jobs.job import Result
from weightsmith.jobs.merge import run
from weightsmith.jobs.sweep import run_sweep
from weightsmith.jobs.verify import rerun
from weightsmith.kernels.native import cache_folder
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.load import loads
from weightsmith.recipe.schema import Recipe, StageSpec

_OUTSIDE = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_calls: list[tuple[str, object]] = []
_listening = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event in _OUTSIDE:
        _calls.append((event, arguments[1:]))


sys.addaudithook(_hook)


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, object]]]:
    """No socket can be connected, and every try is noted, whichever library makes it."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("sealed")

    global _listening  # noqa: PLW0603  (an audit hook cannot be taken back, only told to look away)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read once, at its import
    monkeypatch.setenv("HF_TOKEN", "hf_topsecrettoken")
    _calls.clear()
    _listening = True
    yield _calls
    _listening = False


def state(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)),
        "model.norm.weight",
    ]
    made = {n: torch.randn(8, 6, generator=generator).bfloat16() for n in names[:-1]}
    return made | {names[-1]: torch.randn(6, generator=generator).bfloat16()} | more


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "none", "hidden_size": 6}')
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


def recipe(folder: Path, **more: Any) -> Recipe:
    tree = {"base": str(folder / "base"), "models": {n: str(folder / n) for n in "ab"}, "method": "ties"}
    return loads(json.dumps(tree | more))


# --- the network -----------------------------------------------------------------------------------


def test_local_models_are_merged_without_a_word_to_the_network(
    models: Path, sealed: list[tuple[str, object]], capfd: pytest.CaptureFixture[str]
) -> None:
    (models / "r.yaml").write_text(
        f"base: {models}/base\nmodels:\n  a: {models}/a\n  b: {models}/b\nmethod: ties\n", encoding="utf-8"
    )
    out = str(models / "out")
    for words in (["plan", str(models / "r.yaml")], ["merge", str(models / "r.yaml"), out], ["check", out],
                  ["verify", out, "--rerun"]):  # fmt: skip
        assert main(words) in (0, 2), words
    assert sealed == []
    said = "".join(capfd.readouterr()) + "".join(
        p.read_text() for p in Path(out).iterdir() if p.suffix in (".md", ".json")
    )
    assert "topsecret" not in said


def test_the_seal_holds(sealed: list[tuple[str, object]], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be reached"):
        hub.open_hub("org/some-model", cache=tmp_path)
    with pytest.raises(OSError, match="sealed"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("said", "hidden"),
    [
        ("401 for hf_AbCdEfGhIjKlMnOp at https://huggingface.co/x", "hf_AbCd"),
        ("Authorization: Bearer abc.def-ghi", "abc.def"),
        ("403 for url: https://cdn.host/x/y?X-Amz-Signature=abcdef&Expires=3 (id 5)", "abcdef"),
        ("ProxyError: http://me:password@proxy:3128 refused", "password"),
        ("https://user:word@mirror.example/api", "user:word"),
    ],
)
def test_secrets_are_not_in_messages(said: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", failing)
    with pytest.raises(SourceError) as error:
        hub.Repo.find("org/model", None, "https://me:secretword@mirror.example")
    assert hidden not in str(error.value)
    assert "secretword" not in str(error.value)
    assert "***" in str(error.value)


def test_a_revision_does_not_lead_out_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no revision"):
        hub.open_hub("org/model@../../../x", cache=tmp_path)


# --- a model's own code ----------------------------------------------------------------------------


def test_code_beside_a_model_does_not_run(models: Path, sealed: object) -> None:
    canary = models / "canary"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Model: pass\nclass Config: pass\n"
    config = {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }  # fmt: skip
    remote = {"AutoConfig": "org/repo--own.Config", "AutoModelForCausalLM": "org/repo--own.Model"}
    for auto_map in (config["auto_map"], remote):
        for name in ("base", "a", "b"):
            (models / name / "own.py").write_text(code)
            (models / name / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
            (models / name / "tokenizer_config.json").write_text(
                json.dumps({"auto_map": {"AutoTokenizer": ["own.Model", None]}, "tokenizer_class": "Own"})
            )
        out = models / "out"
        run(recipe(models), out, overwrite=True)
        assert not list(out.rglob("*.py"))
        (out / "own.py").write_text(code)
        (models / "text.txt").write_text("some words\n" * 20)
        assert main(["check", str(out)]) in (0, 2)
        main(
            [
                "observe",
                str(models / "base"),
                "--data",
                str(models / "text.txt"),
                "--stat",
                "gram",
                "-o",
                str(models / "s"),
            ]
        )
        assert not canary.exists()


# --- inputs stay as they are -----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spellings(place: Path) -> dict[str, Path]:
    link = place.with_name(place.name + "-link")
    link.symlink_to(place)
    (place.parent / "other").mkdir()
    return {
        "plain": place,
        "dots": place.parent / "other" / ".." / place.name,
        "link": link,
        "through a linked parent": _linked(place),
        "relative": Path(os.path.relpath(place)),
        "inside": place / "deeper" / "out",
        "inside a link": link / "out",
        "parent": place.parent,
    }


def _linked(place: Path) -> Path:
    link = place.parent.parent / f"{place.parent.name}-link"
    link.symlink_to(place.parent)
    return link / place.name


@pytest.mark.parametrize("spelling", ["plain", "dots", "link", "through a linked parent", "relative", "inside",
                                      "inside a link", "parent"])  # fmt: skip
@pytest.mark.parametrize("victim", ["base", "a"])
def test_no_spelling_of_an_input_is_written_over(victim: str, spelling: str, models: Path) -> None:
    out = spellings(models / victim)[spelling]
    before = contents(models)
    with pytest.raises(PlanError, match="input"):
        run(recipe(models), out, overwrite=True)
    assert contents(models) == before


def adapter(folder: Path, module: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file(
        {
            f"base_model.model.{module}.lora_A.weight": torch.ones(1, 6),
            f"base_model.model.{module}.lora_B.weight": torch.ones(8, 1),
        },
        folder / "adapter_model.safetensors",
    )
    return folder


def test_adapters_statistics_nested_inputs_and_tokenizers_are_inputs_too(models: Path) -> None:
    lora = adapter(models / "lora", "model.layers.0.mlp.up_proj")
    stats = models / "stats"
    stats.mkdir()
    ones = {name: torch.ones_like(t, dtype=torch.float32) for name, t in state(0).items()}
    for name in ("a", "b"):
        (stats / name).mkdir()
        notes = json.dumps({"stat": "fisher", "examples": 1})
        save_file(ones, stats / name / "fisher.safetensors", {"weightsmith": notes})
    words = models / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text("{}")
    inner = {"models": {"x": str(models / "a"), "y": str(models / "b")}, "method": "linear"}
    single = models / "single"
    single.mkdir()
    (single / "link.safetensors").symlink_to(models / "b" / "model.safetensors")
    cases: dict[str, tuple[Recipe, Path]] = {
        "adapter": (recipe(models, models={"l": str(lora), "b": str(models / "b")}), lora),
        "nested": (recipe(models, models={"n": inner, "b": str(models / "b")}), models / "a"),
        "stats": (
            recipe(models, method="fisher",
                   models={n: {"model": str(models / n), "stats": str(stats / n)} for n in "ab"}),
            stats / "a",
        ),
        "tokenizer": (recipe(models, tokenizer=str(words)), words),
        "slice": (recipe(models, models={n: {"model": str(models / n), "layers": [0, 3]} for n in "ab"}), models / "a"),
        "link to a file": (
            recipe(models, models={"a": str(models / "a"), "l": str(single / "link.safetensors")}), models / "b"
        ),
    }  # fmt: skip
    for case, (made, out) in cases.items():
        before = contents(models)
        with pytest.raises(PlanError, match="input"):
            run(made, out, overwrite=True)
        assert contents(models) == before, case


PLUGIN = """
from dataclasses import dataclass
from weightsmith.core.method import Method
@dataclass(frozen=True)
class Half{name}(Method, name="half_{name}"):
    \"\"\"Half of the first.\"\"\"
    def merge(self, site):
        return site.stack[0] / 2
"""


@pytest.mark.parametrize("verb", ["merge", "plan"])
@pytest.mark.parametrize("place", ["out", "out.partial/files"])
def test_recipes_and_plug_ins_in_the_output_are_not_lost(
    place: str, verb: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite replaces the folder as a whole: what the run was told by must not lie in it."""
    (models / place).mkdir(parents=True)
    inner = {"models": {"x": str(models / "a"), "y": str(models / "b")}, "method": "linear"}
    outer = {"models": {"n": "inner.yaml", "b": str(models / "b")}, "method": "linear"}
    kept = {"plain.yaml": inner, "inner.yaml": inner, "outer.yaml": outer}
    for name, made in kept.items():
        (models / place / name).write_text(json.dumps(made))
    word = f"{verb}_{len(place)}"
    (models / place / "mine.py").write_text(PLUGIN.format(name=word))
    (models / "uses.yaml").write_text(json.dumps(inner | {"method": f"half_{word}"}))
    away = models / "away"
    away.mkdir()
    (away / "outer.yaml").write_text(json.dumps(outer | {"models": {"n": f"../{place}/inner.yaml", "b": "../b"}}))
    more = ["--overwrite"] if verb == "merge" else []
    cases = {
        "plain.yaml": [place + "/plain.yaml"],
        "inner.yaml": ["away/outer.yaml"],
        "mine.py": ["uses.yaml", "--plugin", str(models / place / "mine.py")],
    }
    before = contents(models)
    for file, (read, *options) in cases.items():
        assert main([verb, str(models / read), str(models / "out"), *more, *options]) == 2, file
        said = capsys.readouterr()
        assert f"{models / place.split('/')[0]} holds the input {models / place / file}; choose another" in (
            said.err + said.out
        )
        assert contents(models) == before, file


def test_an_input_in_the_work_folder(models: Path) -> None:
    place = models / "out.partial" / "files"
    place.parent.mkdir()
    (models / "a").rename(place)
    before = contents(models)
    with pytest.raises(PlanError, match=r"out\.partial holds the input"):
        run(recipe(models, models={"a": str(place), "b": str(models / "b")}), models / "out", overwrite=True)
    assert contents(models) == before


def test_a_hard_link_to_an_input_in_the_old_output(models: Path) -> None:
    """The new output takes the old one's place as a whole; what the name stood for is not written to."""
    out = models / "out"
    out.mkdir()
    os.link(models / "a" / "model.safetensors", out / "model.safetensors")
    before = (models / "a" / "model.safetensors").read_bytes()
    run(recipe(models), out, overwrite=True)
    assert (models / "a" / "model.safetensors").read_bytes() == before
    assert (out / "model.safetensors").read_bytes() != before


# --- every tensor is accounted for -----------------------------------------------------------------


def account(inputs: Inputs, wanted: Recipe) -> tuple[set[str], set[str]]:
    """(names that any input has, names that the plan speaks of)."""
    plan = make_plan(wanted, sources=inputs, strict=False)
    everything = {name for _, source in inputs.models for name in (*source.keys, *source.aliases)}
    spoken = {key.name for task in plan.tasks for key in task.keys}
    spoken |= {alias for alias, name in inputs.models[0][1].aliases.items() if name in spoken}
    said = "\n".join(texts((*plan.problems, *plan.warnings)))
    spoken |= {name for name in everything if name in said}
    assert all(task.pipeline is not None or task.reason for task in plan.tasks)
    return everything, spoken


def tied(seed: int) -> dict[str, torch.Tensor]:
    made = state(seed)
    return made | {"lm_head.weight": made["model.embed_tokens.weight"]}


ODD = {
    "plain": (state(0), state(1), state(2)),
    "extra in one": (state(0), state(1, extra=torch.ones(2)), state(2)),
    "extra in both": (state(0), state(1, extra=torch.ones(2)), state(2, extra=torch.zeros(3))),
    "extra in the base": (state(0, extra=torch.ones(2)), state(1), state(2)),
    "tied everywhere": (tied(0), tied(1), tied(2)),
    "tied in the base only": (tied(0), state(1, **{"lm_head.weight": torch.ones(8, 6)}), tied(2)),
    "tied in an expert only": (state(0, **{"lm_head.weight": torch.ones(8, 6)}), tied(1), tied(2)),
    "integers": tuple(state(i, ids=torch.arange(3)) for i in range(3)),
    "empty": tuple(state(i, none=torch.ones(0, 3)) for i in range(3)),
    "scalar": tuple(state(i, scale=torch.tensor(1.0)) for i in range(3)),
    "unlike shapes": (state(0, w=torch.ones(2)), state(1, w=torch.ones(3)), state(2, w=torch.ones(2))),
}
TREATMENTS: dict[str, dict[str, Any]] = {
    "ties": {},
    "linear": {"method": "linear"},
    "exclude extra": {"exclude": ["extra"]},
    "exclude all": {"exclude": ["*"]},
    "exclude the head": {"exclude": ["lm_head*", "model.embed*"]},
    "a rule": {"rules": [{"role": "up", "method": "keep"}, {"match": "*norm*", "method": "linear"}]},
    "matrices only": {"method": "tsvm"},
    "groups": {"method": "weight_matching"},
}


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("case", ODD)
def test_every_tensor_is_merged_copied_or_spoken_of(case: str, treatment: str) -> None:
    base, a, b = (MemorySource(tensors, name) for tensors, name in zip(ODD[case], ("base", "a", "b"), strict=True))
    tree = {"base": "base", "models": {"a": "a", "b": "b"}, "method": "ties"} | TREATMENTS[treatment]
    wanted = loads(json.dumps(tree))
    everything, spoken = account(Inputs(base, {"a": a, "b": b}), wanted)
    assert everything == spoken


def test_a_head_that_only_the_base_ties_is_not_lost() -> None:
    base, own = tied(0), state(1, **{"lm_head.weight": torch.ones(8, 6)})
    merged = merge([own], "task_arithmetic", base=base, lambda_=0.5)
    assert torch.equal(merged["lm_head.weight"], (0.5 * (base["model.embed_tokens.weight"] + 1)).bfloat16())
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    plan = make_plan(
        loads('{"base": "x", "models": {"a": "y"}, "method": "linear", "exclude": ["lm_head.weight"]}'),
        sources=Inputs(MemorySource(base), {"a": MemorySource(own)}),
    )
    assert not plan.problems


@pytest.mark.parametrize(("owners", "lacking"), [("abc", "base"), ("bc", "base, a")])
@pytest.mark.parametrize("names", [("tower.w",), ("tower.w", "tower.v")])
def test_a_tensor_of_some_models_has_no_owner_unless_the_recipe_says_so(
    owners: str, lacking: str, names: tuple[str, ...]
) -> None:
    own = {n: state(i, **{name: torch.full((2,), float(i)) for name in names}) for i, n in enumerate("abc")}
    inputs = Inputs(
        MemorySource(state(0)), {n: MemorySource(own[n] if n in owners else state(1)) for n in "abc"}
    )  # fmt: skip
    recipe = {"base": "x", "models": {"a": "y", "b": "z", "c": "w"}, "method": "linear", "exclude": ["tower.*"]}
    what = "tower.w is" if len(names) == 1 else "tower.w and 1 more are"
    first, *others = owners
    with pytest.raises(
        PlanError,
        match=rf"^{re.escape(what)} in {', '.join(owners)} but not in {lacking}: give them other names in all models "
        rf'but one, or take those of {first} with "extra: first"$',
    ):
        make_plan(loads(json.dumps(recipe)), sources=inputs)
    plan = make_plan(loads(json.dumps({**recipe, "extra": "first"})), sources=inputs)
    kept = [t for t in plan.tasks if t.key.name in names]
    assert {t.source for t in kept} == {first}
    assert {t.reason for t in kept} == {f"not in base; {first} is the first that has it, {', '.join(others)} dropped"}
    assert len(kept) == len(names)


def test_a_compressed_folder_has_every_models_own_tensors() -> None:
    inputs = Inputs(MemorySource(state(0)), {n: MemorySource(state(1, extra=torch.ones(2))) for n in "ab"})
    recipe = loads('{"base": "x", "models": {"a": "y", "b": "z"}, "method": "tall_masks", "exclude": ["extra"]}')
    assert make_plan(recipe, sources=inputs, encode=True).problems == ()


def test_what_is_no_tensor_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": state(0), "epoch": 3, "optimizer": {}}, tmp_path / "a.pt")
    plan = make_plan(
        loads(json.dumps({"models": {"a": str(tmp_path / "a.pt")}, "method": "linear"})),
        sources=Inputs(None, {"a": open_source(tmp_path / "a.pt")}),
    )
    assert texts(plan.warnings) == ["a: entries that are no tensors are left out: epoch, optimizer"]


def test_tied_names_are_in_the_file(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "a")):
        torch.save(tied(i), tmp_path / f"{name}.pt")
    run(loads(json.dumps({"base": str(tmp_path / "base.pt"), "models": {"a": str(tmp_path / "a.pt")},
                          "method": "linear"})), tmp_path / "out")  # fmt: skip
    source = open_source(tmp_path / "out")
    assert source.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(source.keys)


# --- one flipped bit -------------------------------------------------------------------------------


@pytest.fixture
def merged(models: Path) -> Path:
    made = recipe(models, parameters={"density": 1e-05, "lambda": 0.30000000000000004}, output={"shard_size": "200"})
    (models / "base" / "é.json").write_text("{}")
    run(made, models / "out")
    return models / "out"


def noticed(folder: Path) -> bool:
    try:
        return bool(verify_folder(folder))
    except (OutputError, SourceError):
        return True


def test_a_flipped_bit_anywhere_is_found(merged: Path) -> None:
    assert not noticed(merged)
    files = [path for path in sorted(merged.rglob("*")) if path.is_file()]
    assert len(files) > 6
    picks = random.Random(0)
    tried = 0
    for path in files:
        data = path.read_bytes()
        for at in picks.sample(range(len(data)), min(len(data), 60)):
            changed = bytearray(data)
            changed[at] ^= 1 << picks.randrange(8)
            path.write_bytes(changed)
            assert noticed(merged), f"{path.name}: byte {at}"
            tried += 1
        path.write_bytes(data)
    assert tried >= 300
    assert not noticed(merged)


@pytest.mark.parametrize(
    ("before", "after"), [("1e-05", "1E-05"), ("30000000000000004", "30000000000000005"), ("u00e9", "u00E9")]
)
def test_a_bit_of_the_manifest_that_changes_no_meaning(before: str, after: str, merged: Path) -> None:
    path = merged / MANIFEST
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert json.loads(path.read_text()) == json.loads(text)
    assert noticed(merged)


def test_links_that_came_later_are_found(merged: Path) -> None:
    (merged / "more").symlink_to(merged.parent)
    assert verify_folder(merged) == ["more was not there when the folder was written"]


def test_a_file_that_became_a_pipe(merged: Path) -> None:
    (merged / "config.json").unlink()
    os.mkfifo(merged / "config.json")
    assert verify_folder(merged) == ["config.json is no file any more"]


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no output": lambda m: m.pop("output"),
    "no files": lambda m: m["output"].pop("files"),
    "files a list": lambda m: m["output"].update(files=[1]),
    "no tensors": lambda m: m["output"].pop("tensors"),
    "a tensor without parts": lambda m: next(iter(m["output"]["tensors"].values())).pop("parts"),
    "an unknown dtype": lambda m: next(iter(m["output"]["tensors"].values())).update(dtype="x"),
    "a shape of words": lambda m: next(iter(m["output"]["tensors"].values())).update(shape=["x"]),
    "negative rows": lambda m: next(iter(m["output"]["tensors"].values())).update(parts=[[-5, 3, "x"]]),
    "rows beyond": lambda m: next(iter(m["output"]["tensors"].values())).update(parts=[[0, 1 << 62, "x"]]),
    "sizes of words": lambda m: next(iter(m["output"]["files"].values())).update(bytes="x"),
    "a file outside": lambda m: m["output"]["files"].update({"../a/model.safetensors": {"bytes": 1, "header": "x"}}),
    "a recipe of nothing": lambda m: m.update(recipe=3),
    "no recipe": lambda m: m.pop("recipe"),
    "no kind": lambda m: m.pop("kind"),
    "no inputs": lambda m: m.pop("inputs"),
    "inputs a list": lambda m: m.update(inputs=[]),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_manifest_forged_with_a_right_checksum(
    forgery: str, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(merged)
    FORGED[forgery](manifest)
    write_manifest(merged, manifest)
    code = main(["verify", str(merged), "--rerun"])
    said = "".join(capsys.readouterr())
    assert code == 2, said
    assert "internal error" not in said


# --- does the recipe still give these bytes? -------------------------------------------------------


def test_one_changed_bit_of_an_input_is_noticed_by_a_rerun(models: Path) -> None:
    merged = models / "out"
    run(recipe(models, method="linear"), merged)
    path = models / "a" / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    assert rerun(merged) == []
    data[-100] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same header, same time
    problems = rerun(merged)
    assert problems
    assert problems[0] == "input a is not what it was when out was made"  # so small a file is hashed as a whole
    assert all("comes out with other bytes" in text for text in problems[1:])


def test_full_fingerprints_find_the_file_of_a_changed_bit(tmp_path: Path) -> None:
    """Of a large file the usual fingerprint hashes the header and some pieces; `full` hashes every byte."""
    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        tensors = {"w": torch.full((1000, 100), float(number)), "v": torch.ones(3)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    wanted, path = recipe(tmp_path, method="linear"), tmp_path / "a" / "model.safetensors"
    run(wanted, tmp_path / "quick")
    run(wanted, tmp_path / "full", fingerprint="full")
    noted = read_manifest(tmp_path / "full")["inputs"]
    assert noted["a"]["contents"] == {"model.safetensors": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    assert "contents" not in read_manifest(tmp_path / "quick")["inputs"]["a"]
    assert [rerun(tmp_path / out) for out in ("quick", "full")] == [[], []]

    status, data = path.stat(), bytearray(path.read_bytes())
    data[-200_000] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = ["w comes out with other bytes"]
    assert rerun(tmp_path / "quick") == other
    assert rerun(tmp_path / "full") == ["input a is not what it was when full was made (model.safetensors)", *other]


def test_full_fingerprints_of_every_kind_of_input(models: Path) -> None:
    lora = adapter(models / "lora", "model.layers.0.mlp.up_proj")
    inner = {"models": {"x": str(models / "a"), "y": str(models / "b")}, "method": "linear"}
    made = recipe(models, models={"l": str(lora), "n": inner, "b": {"model": str(models / "b"), "layers": [0, 3]}})
    run(made, models / "out", fingerprint="full")
    noted = {name: list(found["contents"]) for name, found in read_manifest(models / "out")["inputs"].items()}
    assert noted == {
        "base": ["model.safetensors"],
        "l": ["base/model.safetensors", "lora/adapter_model.safetensors"],
        "n": ["a/model.safetensors", "b/model.safetensors"],
        "b": ["model.safetensors"],
    }
    assert rerun(models / "out") == []


def test_inputs_that_were_only_copied_are_the_same_inputs(merged: Path) -> None:
    for name in ("base", "a", "b"):
        path = merged.parent / name / "model.safetensors"
        os.utime(path, ns=(1, 1))
    assert rerun(merged) == []
    (merged.parent / "b" / "model.safetensors").write_bytes(
        (merged.parent / "a" / "model.safetensors").read_bytes()[:-1]
    )
    assert any("cannot be run again" in text for text in rerun(merged))


def compressed(recipe: Recipe, out: Path) -> Result:
    return compress(
        recipe.model_copy(update={"method": (StageSpec(name="tall_masks"),), "rules": ()}), out, accept_loss=True
    )


def swept(recipe: Recipe, out: Path) -> Result:
    return run_sweep({"one": recipe, "two": recipe}, out.parent / "both").variants["one"]


@pytest.mark.parametrize("job", [run, compressed, swept])
def test_licences_that_do_not_go_together_are_warned_of(job: Any, models: Path) -> None:
    (models / "a" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (models / "b" / "README.md").write_text("---\nlicense: llama3\n---\n")
    (models / "base" / "README.md").write_text("---\nlicense: gemma\n---\n")
    result = job(recipe(models), models / "out")
    said = "\n".join(texts(result.warnings))
    assert "a (cc-by-nc-4.0) may not be used commercially" in said
    assert "base (gemma), b (llama3) are community licences" in said
    assert read_manifest(result.out)["licences"] == {"base": "gemma", "a": "cc-by-nc-4.0", "b": "llama3"}


def test_the_manifest_holds_what_is_needed_to_make_it_again(merged: Path) -> None:
    manifest = read_manifest(merged)
    assert {"recipe", "inputs", "licences", "made_by", "versions", "output", "weightsmith"} <= set(manifest)
    assert all(files["files"] for files in manifest["inputs"].values())
    (how,) = [text for text in manifest["made_by"] if text.startswith("ties")]
    assert "density=1e-05" in how
    names = {name for made in manifest["made_by"].values() for name in made}
    assert names == set(manifest["output"]["tensors"]) == set(open_source(merged).keys)
    assert all(noted["parts"] for noted in manifest["output"]["tensors"].values())


# --- compiled code in the temporary folder ---------------------------------------------------------


def test_a_cache_that_others_could_have_filled_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "kernels"
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(mine))
    assert cache_folder() == mine
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    assert cache_folder() not in (mine, None)
    shutil.rmtree(mine)
    mine.symlink_to(tmp_path)
    other = cache_folder()
    assert other not in (mine, None)
    assert other is not None
    other.chmod(0o777)
    assert cache_folder() is None


def test_sources_know_where_they_are(models: Path) -> None:
    source: Source = open_source(models / "a")
    assert models / "a" in source.origin.locations
    assert MemorySource({"w": torch.ones(1)}).origin.locations == ()


CONFIGS = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 99_999,
    "a number": "3",
    "not UTF-8": "\xff",
    "types": '{"architectures": 3, "torch_dtype": [], "model_type": 5, "hidden_size": -1, "vocab_size": "x"}',
    "a list of numbers": '{"architectures": [3]}',
    "absurd sizes": '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1e9}',
    "a type with a path": '{"architectures": ["LlamaForCausalLM"], "model_type": "../../x"}',
}


OTHERS = [(case, f"{part}.json") for part in ("tokenizer", "generation_config") for case in ("deep lists", "a number")]


@pytest.mark.parametrize(("case", "file"), [*((case, "config.json") for case in CONFIGS), *OTHERS])
def test_hostile_configurations(case: str, file: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "a", "b"):
        (models / name / file).write_text(CONFIGS[case], encoding="latin-1")
    (models / "r.json").write_text(json.dumps({"models": {n: str(models / n) for n in "ab"}, "method": "linear"}))
    gc.collect()
    gc.disable()  # a collection at the bottom of a deep nesting has no room for what it calls
    try:
        for words in (["merge", str(models / "r.json"), str(models / "out")], ["check", str(models / "a")]):
            assert main(words) in (0, 2)
    finally:
        gc.enable()
        assert "internal error" not in "".join(capsys.readouterr())
