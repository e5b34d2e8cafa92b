"""Outputs in a store without renames and without writes at offsets: what is there when, and after what."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remote.conftest import folder_of, model
from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, PlanError, SourceError
from weightsmith.core.keys import Key
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.open import open_source
from weightsmith.io.url import Url
from weightsmith.io.write.upload import UrlSink
from weightsmith.jobs.merge import run
from weightsmith.jobs.sweep import run_sweep
from weightsmith.jobs.verify import rerun
from weightsmith.recipe.load import loads

OUT = Path("memory://store/out")
TEXT = "base: {0}/base\nmodels: {{a: {0}/a, b: {0}/b}}\nmethod: {1}\noutput: {{shard_size: 5000}}\n"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        for file, data in folder_of(model(seed, layers=8)).items():
            path = tmp_path / "models" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "models"


def stored(memory: Any) -> dict[str, bytes]:
    return {name: memory.cat_file(name) for name in memory.find("/store/out")}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {f"/store/out/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def left_here() -> list[str]:
    gc.collect()  # what a stopped worker has left goes with it
    return [path.name for path in Path(tempfile.gettempdir()).glob("weightsmith-out*")]


def failing(
    monkeypatch: pytest.MonkeyPatch, memory: Any, at: int, error: BaseException, times: int = 1000
) -> list[str]:
    """Let the n-th upload and those after it fail; returns what was sent."""
    sent: list[str] = []
    tries = 0
    for method in ("put_file", "pipe_file"):
        real = getattr(type(memory), method)

        def put(self: Any, *args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            nonlocal tries
            tries += 1
            if at <= tries < at + times:
                raise error
            sent.append(next(str(arg) for arg in args if str(arg).startswith("/store")))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(memory), method, put)
    return sent


@pytest.mark.parametrize("method", ["ties", "weight_matching", "linear"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_files_as_on_a_disk(models: Path, memory: Any, tmp_path: Path, method: str, threads: int) -> None:
    recipe = loads(TEXT.format(models, method))
    near = run(recipe, tmp_path / "near", threads=1).out
    assert isinstance(near, Path)
    result = run(recipe, OUT, threads=threads)
    assert str(result.out) == "memory://store/out"
    assert stored(memory) == on_disk(near)
    assert left_here() == []
    assert open_source("memory://store/out").keys == open_source(near).keys


def test_the_manifest_is_the_last_thing_sent(models: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = failing(monkeypatch, memory, at=10**6, error=OSError())
    run(loads(TEXT.format(models, "ties")), OUT)
    assert sent[0] == "/store/out/.weightsmith/run.json"
    assert sent[-1] == "/store/out/weightsmith.json"
    index = sent.index("/store/out/model.safetensors.index.json")
    assert all(sent.index(name) < index for name in sent if name.endswith(".safetensors"))
    assert not any(".weightsmith" in name for name in stored(memory))


def test_a_run_stopped_at_any_upload_looks_unfinished_and_is_resumed(
    models: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As after SIGKILL: nothing is cleared away in the store, and the disk here keeps what was under work."""
    recipe = loads(TEXT.format(models, "ties"))
    want = on_disk(run(recipe, tmp_path / "near", threads=1).out)  # type: ignore[arg-type]
    uploads = 4 + 2 * len([name for name in want if name.endswith(".safetensors")]) + 1
    resumed = []
    for at in range(1, uploads):
        with monkeypatch.context() as patch:
            failing(patch, memory, at, KeyboardInterrupt())
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, OUT, threads=1)
        assert "/store/out/weightsmith.json" not in stored(memory)
        with pytest.raises(SourceError, match=r"not finished|nothing is there"):
            open_source(str(OUT))
        if stored(memory):
            with pytest.raises(PlanError, match="a previous run was interrupted; pass --resume"):
                run(recipe, OUT)
        with monkeypatch.context() as patch:
            again = failing(patch, memory, 10**6, OSError())
            run(recipe, OUT, resume=True, threads=1)
            resumed.append(sum(name.endswith(".safetensors") for name in again))
        assert stored(memory) == want
        memory.store.clear()
    shards = sum(name.endswith(".safetensors") for name in want)
    assert resumed[0] == shards
    assert resumed[-1] == 0, "what is up is not sent again"
    assert sorted(resumed, reverse=True) == resumed
    run(recipe, OUT)
    assert run(recipe, OUT, resume=True).seconds < 5, "a finished output is left as it is"


