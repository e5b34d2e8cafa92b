"""Stores to read from and write to: fsspec's in-memory one, and a web server of this machine with ranges."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save

from local_server import LocalHandler, LocalServer
from weightsmith.io import url
from weightsmith.io.read import remote


class Web(LocalServer):
    """Files by path.  `served` counts bytes per path, `asked` the ranges.

    lists   whether a folder's address gives a page of links
    faults  status codes for the next answers to GET of files, in turn
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.tags: dict[str, str] = {}
        self.lists = True
        self.faults: list[int] = []


class _Handler(LocalHandler):
    server: Web

    def respond(self) -> None:
        path = self.path.partition("?")[0]
        if path not in self.server.files:
            inside = sorted({f.removeprefix(f"{path.rstrip('/')}/").split("/")[0] for f in self.server.files
                             if f.startswith(f"{path.rstrip('/')}/")})  # fmt: skip
            if inside and self.server.lists:
                links = "".join(f'<a href="{path.rstrip("/")}/{name}">{name}</a>' for name in inside)
                return self.answer(200, f"<html>{links}<a href='http://elsewhere/x'>x</a></html>".encode(), "text/html")
            return self.answer(404, b"")
        if self.command == "GET" and self.server.faults:
            return self.answer(self.server.faults.pop(0), b"not now")
        data, asked = self.server.files[path], self.headers.get("Range", "")
        if not asked or not self.server.ranges:
            return self.answer(200, data, count=path)
        self.server.asked.append((path, asked))
        first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        return self.answer(206, data[first : last + 1], count=path, at=(first, len(data)))

    def answer(
        self, status: int, body: bytes, kind: str = "application/octet-stream", count: str = "",
        at: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")  # a connection that outlives its server would meet the next test
        if count:
            self.send_header("ETag", self.server.tags.get(count, '"1"'))
        if at is not None:
            self.send_header("Content-Range", f"bytes {at[0]}-{at[0] + len(body) - 1}/{at[1]}")
        self.end_headers()
        if self.command == "GET":
            for start in range(0, len(body), 65536):
                self.wfile.write(body[start : start + 65536])
                self.server.served[count] += len(body[start : start + 65536])


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    remote.forget()


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in this process, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    remote.forget()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url, "_PAUSE", 0.0)


def model(seed: int, layers: int = 4, rows: int = 40) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(rows, 30, generator=draw) for i in range(layers)}
    return {name: tensor.bfloat16() for name, tensor in made.items()}


def folder_of(tensors: Mapping[str, torch.Tensor], shards: int = 1) -> dict[str, bytes]:
    """The files of a model folder."""
    files = {"config.json": b'{"model_type": "x"}', "README.md": b"---\nlicense: mit\n---\n", "notes/a.txt": b"hello"}
    if shards == 1:
        return {**files, "model.safetensors": save(dict(tensors))}
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    where = {name: f"m-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    return files | {f"m-{i}.safetensors": save({n: tensors[n] for n in part}) for i, part in enumerate(parts)}
