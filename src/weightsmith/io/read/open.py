"""One word for every input: whatever a user may call a model, as a Source.

FORMATS lists all kinds of input in the order in which they are tried, CONTENTS what the tensors of one may turn out to
be.  A format's module is imported when it is met.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import NoBaseError, SourceError
from weightsmith.core.keys import good_name
from weightsmith.core.lazy import torch
from weightsmith.io import system
from weightsmith.io.package.manifest import MANIFEST, MOST
from weightsmith.io.read.adapter import CONFIG as ADAPTER_CONFIG
from weightsmith.io.read.adapter import HINTS, UNREAD_HINTS
from weightsmith.io.read.folder import INDEX, FolderSource, shard_of
from weightsmith.io.read.hub import PREFIX, looks_like_hub_id
from weightsmith.io.read.pickle import PICKLES
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json, short
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.io.url import Url, parse_url

__all__ = ["CONTENTS", "ENDINGS", "FORMATS", "Asked", "Format", "expanded", "folder_kind", "open_source"]


@dataclass(frozen=True)
class Asked:
    """What `open_source` was asked for.

    ref     a Path (with ~ resolved), Url, hub id, mapping of tensors, nn.Module or Source
    base    the model that an adapter changes
    expert  which model of several
    """

    ref: Any
    base: Source | None = None
    expert: str | None = None

    def __str__(self) -> str:
        return str(self.ref) if isinstance(self.ref, (str, Path, Url, Source)) else type(self.ref).__name__


@dataclass(frozen=True)
class Format:
    """A kind of input.

    name     what it is
    accepts  whether a ref is one, as names, endings and small files tell
    open     makes the source; nothing but headers is read
    several  whether it holds several models, of which `expert` names one
    raw      whether `CONTENTS` look at what it holds
    """

    name: str
    accepts: Callable[[Any], bool]
    open: Callable[[Asked], Source]
    several: bool = False
    raw: bool = False


def open_source(ref: Any, *, base: Source | None = None, expert: str | None = None) -> Source:
    """Open a model; nothing but headers is read.

    ref     a Source (returned as it is), a mapping of tensors, an nn.Module, or a str or Path: a folder, a
            .safetensors file or shard index, a PyTorch checkpoint, a PEFT folder (needs `base`), a compressed
            folder (`expert` says which model of it); a URL of such (s3://bucket/model), see `io.read.remote_source`;
            else `org/name[@revision]` on the hub
    Errors: SourceError, one line, for whatever cannot be opened or lies about itself.
    """
    asked = Asked(_located(ref), base, expert)
    try:
        found = next((entry for entry in FORMATS if entry.accepts(asked.ref)), None)
        if found is None:
            raise _unknown(asked.ref)
        if expert is not None and not found.several:
            raise SourceError(
                f"{asked}: expert {expert!r} was asked for, but this is one model, not a compressed folder"
            )
        source = found.open(asked)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise SourceError(f"{short(str(asked))}: cannot be opened ({error.strerror})") from None
    for content in CONTENTS if found.raw else ():
        source = content(source, asked)
    return source


def folder_kind(path: Path) -> str | None:
    """The 'kind' in a folder's weightsmith.json ('merge', 'codec', ...), or None if it has none."""
    try:
        manifest = read_json(path / MANIFEST, MOST)
    except SourceError:
        return None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


# --- the formats -----------------------------------------------------------------------------------


def _memory(asked: Asked) -> Source:
    tensors, label = asked.ref, "tensors in memory"
    if isinstance(tensors, torch.nn.Module):
        tensors, label = tensors.state_dict(), type(tensors).__name__
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(f"{label}: {name!r} is a {type(tensor).__name__}, not a tensor under a name")
        if not good_name(name):
            raise SourceError(f"{label}: {short(name)} is no name for a tensor (control characters, or too long)")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise SourceError(f"{label}: {name!r} is a sparse, quantized or empty-shell (meta) tensor")
    return MemorySource(tensors, label)


def _url(asked: Asked) -> Source:
    from weightsmith.io.read.remote_source import open_url

    if asked.expert is not None:
        raise SourceError(f"{asked}: a compressed folder is read on this machine only; download it first")
    return open_url(asked.ref, asked.base)


def _hub(asked: Asked) -> Source:
    from weightsmith.io.read.hub import open_hub

    return open_hub(asked.ref, asked.base)


def _compressed(asked: Asked) -> Source:
    from weightsmith.io.read.codec_folder import open_codec

    return open_codec(asked.ref, asked.base, asked.expert, open_source)


def _alignment(asked: Asked) -> Source:
    raise SourceError(f"{asked}: an alignment, not a model; name it as `align` of the model that it was made for")


def _adapter(asked: Asked) -> Source:
    from weightsmith.io.read.peft import AdapterSource

    if asked.base is None:
        raise NoBaseError(f"{asked}: a LoRA adapter, which needs a base model; give one under `base`")
    return AdapterSource(asked.ref, asked.base)


def _folder_model(asked: Asked) -> Source:
    source = FolderSource(asked.ref)
    if (asked.ref / "sharded").is_dir():
        from weightsmith.io.read.sharded import with_lost_scalars

        return with_lost_scalars(source)
    return source


def _pipeline(asked: Asked) -> Source:
    from weightsmith.io.read.parts import pipeline

    return pipeline(asked.ref, open_source)


def _modules(asked: Asked) -> Source:
    from weightsmith.io.read.parts import module_folders, with_modules

    found = with_modules(asked.ref, None, {name: open_source(asked.ref / name) for name in module_folders(asked.ref)})
    assert found is not None  # `without_root` saw some
    return found


def _shards(asked: Asked) -> Source:
    from weightsmith.io.read.sharded import ShardedSource

    return ShardedSource(asked.ref)


def _distributed(asked: Asked) -> Source:
    from weightsmith.io.read.dcp import DcpSource

    return DcpSource(asked.ref)


def _safetensors(asked: Asked) -> Source:
    source = SafetensorsSource(asked.ref)
    if any(word.startswith("DCP_") for word in source.header.metadata):
        from weightsmith.io.read.sharded import refuse_shard

        return refuse_shard(source)
    _, count = shard_of(asked.ref.name) or ("", 1)
    if count > 1:
        remark = f"{asked.ref.name}: one of {count} shards, read alone; give the folder for the whole model"
        source.origin = replace(source.origin, remarks=(*source.origin.remarks, remark))
    return source


def _gguf(asked: Asked) -> Source:
    from weightsmith.io.read.gguf import GgufSource

    return GgufSource(asked.ref)


def _pickle(asked: Asked) -> Source:
    from weightsmith.io.read.pickle import PickleSource

    return PickleSource(asked.ref)


def _in_memory(ref: Any) -> bool:
    return isinstance(ref, Mapping) or (not isinstance(ref, (str, Path, Url)) and isinstance(ref, torch.nn.Module))


def _folder(ref: Any) -> bool:
    return isinstance(ref, Path) and ref.is_dir()


def _has(ref: Any, name: str) -> bool:
    return _folder(ref) and (ref / name).is_file()


def _apart(ref: Any) -> bool:
    """Whether all weights of a Sentence-Transformers model lie in the folders of its modules."""
    if not _has(ref, "modules.json"):
        return False
    from weightsmith.io.read.parts import without_root

    return without_root(ref)


def _sharded(ref: Any) -> bool:
    """Whether a folder holds the shards of a distributed checkpoint, and no model put together of them."""
    if not _folder(ref):
        return False
    names = [path.name for path in system.call(list, ref.glob("*.safetensors*"))]
    return bool(names) and all(name.startswith("shard-") and "-model-" in name for name in names)


def _file(ref: Any, *endings: str) -> bool:
    return isinstance(ref, Path) and ref.exists() and ref.name.endswith(endings)


FORMATS: tuple[Format, ...] = (
    Format("source", lambda ref: isinstance(ref, Source), lambda asked: asked.ref),
    Format("tensors in memory", _in_memory, _memory),
    Format("URL", lambda ref: isinstance(ref, Url), _url, several=True, raw=True),
    Format("model on the hub", lambda ref: isinstance(ref, str), _hub, raw=True),
    Format("compressed folder", lambda ref: _folder(ref) and folder_kind(ref) == "codec", _compressed, several=True),
    Format("alignment", lambda ref: _folder(ref) and folder_kind(ref) == "alignment", _alignment),
    Format("adapter folder", lambda ref: _folder(ref) and (ref / ADAPTER_CONFIG).exists(), _adapter),
    Format("pipeline of diffusers", lambda ref: _has(ref, "model_index.json"), _pipeline),
    Format("modules of Sentence-Transformers", _apart, _modules),
    Format("shards of a distributed checkpoint", _sharded, _shards, raw=True),
    Format("distributed checkpoint", lambda ref: _has(ref, ".metadata"), _distributed, raw=True),
    Format("model folder", _folder, _folder_model, raw=True),
    Format("shard index", lambda ref: _file(ref, INDEX), lambda asked: FolderSource(asked.ref), raw=True),
    Format("safetensors", lambda ref: _file(ref, ".safetensors"), _safetensors, raw=True),
    Format("GGUF", lambda ref: _file(ref, ".gguf"), _gguf),
    Format("PyTorch checkpoint", lambda ref: _file(ref, *PICKLES), _pickle, raw=True),
)
"""In the order in which they are tried: the first that accepts a ref opens it."""

ENDINGS = (".safetensors", ".gguf", *PICKLES)
"""How the names of files end that are a model, or a part of one, by themselves."""


# --- what tensors may turn out to be ---------------------------------------------------------------


def _lora_file(source: Source, asked: Asked) -> Source:
    """The model that `base` becomes with the LoRA that a file holds."""
    if not any(hint in name for name in source.keys for hint in (*HINTS, *UNREAD_HINTS)):
        return source
    from weightsmith.io.read.lora_files import lora_kind, read_lora_file, refuse_unread

    kind = lora_kind(source.keys)
    if kind is None:
        refuse_unread(source)
        return source
    if asked.base is not None:
        from weightsmith.io.read.peft import AdapterSource

        return AdapterSource(read_lora_file(source), asked.base)
    names = {"kohya": " with kohya's names", "diffusers": " as diffusers writes it"}.get(kind, "")
    raise SourceError(
        f"{source}: a LoRA file{names}, not a model: give the model that it was trained on under `base`, or "
        'combine it with others of its kind by "weightsmith lora merge"'
    )


def _quantised(source: Source, asked: Asked) -> Source:
    """The weights that quantised ones stand for."""
    from weightsmith.io.read.quantized import unquantised

    return unquantised(source)


def _tied(source: Source, asked: Asked) -> Source:
    """A tied pair as one tensor, however often it is stored."""
    from weightsmith.io.read.tied import once

    return once(source)


CONTENTS: tuple[Callable[[Source, Asked], Source], ...] = (_lora_file, _quantised, _tied)
"""Each gives the source itself where it is none of its kind."""


# --- finding what is meant -------------------------------------------------------------------------


def _located(ref: Any) -> Any:
    """A text or path as a Url, a Path, or the text itself if it is a hub id."""
    url = parse_url(ref)
    if isinstance(url, Url) and not looks_like_hub_id(url.full):
        return url
    if isinstance(ref, str):
        return expanded(url) if isinstance(url, Path) else _path_or_id(ref)
    return expanded(ref) if isinstance(ref, Path) else ref


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


def no_such(ref: str) -> str:
    """What to say of a path that is not there; '' for one that is, a URL and a hub id."""
    try:
        found = _located(ref)
    except SourceError:
        return ""  # opening it says why
    return str(_unknown(found)) if isinstance(found, Path) and not found.exists() else ""


def expanded(path: Path) -> Path:
    """The path with ~ resolved, where there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:  # ~somebody who has no home here
        return path


def _unknown(ref: Any) -> SourceError:
    if not isinstance(ref, Path):
        return SourceError(
            f"cannot open a {type(ref).__name__} as a model; give a path, a hub id, a state dict or an nn.Module"
        )
    if not ref.exists():
        hint = _near(ref)
        if not hint and looks_like_hub_id(f"{PREFIX}{ref}"):
            hint = f"; for the model on the hub write {PREFIX}{ref}"
        return SourceError(f"{ref}: no such file or folder{hint}")
    known = ", ".join((".safetensors", ".gguf", *PICKLES))
    return SourceError(f"{ref}: unknown kind of file; give a model folder or one of {known}")


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
