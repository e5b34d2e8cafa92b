"""One word for every input: whatever a user may call a model, as a Source."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import good_name
from weightsmith.core.lazy import torch
from weightsmith.io import system
from weightsmith.io.package.manifest import MANIFEST, MOST
from weightsmith.io.read.adapter import CONFIG as ADAPTER_CONFIG
from weightsmith.io.read.folder import INDEX, FolderSource
from weightsmith.io.read.gguf import GgufSource
from weightsmith.io.read.hub import PREFIX, looks_like_hub_id, open_hub
from weightsmith.io.read.lora_files import lora_kind, read_lora_file
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.pickle import PICKLES, PickleSource
from weightsmith.io.read.quantized import unquantised
from weightsmith.io.read.remote_source import open_url
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json, short
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.io.url import Url, parse_url

__all__ = ["Opener", "expanded", "folder_kind", "open_source", "register_opener"]

Opener = Callable[[Any, Source | None, str | None], Source]
"""(ref, base, expert) -> source."""

_openers: list[tuple[Callable[[Any], bool], Opener]] = []


def register_opener(accepts: Callable[[Any], bool], opener: Opener) -> None:
    """Teach `open_source` another kind of input (a compressed folder, a nested recipe).

    `accepts(ref)` is asked before anything else is tried, the latest registered first; a path arrives as
    a Path.  Registering the same pair again changes nothing.
    """
    if (accepts, opener) not in _openers:
        _openers.insert(0, (accepts, opener))


def folder_kind(path: Path) -> str | None:
    """The 'kind' in a folder's weightsmith.json ('merge', 'codec', ...), or None if it has none."""
    try:
        manifest = read_json(path / MANIFEST, MOST)
    except SourceError:
        return None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


def open_source(ref: Any, *, base: Source | None = None, expert: str | None = None) -> Source:
    """Open a model; nothing but headers is read.

    ref     a Source (returned as it is), a mapping of tensors, an nn.Module, or a str or Path: a folder, a
            .safetensors file or shard index, a PyTorch checkpoint, a PEFT folder (needs `base`), a compressed
            folder (`expert` says which model of it); a URL of such (s3://bucket/model), see `io.read.remote_source`;
            else `org/name[@revision]` on the hub
    Errors: SourceError, one line, for whatever cannot be opened or lies about itself.
    """
    url = parse_url(ref)
    if isinstance(url, Url) and not looks_like_hub_id(url.full):
        if expert is not None:
            raise SourceError(f"{url}: a compressed folder is read on this machine only; download it first")
        found = open_url(url, base)
        return found if isinstance(found, AdapterSource) else _model(found, base)
    if isinstance(ref, str):
        ref = url if isinstance(url, Path) else _path_or_id(ref)
    for accepts, opener in _openers:
        if accepts(ref):
            return opener(ref, base, expert)
    if isinstance(ref, Path) and folder_kind(ref) == "codec":
        raise SourceError(f"{ref}: a compressed folder, which nothing here can decode; restore it first")
    if expert is not None:
        raise SourceError(
            f"{_name(ref)}: expert {expert!r} was asked for, but this is one model, not a compressed folder"
        )
    if isinstance(ref, Source):
        return ref
    if isinstance(ref, Path):
        try:
            return _open_path(expanded(ref), base)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise SourceError(f"{short(str(ref))}: cannot be opened ({error.strerror})") from None
    if isinstance(ref, str):
        found = open_hub(ref, base)
        return found if isinstance(found, AdapterSource) else _model(found, base)
    if isinstance(ref, Mapping):
        return _memory(ref, "tensors in memory")
    if isinstance(ref, torch.nn.Module):
        return _memory(ref.state_dict(), type(ref).__name__)
    raise SourceError(
        f"cannot open a {type(ref).__name__} as a model; give a path, a hub id, a state dict or an nn.Module"
    )


def _path_or_id(ref: str) -> Path | str:
    """A Path, or the text itself if it is a hub id.  What exists here never goes to the hub."""
    if not ref.strip() or "\0" in ref:
        raise SourceError(f"{ref!r} is neither a path nor a hub id")
    path = expanded(Path(ref))
    try:
        there = path.exists()
    except OSError as error:
        raise SourceError(f"{short(ref)} cannot be looked up ({error.strerror})") from None
    return path if there or not looks_like_hub_id(ref) else ref


def expanded(path: Path) -> Path:
    """The path with ~ resolved, where there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:  # ~somebody who has no home here
        return path


def _open_path(path: Path, base: Source | None) -> Source:
    if path.is_dir():
        if not (path / ADAPTER_CONFIG).exists():
            return _model(FolderSource(path), base)
        if base is None:
            raise SourceError(f"{path}: a LoRA adapter, which needs a base model; give one under `base`")
        return AdapterSource(path, base)
    if not path.exists():
        hint = _near(path)
        if not hint and looks_like_hub_id(f"{PREFIX}{path}"):
            hint = f"; for the model on the hub write {PREFIX}{path}"
        raise SourceError(f"{path}: no such file or folder{hint}")
    if path.name.endswith(INDEX):
        return unquantised(FolderSource(path))
    if path.suffix == ".safetensors":
        return _model(SafetensorsSource(path), base)
    if path.suffix == ".gguf":
        return GgufSource(path)
    if path.suffix in PICKLES:
        return _model(PickleSource(path), base)
    known = ", ".join((".safetensors", ".gguf", *PICKLES))
    raise SourceError(f"{path}: unknown kind of file; give a model folder or one of {known}")


def _model(source: Source, base: Source | None) -> Source:
    """The model in a file or folder, or the one that `base` becomes with the LoRA that it turns out to hold."""
    kind = lora_kind(source.keys)
    if kind is None:
        return unquantised(source)
    if base is not None:
        return AdapterSource(read_lora_file(source), base)
    names = {"kohya": " with kohya's names", "diffusers": " as diffusers writes it"}.get(kind, "")
    raise SourceError(
        f"{source}: a LoRA file{names}, not a model: give the model that it was trained on under `base`, or "
        'combine it with others of its kind by "weightsmith lora merge"'
    )


def _near(path: Path) -> str:
    """The existing neighbour with the most similar name, as a question."""
    while not path.parent.exists():
        path = path.parent  # the first part of the path that is wrong
    try:
        names = system.call(os.listdir, path.parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _memory(tensors: Mapping[Any, Any], label: str) -> MemorySource:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(f"{label}: {name!r} is a {type(tensor).__name__}, not a tensor under a name")
        if not good_name(name):
            raise SourceError(f"{label}: {short(name)} is no name for a tensor (control characters, or too long)")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise SourceError(f"{label}: {name!r} is a sparse, quantized or empty-shell (meta) tensor")
    return MemorySource(tensors, label)


def _name(ref: Any) -> str:
    if isinstance(ref, Source):
        return ref.origin.label
    return str(ref) if isinstance(ref, (str, Path)) else type(ref).__name__
