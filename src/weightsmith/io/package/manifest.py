"""weightsmith.json: what a folder was made from, and checksums of all that is in it.

Holds nothing that changes between two equal runs (no time unless asked for, no host, no path of the output).
Checksums are xxh3 with 128 bits: they find damage, not forgery.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from weightsmith import __version__
from weightsmith.core.errors import OutputError, SourceError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.io import system
from weightsmith.io.disk import write_file
from weightsmith.io.read.files import File, Ranged
from weightsmith.io.read.remote import RemoteFile
from weightsmith.io.read.safetensors import Header, read_header
from weightsmith.io.read.small import parse_json, refuse_above
from weightsmith.io.url import Url, place_of, stored_at, without_secrets

__all__ = [
    "MANIFEST",
    "MOST",
    "build_manifest",
    "lock_of",
    "merge_parts",
    "read_manifest",
    "story",
    "verify_folder",
    "write_manifest",
]

MANIFEST = "weightsmith.json"
MOST = 200_000_000
"""Bytes of a manifest that are read: a line for each tensor, more for large ones."""

_DEEPEST = 8  # levels of folders that are looked into at a URL
_NONE: Mapping[str, Any] = {}
_SUM = "xxh3_128"  # of the manifest itself, without this field

Parts = Mapping[str, Sequence[tuple[int, int, str]]]


def merge_parts(records: Iterable[Mapping[str, Any]], keys: Iterable[Key]) -> Parts:
    """Tensor -> its (first row, end row, checksum) in order, from records {"parts": [[name, row0, row1, hex]]}.

    Raises OutputError where the parts leave a row of a tensor out, or hold one twice.
    """
    parts: dict[str, list[tuple[int, int, str]]] = {key.name: [] for key in keys}
    rows = {key.name: key.rows for key in keys}
    for record in records:
        for name, start, stop, digest in record["parts"]:
            parts[name].append((start, stop, digest))
    for name, found in parts.items():
        found.sort()
        ends = [0, *(stop for _, stop, _ in found)]
        starts = [*(start for start, _, _ in found), rows[name]]
        if starts != ends:
            raise OutputError(f"{name}: the parts written, {found}, do not make up its {rows[name]} rows; run it again")
    return parts


def build_manifest(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Any],
    keys: Sequence[Key],
    records: Iterable[Mapping[str, Any]],
    made_by: Mapping[str, str],
    licences: Mapping[str, str] = _NONE,
    companions: Mapping[str, Any] = _NONE,
    kind: str = "merge",
    created: str | None = None,
    stores: Mapping[str, str] = _NONE,
) -> dict[str, Any]:
    """Describe a finished folder (all files but the manifest are in it) as plain JSON values.

    recipe      as the user wrote it; what addresses in it keep to themselves is left out
    inputs      model's name -> fingerprint
    keys        the output's tensors, in plan order
    records     of all tasks; their parts must make up every tensor
    made_by     tensor -> how it was made ('ties(density=0.2)', 'copied from base')
    companions  what has become of the files beside the weights
    stores      beginning of tensors' names -> how the names of their files begin, where that is not 'model'
    created     a time to note; by default the one in SOURCE_DATE_EPOCH, or none
    """
    parts = merge_parts(records, keys)
    how: dict[str, list[str]] = {}
    for key in keys:
        how.setdefault(made_by[key.name], []).append(key.name)
    manifest: dict[str, Any] = {
        "weightsmith": __version__,
        "kind": kind,
        "recipe": without_secrets(recipe),
        "inputs": inputs,
        "licences": licences,
        "companions": companions,
        "made_by": how,
        "versions": _versions(),
        "output": {
            "files": {name: _describe(File(folder / name), name, _inner(stores)) for name in _files(folder)},
            "tensors": {key.name: {"dtype": key.dtype, "shape": key.shape, "parts": parts[key.name]} for key in keys},
        },
    }
    if _inner(stores):
        manifest["output"]["stores"] = _inner(stores)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if created is None and epoch is not None:
        created = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    if created is not None:
        manifest["created"] = created
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest, with a checksum of its own, and return its path."""
    return write_file(folder / MANIFEST, _text({**manifest, _SUM: _own_sum(manifest)}))


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def read_manifest(out: Path | Url) -> dict[str, Any]:
    """Read and check the manifest of an output; OutputError if there is none or one bit of it was changed."""
    path = out / MANIFEST
    if MANIFEST not in stored_at(out, OutputError, depth=1) if isinstance(out, Url) else not (out / MANIFEST).exists():
        raise OutputError(f"cannot read {path}: No such file or directory; was this folder made by weightsmith?")
    try:
        file = _file(out, MANIFEST)
        raw = file.read(0, refuse_above(file, MOST)).tobytes()
        noted = parse_json(raw, str(path))
        manifest: dict[str, Any] = {name: value for name, value in noted.items() if name != _SUM}
        # The bytes too: 1e-05 and 1E-05 differ by a bit and mean the same.
        intact = noted[_SUM] == _own_sum(manifest) and raw == _text(noted).encode() and _well_formed(manifest)
    except (SourceError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise OutputError(f"{path} is damaged or was edited: it does not match its own checksum")
    return manifest


def story(folder: Path) -> dict[str, Any]:
    """What the manifest of an input says of how it was made, for that of the output: it is there when the input is not.

    {} where it has none, or a damaged one.
    """
    try:
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    except OutputError:
        return {}
    return {part: manifest[part] for part in ("weightsmith", "kind", "recipe", "made_from") if part in manifest}


def lock_of(folder: Path | None) -> dict[str, Any]:
    """What the manifest of a folder says of its lock; {} where it is not locked, or has no manifest."""
    try:
        manifest = read_manifest(folder) if folder is not None and (folder / MANIFEST).is_file() else {}
    except OutputError:
        return {}
    noted = manifest.get("lock")
    return noted if manifest.get("kind") == "lock" and isinstance(noted, dict) else {}


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether what `verify` reads has its form: a checksum that fits says only that nobody changed it by accident."""
    if not all(isinstance(manifest[part], dict) for part in ("recipe", "inputs")) or type(manifest["kind"]) is not str:
        return False
    for noted in manifest["output"]["files"].values():
        if not _count(noted["bytes"]) or not isinstance(noted.get("header", noted.get(_SUM)), str):
            return False
    if not all(isinstance(stem, str) for stem in manifest["output"].get("stores", {}).values()):
        return False
    for noted in manifest["output"]["tensors"].values():
        if noted["dtype"] not in DTYPES or not all(map(_count, noted["shape"])):
            return False
        if not all(_count(start) and _count(stop) and isinstance(sum_, str) for start, stop, sum_ in noted["parts"]):
            return False
    return True


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def verify_folder(out: Path | Url, progress: Callable[[int], object] = lambda count: None) -> list[str]:
    """Return everything that is not as it was written, a line each: files missing, added, cut or altered.

    Reads every byte once, in blocks.  `progress` is called with the bytes of each part when it has been read.
    Raises OutputError if the manifest itself cannot be trusted.
    """
    out = place_of(out) if isinstance(out, Path) else out
    output = read_manifest(out)["output"]
    wanted, found, stores = output["files"], set(_files(out)), output.get("stores", {})
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} was not there when the folder was written" for name in sorted(found - set(wanted))]
    places: dict[str, tuple[Ranged, int]] = {}
    for name, noted in wanted.items():
        if name not in found:
            continue
        if isinstance(out, Path) and not (out / name).is_file():
            problems.append(f"{name} is no file any more")
            continue
        file = _file(out, name)
        if file.size != noted["bytes"]:
            problems.append(f"{name} has {file.size} bytes instead of {noted['bytes']}")
        elif "header" not in noted:
            if _describe(file, name, stores) != noted:
                problems.append(f"{name} was altered")
        elif (header := _header(file)) is None or header.digest != noted["header"]:
            problems.append(f"{name} was altered in its header")
        else:
            prefix = next((prefix for prefix, stem in stores.items() if name.startswith(stem)), "")
            places |= {prefix + tensor: (file, place.offset) for tensor, place in header.tensors.items()}

    def check(item: tuple[str, Any]) -> list[str]:
        tensor, noted = item
        if tensor not in places:  # its file is among the problems already
            return []
        file, offset = places[tensor]
        return [
            f"{file.location.name}: tensor {tensor}, rows {start} to {stop}, was altered"
            for start, stop, begin, count, digest in _spans(Key(tensor, tuple(noted["shape"]), noted["dtype"]), noted)
            if _altered(file, offset + begin, count, digest, progress)
        ]

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for texts in pool.map(check, output["tensors"].items()):
            problems += texts
    return problems


def _spans(key: Key, noted: Mapping[str, Any]) -> Iterator[tuple[int, int, int, int, str]]:
    """(first row, end row, first byte, bytes, checksum) of each part of a tensor."""
    width = key.row_numel * DTYPES[key.dtype].itemsize
    for start, stop, digest in noted["parts"]:
        yield start, stop, start * width, (stop - start) * width, digest


def _altered(file: Ranged, offset: int, count: int, digest: str, progress: Callable[[int], object]) -> bool:
    found = file.digest(offset, count)
    progress(count)
    return found != digest


def _files(folder: Path | Url) -> list[str]:
    """Relative names of all files but the manifest; a clone's .git and a download's .cache are not looked at."""
    if isinstance(folder, Url):
        names = [PurePosixPath(name) for name in stored_at(folder, OutputError, depth=_DEEPEST)]
    else:
        paths = [path for path in system.call(list, folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
        names = [PurePosixPath(path.relative_to(folder)) for path in paths]
    kept = (name.as_posix() for name in names if name.parts[0] not in (".git", ".cache"))
    return sorted(name for name in kept if name != MANIFEST)


def _file(folder: Path | Url, name: str) -> Ranged:
    return RemoteFile(folder / name) if isinstance(folder, Url) else File(folder / name)


def _inner(stores: Mapping[str, str]) -> dict[str, str]:
    """The stores that lie in folders of their own."""
    return {prefix: stem for prefix, stem in stores.items() if "/" in stem}


def _describe(file: Ranged, name: str, stores: Mapping[str, str]) -> dict[str, Any]:
    """Size and checksum of a file.

    The merged shards lie at the top or in `stores`, and their tensors have checksums of their own: of these, only the
    header is hashed.
    """
    if name.endswith(".safetensors") and ("/" not in name or name.startswith(tuple(stores.values()))):
        return {"bytes": file.size, "header": read_header(file).digest}
    return {"bytes": file.size, _SUM: file.digest()}


def _header(file: Ranged) -> Header | None:
    try:
        return read_header(file)
    except SourceError:
        return None


def _own_sum(manifest: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode()))


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("torch", "numpy")} | {"python": platform.python_version()}


def _version(package: str) -> str:
    """The installed version, by the name of its dist-info folder: importlib.metadata is long to import."""
    found = find_spec(package)
    home = Path(found.origin).parents[1] if found is not None and found.origin is not None else Path()
    folders = system.call(list, home.glob(f"{package}-*.dist-info"))
    named = [path.name.removesuffix(".dist-info") for path in folders]
    if len(named) == 1:
        return named[0].removeprefix(f"{package}-")
    from importlib import metadata

    return metadata.version(package)
