"""Models at URLs: what is fetched and what is not, what is refused, what a failing network does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save

from remote.conftest import Web, folder_of, model
from weightsmith.cli.main import main
from weightsmith.core.errors import MissingExtra, PlanError, SourceError, WeightsmithError
from weightsmith.io.package.card import CardModel, model_card
from weightsmith.io.package.manifest import build_manifest
from weightsmith.io.read import remote
from weightsmith.io.read.open import open_source
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.remote_source import RemoteSource
from weightsmith.io.url import Url, parse_url
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.load import loads

TEXT = "base: {0}/base\nmodels: {{a: {0}/a, b: {0}/b}}\nmethod: ties\n"


def fill(store: dict[str, bytes], root: str, **options: int) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        store.update({f"{root}/{name}/{file}": data for file, data in folder_of(model(seed), **options).items()})


def put_all(memory: Any, root: str, **options: int) -> None:
    files: dict[str, bytes] = {}
    fill(files, root, **options)
    for name, data in files.items():
        memory.pipe_file(name, data)


def local(tmp_path: Path, **options: int) -> Path:
    files: dict[str, bytes] = {}
    fill(files, "", **options)
    for name, data in files.items():
        path = tmp_path / "models" / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3://bucket/x/", Url("s3", "bucket/x")),
        ("https://u:p@host/x?sig=abc", Url("https", "u:p@host/x", "?sig=abc")),
        (Path("s3://bucket/x"), Url("s3", "bucket/x")),
        (Path("memory:/x"), Url("memory", "x")),
        ("file:///tmp/x", Path("/tmp/x")),
        (Path("file:///tmp/x"), Path("/tmp/x")),
        ("org/name", None),
        ("org/name@main", None),
        ("/a/b:/c", None),
        ("c:/x", None),
        ("nosuch:/x", None),
        ("s3:", None),
        ({"w": 1}, None),
    ],
)
def test_what_is_a_url(text: object, meant: object) -> None:
    assert parse_url(text) == meant


def test_a_path_that_is_there_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_url("s3:/bucket") is None
    assert parse_url("s3://bucket") == Url("s3", "bucket")


def test_secrets_of_addresses_are_never_shown() -> None:
    secret = Url("https", "me:pass@host/folder", "?sig=abc&token=def")
    error = SourceError(f"{secret.full}: no")
    problems = PlanError([secret.full, "b"]).problems
    for shown in (str(secret), repr(secret), str(secret / "x"), str(secret.location), str(error), *map(str, problems)):
        assert "pass" not in shown
        assert "abc" not in shown
    assert (secret / "x").full == "https://me:pass@host/folder/x?sig=abc&token=def"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_fetches_headers_and_small_files_only(web: Web, tmp_path: Path, shards: int) -> None:
    tensors = {f"model.layers.{i}.w": torch.randn(300, 1000) for i in range(6)}
    for name in ("base", "a", "b"):
        web.files |= {f"/{name}/{file}": data for file, data in folder_of(tensors, shards).items()}
    recipe = loads(TEXT.format(web.address))
    plan = make_plan(recipe, sources=open_inputs(recipe))
    assert not plan.problems
    weights = {path: count for path, count in web.served.items() if path.endswith(".safetensors")}
    assert len(weights) == 3 * shards
    for path, count in weights.items():
        header = int.from_bytes(web.files[path][:8], "little")
        assert count <= 8 + header + 1, "length, header, and a byte to see that ranges are known"
    assert web.served["/base/notes/a.txt"] == 0, "other companions wait until something is merged"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("where", ["memory", "web", "file"])
def test_the_same_bytes_as_from_this_machine(where: str, shards: int, memory: Any, web: Web, tmp_path: Path) -> None:
    here = local(tmp_path, shards=shards)
    if where == "memory":
        put_all(memory, "/m", shards=shards)
    fill(web.files, "/m", shards=shards)
    root = {"memory": "memory://m", "web": f"{web.address}/m", "file": f"file://{here}"}[where]
    near = run(loads(TEXT.format(here)), tmp_path / "near", threads=1).out
    far = run(loads(TEXT.format(root)), tmp_path / "far", threads=2).out
    assert isinstance(near, Path)
    assert isinstance(far, Path)
    for name in ("model.safetensors", "config.json", *(() if where == "web" else ("notes/a.txt",))):
        assert (far / name).read_bytes() == (near / name).read_bytes()
    assert json.loads((far / "weightsmith.json").read_text())["licences"] == dict.fromkeys(("base", "a", "b"), "mit")


def test_pieces_are_fetched_once_and_bounded(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 1000)
    monkeypatch.setattr(remote, "_MOST", 8)
    tensor = torch.arange(20_000, dtype=torch.int32).reshape(2000, 10)
    memory.pipe_file("/m/model.safetensors", save({"w": tensor}))
    source = open_source("memory://m/model.safetensors")
    asked: list[tuple[int, int]] = []
    real = type(memory).cat_file

    def counted(self: Any, path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    for start in range(0, 2000, 7):
        assert np.array_equal(source.bits("w", start, start + 7), tensor.numpy()[start : start + 7].view(np.uint32))
        assert len(remote._pieces._held) <= 8
        if 40 * 50 < start * 40 < 70_000:  # pieces that are done with make room for those ahead
            assert max(number for _, number in remote._pieces._held) >= (start * 40) // 1000 + 2
    assert len(asked) == len(set(asked)) == -(-(80_000 + 8 + 80) // 1000)
    whole = source.bits("w")
    assert np.array_equal(whole, tensor.numpy().view(np.uint32))
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.bits("w", 5, 6), whole[5:6])
    assert whole.flags.writeable


def test_a_server_without_listings_is_asked_for_the_usual_names(web: Web) -> None:
    web.lists = False
    fill(web.files, "/m", shards=2)
    source = open_source(f"{web.address}/m/a")
    assert isinstance(source, RemoteSource)
    assert source.origin.files == ("m-0.safetensors", "m-1.safetensors")


def test_a_server_without_ranges_is_refused_before_it_sends_everything(web: Web) -> None:
    web.ranges = False
    web.files["/m/model.safetensors"] = save({"w": torch.zeros(2_000_000)})
    with pytest.raises(SourceError, match="sends whole files only, not ranges of them; download it first"):
        open_source(f"{web.address}/m")


def test_faults_that_pass_are_sat_out(web: Web, memory: Any) -> None:
    web.files |= {f"/m/{name}": data for name, data in folder_of(model(0)).items()}
    source = open_source(f"{web.address}/m")
    name = next(iter(source.keys))
    web.faults = [503, 500, 503]
    assert torch.equal(source.read(name), model(0)[name])
    assert web.faults == []


def test_a_read_that_fails_for_good_is_one_line_with_the_tensor(web: Web, tmp_path: Path) -> None:
    fill(web.files, "/m")
    recipe = loads(TEXT.format(f"{web.address}/m?sig=SECRET").replace("?sig=SECRET/", "/"))
    inputs = open_inputs(recipe)
    for _, source in inputs.models:
        source.prepare()
    web.faults = [503] * 1000
    with pytest.raises(SourceError, match=r"safetensors: 'model\.layers\..*reading .* failed 4 times \(.*503") as error:
        run(recipe, tmp_path / "out", sources=inputs, threads=1)
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)
    assert not (tmp_path / "out").exists()
    web.faults = []
    assert run(recipe, tmp_path / "out", sources=inputs, resume=True).out == tmp_path / "out"


def test_a_file_that_changes_meanwhile_is_refused(web: Web) -> None:
    web.files["/m/model.safetensors"] = save(model(0))
    source = open_source(f"{web.address}/m")
    source.fingerprint()
    web.tags["/m/model.safetensors"] = '"2"'
    with pytest.raises(SourceError, match=r"model\.safetensors: was changed or exchanged since it was opened"):
        source.fingerprint()


@pytest.mark.parametrize("shard", ["../a/m.safetensors", "http://elsewhere/m.safetensors", "/etc/m.safetensors", "x/m"])
def test_an_index_cannot_lead_elsewhere(memory: Any, shard: str) -> None:
    memory.pipe_file("/m/model.safetensors.index.json", json.dumps({"weight_map": {"w": shard}}).encode())
    with pytest.raises(SourceError, match="not a file name inside the folder"):
        open_source("memory://m")


def test_names_in_a_listing_stay_inside(memory: Any, tmp_path: Path) -> None:
    put_all(memory, "/m")
    memory.store["/m/a/../../escaped.txt"] = memory.store["/m/a/config.json"]
    source = open_source("memory://m/a")
    source.prepare()
    assert source.origin.folder is not None
    assert not list(source.origin.folder.parent.parent.rglob("escaped.txt"))


def test_what_is_not_there_or_not_for_us(memory: Any, web: Web) -> None:
    memory.pipe_file("/bin/pytorch_model.bin", b"x")
    memory.pipe_file("/codec/model.safetensors", save(model(0)))
    memory.pipe_file("/codec/weightsmith.json", b'{"kind": "codec"}')
    memory.pipe_file("/short/model.safetensors", save(model(0))[:-1])
    memory.pipe_file("/half/model.safetensors", save(model(0)))
    memory.pipe_file("/half/.weightsmith/run.json", b"{}")
    for ref, text in {
        "memory://none": "memory://none: nothing is there",
        "memory://none/model.safetensors": r"memory://none/model\.safetensors: no such file",
        "memory://bin": "only safetensors are read from elsewhere",
        "memory://codec": "a compressed folder; download it first",
        "memory://short": "truncated",
        "memory://half": "an output that is not finished; run its merge again with --resume",
        f"{web.address}/none": "nothing is there",
    }.items():
        with pytest.raises(SourceError, match=text) as error:
            open_source(ref)
        assert "\n" not in str(error.value)
    with pytest.raises(WeightsmithError, match=r"nosuch://x/y: .*Protocol not known: nosuch.*known: s3, gs"):
        open_source("nosuch://x/y")


def test_a_scheme_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingExtra, match="s3://bucket/x needs s3fs; install it with: pip install s3fs"):
        open_source("s3://bucket/x")
    with pytest.raises(MissingExtra, match="needs s3fs"):
        run(loads("models: {a: {0}}\nmethod: linear".replace("{0}", str(_saved(tmp_path)))), Path("s3://bucket/out"))


def _saved(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(save(model(0)))
    return tmp_path


def test_an_adapter_at_a_url(memory: Any, tmp_path: Path) -> None:
    factors = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(2, 1)}
    memory.pipe_file("/base/model.safetensors", save({"m.weight": torch.zeros(2, 2)}))
    memory.pipe_file("/lora/adapter_config.json", json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}).encode())
    memory.pipe_file("/lora/adapter_model.safetensors", save(factors))
    source = open_source("memory://lora", base=open_source("memory://base"))
    assert isinstance(source, AdapterSource)
    assert source.origin.label == "memory://lora on memory://base"
    assert pickle.loads(pickle.dumps(source)).read("m.weight").tolist() == [[3, 3], [3, 3]]
    with pytest.raises(SourceError, match="memory://lora: a LoRA adapter, which needs a base model"):
        open_source("memory://lora")
    recipe = tmp_path / "lora.yaml"
    recipe.write_text("models: {a: memory://lora, b: {model: memory://lora, weight: 2}}\nmethod: linear\n")
    assert main(["lora", "merge", str(recipe), str(tmp_path / "made"), "--quiet"]) == 0
    made = open_source(tmp_path / "made", base=open_source("memory://base"))
    assert made.read("m.weight")[0, 0] > 0


def test_secrets_stay_out_of_what_is_written(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(web.files, "/m")
    address = web.address.replace("http://", "http://me:PASSWORD@")
    recipe = tmp_path / "r.yaml"
    text = "base: {0}/base?sig=SECRET\nmodels: {{a: {0}/a?sig=SECRET}}\nmethod: task_arithmetic\n"
    recipe.write_text(text.format(f"{address}/m"))
    assert main(["plan", str(recipe), "--json"]) == 0
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    said = capsys.readouterr()
    for text in (*written, said.out.encode(), said.err.encode()):
        assert b"SECRET" not in text
        assert b"PASSWORD" not in text
    assert b"/m/a?***" in (tmp_path / "out/weightsmith.json").read_bytes()


def test_no_card_and_no_manifest_holds_a_secret(tmp_path: Path) -> None:
    """Whatever verb asks for them."""
    recipe = {"base": "https://me:PASSWORD@host/m?sig=SECRET", "experts": [{"model": "s3://b/m?sig=SECRET"}]}
    card = model_card(title="x", models=[CardModel("a")], method="moe", recipe=recipe)
    manifest = build_manifest(tmp_path, recipe=recipe, inputs={}, keys=[], records=[], made_by={}, kind="moe")
    for text in (card, json.dumps(manifest)):
        assert "SECRET" not in text
        assert "PASSWORD" not in text
        assert "host/m?***" in text


def test_verbs_read_urls(memory: Any, capsys: pytest.CaptureFixture[str]) -> None:
    put_all(memory, "/m")
    assert main(["diff", "memory://m/a", "memory://m/a", "--quiet"]) == 0
    assert main(["diff", "memory://m/a", "memory://m/b", "--quiet"]) == 1
    assert main(["diff", "memory://m/a", "memory://m/none", "--quiet"]) == 2
    assert "memory://m/none: nothing is there" in capsys.readouterr().err


def test_nothing_asks_the_network_unless_a_url_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("fsspec was asked")

    monkeypatch.setattr(fsspec.core, "url_to_fs", asked)
    assert run(loads(TEXT.format(local(tmp_path))), tmp_path / "out").out == tmp_path / "out"