def test_uploads_that_fail_are_tried_again_and_then_one_line(
    models: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = loads(TEXT.format(models, "ties"))
    with monkeypatch.context() as patch:
        failing(patch, memory, 3, OSError("reset by peer"), times=3)
        run(recipe, OUT)
    memory.store.clear()
    with monkeypatch.context() as patch:
        failing(patch, memory, 4, OSError("reset by peer"))
        with pytest.raises(
            OutputError, match=r"memory://store/out/.* failed 4 times \(OSError: reset by peer\)"
        ) as error:
            run(recipe, OUT)
    assert "\n" not in str(error.value)
    assert left_here() == []


def test_what_stands_in_the_way(models: Path, memory: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = loads(TEXT.format(models, "ties"))
    memory.pipe_file("/store/out/mine.txt", b"mine")
    with pytest.raises(PlanError, match="memory://store/out exists and is not empty; choose another folder or pass"):
        run(recipe, OUT)
    run(recipe, OUT, overwrite=True)
    assert "/store/out/mine.txt" not in stored(memory)
    again = loads(TEXT.format("memory://store", "ties").replace("/base", "/out"))
    with pytest.raises(PlanError, match="memory://store/out is also an input; choose another output folder"):
        run(again, OUT, overwrite=True)
    for out, text in {
        "memory://store": "holds an input, out",
        "memory://store/out/in": "lies inside an input, out",
    }.items():
        with pytest.raises(PlanError, match=text):
            run(again, Path(out), overwrite=True)
    with pytest.raises(OutputError, match="web addresses are for reading"):
        run(recipe, Path("https://host/out"))
    with pytest.raises(OutputError, match="this is written to folders of this machine only"):
        run_sweep({"a": recipe, "b": recipe}, OUT)
    words = ["lora", "extract", str(models / "a"), str(OUT), "--base", str(models / "base"), "--rank", "2"]
    assert main(words) == 2
    assert "memory://store/out: this is written to folders of this machine only" in capsys.readouterr().err
    assert not Path("memory:").exists()


def test_resume_asks_for_the_same_run(models: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loads(TEXT.format(models, "ties"))
    with monkeypatch.context() as patch:
        failing(patch, memory, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(recipe, OUT, threads=1)
    other = loads(TEXT.format(models, "linear"))
    with pytest.raises(OutputError, match=r"cannot resume memory://store/out: since it was begun, recipe \(method\)"):
        run(other, OUT, resume=True)
    run(other, OUT, overwrite=True)
    assert rerun(Url("memory", "store/out")) == []


def sink(**options: Any) -> UrlSink:
    made = UrlSink(Url("memory", "store/out"), shard_size=100, identity={"recipe": {}, "inputs": {}}, **options)
    made.begin([Key("w", (2, 3), "bfloat16"), Key("v", (50,), "bfloat16")])
    return made


def test_two_runs_on_one_output(memory: Any, models: Path) -> None:
    first = sink()
    with pytest.raises(OutputError, match=r"is in use by process \d+ on host"):
        sink(overwrite=True)
    rows = np.zeros((2, 3), np.uint16)
    first.write("w", 0, rows)
    first.done("w:0", {"parts": [["w", 0, 2, ""]]})
    first.write("v", 0, np.zeros(50, np.uint16))
    first.done("v:0", {"parts": [["v", 0, 50, ""]]})
    # Another machine, whose locks are its own, takes the place over.
    memory.pipe_file("/store/out/.weightsmith/run.json", json.dumps({"token": "another"}).encode())

    with pytest.raises(OutputError, match="another run has taken this place over"), first.finishing() as folder:
        (folder / "weightsmith.json").write_text("{}")
    assert "/store/out/weightsmith.json" not in stored(memory)
    assert left_here() == []


def test_a_task_over_two_files_counts_when_both_are_up(memory: Any, models: Path) -> None:
    first = sink()
    record = {"parts": [["w", 0, 2, ""], ["v", 0, 50, ""]]}
    first.write("w", 0, np.zeros((2, 3), np.uint16))
    first.write("v", 0, np.zeros(50, np.uint16))
    first.done("both", record)
    first.abort()
    memory.rm_file("/store/out/.weightsmith/model-00002-of-00002.safetensors.json")
    second = sink(resume=True)
    assert second.completed() == {}
    assert len(second.writer().shards) == 2, "the other file of the task is written again"
    second.abort()


class Elsewhere:
    """A runner that passes everything through pickle, as one in another process must."""

    remote = True

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        sent = pickle.dumps(function)
        for task in tasks:
            yield pickle.loads(pickle.dumps(pickle.loads(sent)(pickle.loads(pickle.dumps(task)))))


@pytest.mark.parametrize("method", ["ties", "weight_matching"])
def test_workers_elsewhere_send_whole_files(
    models: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    for name in ("base", "a", "b"):
        for path in (models / name).rglob("*.*"):
            memory.pipe_file(f"/m/{name}/{path.relative_to(models / name)}", path.read_bytes())
    recipe = loads(TEXT.format("memory://m", method))
    near = run(recipe, tmp_path / "near", threads=1).out
    assert isinstance(near, Path)
    monkeypatch.setattr("weightsmith.engine.cluster.ray_runner", lambda *_, **__: nullcontext(Elsewhere()))
    with monkeypatch.context() as patch:
        failing(patch, memory, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(recipe, OUT, ray="somewhere")
    run(recipe, OUT, ray="somewhere", resume=True)
    assert stored(memory) == on_disk(near)
    assert left_here() == []


def test_verify_finds_what_was_altered(
    models: Path, memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(TEXT.format(models, "ties"))
    assert main(["merge", str(tmp_path / "r.yaml"), str(OUT)]) == 0
    assert "wrote memory://store/out: " in capsys.readouterr().out
    assert main(["verify", "memory://store/out", "--rerun"]) == 0
    name = next(name for name in stored(memory) if name.endswith(".safetensors"))
    data = bytearray(memory.cat_file(name))
    data[-1] ^= 1
    memory.pipe_file(name, bytes(data))
    memory.pipe_file("/store/out/extra/more.txt", b"x")
    memory.rm_file("/store/out/config.json")
    assert main(["verify", "memory://store/out"]) == 2
    said = capsys.readouterr().out
    assert "config.json is missing" in said
    assert "extra/more.txt was not there" in said
    assert "was altered" in said


def test_a_pipeline_of_folders_is_written_and_leaves_no_marks(memory: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    part = "0_Router/query_0_StaticEmbedding"  # as deep as any
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name / part).mkdir(parents=True)
        tensors = {f"{i}.weight": torch.full((4, 2), value) for i in range(3)}
        save_file(tensors, tmp_path / name / part / "model.safetensors")
        listed = [{"path": "0_Router", "type": "sentence_transformers.models.Router"}]
        (tmp_path / name / "modules.json").write_text(json.dumps(listed))
    tree = {"models": {name: str(tmp_path / name) for name in "ab"}, "method": "linear", "output": {"shard_size": 32}}
    run(loads(json.dumps(tree), "r.json"), Path("memory://store/parts"))
    names = [name.removeprefix("/store/parts/") for name in memory.find("/store/parts")]
    assert not [name for name in names if name.startswith(".weightsmith")]
    assert sum(name.startswith(f"{part}/model-0000") for name in names) == 3
    assert f"{part}/model.safetensors.index.json" in names
    assert not verify_folder(Url("memory", "store/parts"))
