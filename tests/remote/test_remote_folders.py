"""An output on a file system with folders, seen by other processes: fsspec's `dir`, over a folder of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from remote.conftest import folder_of, model
from weightsmith.core.errors import OutputError
from weightsmith.io.url import Url
from weightsmith.io.write.store import put
from weightsmith.jobs.merge import run
from weightsmith.jobs.verify import rerun
from weightsmith.recipe.load import loads


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    fsspec.config.conf["dir"] = {"path": str(tmp_path / "share"), "target_protocol": "file"}
    (tmp_path / "share").mkdir()
    yield tmp_path / "share"
    del fsspec.config.conf["dir"]


def test_folders_are_made_where_there_are_any(share: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        for file, data in folder_of(model(seed)).items():
            path = share / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    text = "base: {0}/base\nmodels: {{a: {0}/a, b: {0}/b}}\nmethod: linear\noutput: {{shard_size: 5000}}\n"
    run(loads(text.format("dir:/")), Path("dir://made/out"))
    near = run(loads(text.format(share)), tmp_path / "near").out
    assert isinstance(near, Path)
    made = {str(path.relative_to(share / "made/out")) for path in (share / "made/out").rglob("*") if path.is_file()}
    assert made == {str(path.relative_to(near)) for path in near.rglob("*") if path.is_file()}
    for path in near.rglob("*.safetensors"):
        assert (share / "made/out" / path.name).read_bytes() == path.read_bytes()
    assert rerun(Url("dir", "made/out")) == []


def test_a_bucket_is_never_made(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsmith.io.write.store._FOLDERLESS", ("dir",))
    with pytest.raises(OutputError, match="dir://bucket/x: no such file"):
        put(Url("dir", "bucket/x"), b"1")
    assert list(share.iterdir()) == []
