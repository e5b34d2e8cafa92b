"""A folder with small models, and a client that holds the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from studio_kit import HOME, PORT, TOKEN, small_folder

from weightsmith.studio.app import build


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's key lies elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "home")


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the studio sets for its process
    with TestClient(build((folder,), TOKEN, PORT), base_url=HOME, follow_redirects=False) as made:
        assert made.get("/", params={"token": TOKEN}).status_code == 303
        made.headers["origin"] = HOME
        yield made
