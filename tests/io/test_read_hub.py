"""The hub, played by a server on 127.0.0.1 that counts the bytes it serves."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file

from local_server import LocalHandler, LocalServer
from weightsmith.core.errors import SourceError
from weightsmith.io.read.hub import HubSource, looks_like_hub_id, open_hub
from weightsmith.io.read.open import open_source
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.source import MemorySource

SHA = "a" * 40


class Hub(LocalServer):
    """Repositories by name, each a map from file name to bytes; `served` counts bytes per file."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.repos: dict[str, dict[str, bytes]] = {}


class Handler(LocalHandler):
    server: Hub

    def respond(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    def info(self, repo: str, revision: str) -> None:
        if repo not in self.server.repos:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", SHA):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [described(name, data) for name, data in self.server.repos[repo].items()]
        return self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": files}).encode(), {})

    def file(self, repo: str, name: str) -> None:
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        facts = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "X-Linked-Size": str(len(data))}
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes=") or not self.server.ranges:
            return self.answer(200, data, facts, count=name)
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        facts["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.answer(206, part, facts, count=name)

    def answer(self, status: int, body: bytes, headers: dict[str, str], count: str = "") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), 65536):
            self.wfile.write(body[start : start + 65536])
            if count:
                self.server.served[count] += len(body[start : start + 65536])


def described(name: str, data: bytes) -> dict[str, object]:
    """As the hub does: of weight files, which are in its large-file store, it states the SHA-256."""
    noted: dict[str, object] = {"rfilename": name, "size": len(data)}
    if name.endswith((".safetensors", ".bin")):
        noted["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return noted


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


WEIGHTS = {"w": torch.arange(500_000, dtype=torch.float32), "b": torch.ones(3)}


def whole() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "x"}',
        "tokenizer.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "README.md": b"hello",
        "model.safetensors": save(WEIGHTS),
        "pytorch_model.bin": b"never fetched",
        "onnx/model.onnx": b"never fetched",
        ".gitattributes": b"",
    }


