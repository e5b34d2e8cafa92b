"""Single objects of a store: sent whole, read whole where they are small, removed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.read.files import File
from weightsmith.io.url import Url, attempt, filesystem, missing

__all__ = ["delete", "get_json", "put"]

_MARK = 1 << 30  # bytes of such a file, at most
_FOLDERLESS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf")


def put(url: Url, data: bytes | Path) -> None:
    """Send one object, whole, from memory or a file of this machine.

    Where the file system has folders (sftp, a mounted share) they are made; in a store there are none, and what is
    missing is the bucket, which nobody asked to be made.
    """
    fs, path = filesystem(url)

    def send() -> None:
        if isinstance(data, Path):
            fs.put_file(str(data), path)
        else:
            fs.pipe_file(path, data)

    def send_into_folder() -> None:
        try:
            send()
        except FileNotFoundError:
            if url.scheme in _FOLDERLESS:
                raise
            system.call(fs.makedirs, path.rpartition("/")[0], exist_ok=True)
            send()

    what = f"{url}: writing" + (f" {File(data).size} bytes" if isinstance(data, Path) else "")
    with missing(url, OutputError):
        attempt(what, OutputError, send_into_folder)


def get_json(url: Url) -> dict[str, Any]:
    """The object in a small JSON file of our own; OutputError for what is none."""
    fs, path = filesystem(url)
    with missing(url, OutputError):
        raw: bytes = attempt(f"{url}: reading", OutputError, fs.cat_file, path)
    try:
        found = json.loads(raw) if len(raw) <= _MARK else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"{url} is damaged; pass --overwrite to start anew")
    return found


def delete(out: Url, names: Iterable[str]) -> None:
    """Remove files of a folder, in this order."""
    for name in names:
        fs, path = filesystem(out / name)
        with missing(out / name, OutputError):
            attempt(f"{out / name}: removing", OutputError, fs.rm_file, path)