def test_planning_reads_headers_only_and_reading_downloads(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/name"] = whole()
    size = len(hub.repos["org/name"]["model.safetensors"])
    source = open_hub("org/name@v1", endpoint=hub.address, cache=tmp_path)
    assert isinstance(source, HubSource)
    assert source.keys["w"].shape == (500_000,)
    assert source.origin.label == "org/name@v1"
    assert source.origin.folder is not None
    assert (source.origin.folder / "config.json").read_text() == '{"model_type": "x"}'
    assert hub.served["model.safetensors"] <= 100_000 < size / 10
    assert set(hub.served) == {"model.safetensors", "config.json"}
    rest = ("tokenizer.json", "1_Pooling/config.json", "README.md")
    assert source.origin.cost.download == size + sum(len(hub.repos["org/name"][name]) for name in rest)
    facts = source.fingerprint()
    assert (facts["hub"], facts["commit"]) == ("org/name", SHA)
    assert json.dumps(facts)
    unread = pickle.loads(pickle.dumps(source))

    assert source.read("w", 5, 8).tolist() == [5, 6, 7]
    assert source.origin.cost.download == 0
    folder = source.origin.folder
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present == {"config.json", "model.safetensors", *rest}
    before = dict(hub.served)
    assert source.bits("b").shape == (3,)
    unread.prepare()
    assert unread.read("b").tolist() == [1, 1, 1]
    assert hub.served == before, "what is in the cache is not fetched again"


def test_files_in_the_cache_that_change_during_a_run(hub: Hub, tmp_path: Path) -> None:
    """The fingerprint of a commit stays what it is; the downloaded files are looked at all the same."""
    hub.repos["org/name"] = whole()
    source = open_hub("org/name", endpoint=hub.address, cache=tmp_path)
    before = source.fingerprint()
    digest = hashlib.sha256(hub.repos["org/name"]["model.safetensors"]).hexdigest()
    assert before["files"]["model.safetensors"]["sha256"] == digest
    source.prepare()
    assert source.fingerprint() == before
    assert source.origin.folder is not None
    blob = (source.origin.folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(SourceError, match="was changed or exchanged since it was opened"):
        source.fingerprint()


def test_a_server_that_ignores_ranges_is_cut_short(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    many = {f"some.rather.long.name.of.a.tensor.{i}": torch.ones(1) for i in range(1500)}  # a header over 100 kB
    hub.repos["org/name"] = {"model.safetensors": save({**many, "w": torch.zeros(10_000_000)})}
    source = open_hub("org/name", endpoint=hub.address, cache=tmp_path)
    assert len(source.keys) == 1501
    assert hub.served["model.safetensors"] < len(hub.repos["org/name"]["model.safetensors"]) / 2


def test_a_long_header_takes_a_second_range(hub: Hub, tmp_path: Path) -> None:
    many = {f"some.rather.long.name.of.a.tensor.{i}": torch.ones(1) for i in range(1500)}
    hub.repos["org/name"] = {"model.safetensors": save(many)}
    assert set(open_hub("org/name", endpoint=hub.address, cache=tmp_path).keys) == set(many)


def test_shards_are_planned_and_checked_like_a_folder(hub: Hub, tmp_path: Path) -> None:
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    files = {
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "m-1.safetensors": save({"a": torch.ones(2)}),
        "m-2.safetensors": save({"b": torch.zeros(2)}),
    }
    hub.repos["org/name"] = files
    source = open_hub("org/name", endpoint=hub.address, cache=tmp_path)
    assert list(source.keys) == ["a", "b"]
    assert source.read("a").tolist() == [1, 1]
    hub.repos["org/short"] = {name: data for name, data in files.items() if name != "m-2.safetensors"}
    with pytest.raises(SourceError, match=r"1 of 2 shards are missing: m-2\.safetensors"):
        open_hub("org/short", endpoint=hub.address, cache=tmp_path)
    hub.repos["org/lies"] = {**files, "m-2.safetensors": save({"a": torch.zeros(2)})}
    with pytest.raises(SourceError, match="'a' is stored twice"):
        open_hub("org/lies", endpoint=hub.address, cache=tmp_path)


def test_an_adapter_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    factors = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(2, 1)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3}
    hub.repos["org/lora"] = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(factors),
    }
    base = MemorySource({"m.weight": torch.zeros(2, 2)}, "base")
    source = open_hub("org/lora", base, endpoint=hub.address, cache=tmp_path)
    assert isinstance(source, AdapterSource)
    assert source.read("m.weight").tolist() == [[3, 3], [3, 3]]
    with pytest.raises(SourceError, match="org/lora: a LoRA adapter, which needs a base model"):
        open_hub("org/lora", endpoint=hub.address, cache=tmp_path)


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/name"] = whole()
    hub.repos["org/pickled"] = {"pytorch_model.bin": b"x"}
    hub.repos["org/none"] = {"README.md": b"x"}
    hub.repos["org/broken"] = {"model.safetensors": b"\xff" * 200}
    for ref, text in {
        "org/other": "org/other: no such model on the hub",
        "org/name@v9": "org/name: no revision 'v9' on the hub",
        "org/pickled": "org/pickled: has only pickled weights",
        "org/none": "org/none: no model here",
        "org/broken": r"org/broken/model\.safetensors: not a safetensors file",
    }.items():
        with pytest.raises(SourceError, match=text) as error:
            open_hub(ref, endpoint=hub.address, cache=tmp_path)
        assert "\n" not in str(error.value)


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = whole()
    open_hub("org/name", endpoint=hub.address, cache=tmp_path / "planned")
    read = open_hub("org/name", endpoint=hub.address, cache=tmp_path / "read")
    read.prepare()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for cache in ("empty", "planned"):  # configs alone are no model
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set; unset it, or give a local folder") as error:
            open_hub("org/name", endpoint=hub.address, cache=tmp_path / cache)
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
            open_hub(f"org/name@{SHA}", endpoint=hub.address, cache=tmp_path / cache)
        assert "\n" not in str(error.value)
    for ref in ("org/name", f"org/name@{SHA}"):
        source = open_hub(ref, endpoint=hub.address, cache=tmp_path / "read")
        assert source.origin.label == ref
        assert source.read("b").tolist() == [1, 1, 1]


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SourceError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached .*give a local folder"):
        open_hub("org/name", endpoint="http://127.0.0.1:9", cache=tmp_path)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("org/name", True),
        ("org/name@main", True),
        ("org/name@refs/pr/1", True),
        ("Qwen/Qwen3-0.6B", True),
        ("hf://org/name", True),
        ("./org/name", False),
        ("../name", False),
        ("/org/name", False),
        ("~/name", False),
        ("~org/name", False),
        (".org/name", False),
        ("a/b/c", False),
        ("name", False),
        ("org/", False),
        ("org/na me", False),
        ("org\\name", False),
        ("hf://a/b/c", False),
        ("models/math", False),  # there is a local folder `models`
        ("hf://models/math", True),
    ],
)
def test_what_can_be_a_hub_id(ref: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(ref) is expected


def test_local_names_never_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("weightsmith.io.read.hub.open_hub", reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file({"w": torch.ones(1)}, tmp_path / "org" / "name" / "model.safetensors")
    assert open_source("org/name").read("w").item() == 1
    for ref in ("org/nmae", "./a/b", "/a/b", "~/no-such-folder-here", "a/b/c", "name"):
        with pytest.raises(SourceError, match="no such file or folder"):
            open_source(ref)
    with pytest.raises(AssertionError, match="the hub was asked"):
        open_source("other/name")
