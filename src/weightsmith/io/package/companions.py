"""Companion files: everything in a model's folder that is not its weights and must go along with them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import DTYPES
from weightsmith.io import system
from weightsmith.io.disk import write_file
from weightsmith.io.read.folder import WEIGHTS, is_inside
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Origin

__all__ = ["TOKENIZER_FILES", "Copied", "beside_adapter", "companions", "copy_companions", "left_behind",
           "module_weights", "tokenizer_files", "tokenizer_home", "trained_modules", "with_dtype"]  # fmt: skip

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json", "normalizer.json", "bpe.codes"),
    *("chat_template.*", "additional_chat_templates/*"),
)
"""Globs, relative to a model's folder, of what belongs to its tokenizer."""

# The first glob that matches says why a file stays behind.  A name without a slash matches in every folder.
_LEFT: tuple[tuple[str, str], ...] = (
    (".git/*", "version control"),
    (".cache/*", "download cache"),
    ("checkpoint-*/*", "training checkpoint"),
    ("training.html", "of a training run"),
    ("multitask.json", "of a training run"),
    ("trainer_state.json", "of a training run: it cannot go on from merged weights"),
    ("README.md", "replaced by the new model card"),
    ("weightsmith.json", "replaced by the new manifest"),
    ("adapter_config.json", "describes an adapter, not the merged model"),
    *((f"*.{kind}.index.json", "index of the weights") for kind in ("safetensors", "bin", "msgpack", "h5")),
    *((f"*.{kind}", "weights") for kind in WEIGHTS),
    ("openvino*.xml", "weights"),
    *((f"*.{kind}", "pickle: runs code when loaded") for kind in ("pkl", "pickle", "joblib")),
)
_NO_VOCABULARY = ("_config.json", "_map.json", "added_tokens.json", ".jinja")
"""Ends of names of tokenizer files that hold no vocabulary of their own."""
_CODE = "code: not copied unless allowed"
_MODULES = "modules.json"
_MODULE = re.compile(r"\d+_\w+/[^/]+\.(json|safetensors)")
_MODULES_LIMIT = 1_000_000  # bytes of modules.json
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".bat")
_DTYPE_FIELD = re.compile(r'(?P<head>"(?:torch_dtype|dtype)"\s*:\s*")(?P<torch>torch\.)?(?P<name>\w+)"')


@dataclass(frozen=True)
class Copied:
    """What has become of the files beside the weights; names are relative to their folder.

    files    copied
    modules  those of `files` that are weights of a Sentence-Transformers module: taken over unmerged
    left     name -> why it was not copied
    """

    files: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)


def companions(folder: Path, weight_files: Collection[str], *, code: bool = False) -> list[Path]:
    """Paths, relative to `folder` and sorted, of the files that go along with its weights.

    weight_files names (relative to `folder`) the weights that are merged.  The weights of other
    Sentence-Transformers modules ('2_Dense/model.safetensors') are companions; Python files and other code
    are only if `code`.
    """
    return [Path(name) for name, reason in _judged(folder, weight_files, code) if reason is None]


def left_behind(folder: Path, weight_files: Collection[str], *, code: bool = False) -> dict[str, str]:
    """Every other file of the folder, with the reason why it is no companion (merged weights are not listed)."""
    return {name: reason for name, reason in _judged(folder, weight_files, code) if reason is not None}


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files in a model's folder."""
    return [name for path in companions(folder, ()) if _is_tokenizer(name := path.as_posix())]


def tokenizer_home(origin: Origin) -> Path | None:
    """The folder of a source's tokenizer: where it was trained, if that has one, else the model's."""
    own = origin.checkpoint
    if own is not None and any(not name.endswith(_NO_VOCABULARY) for name in tokenizer_files(own)):
        return own
    return origin.folder


def beside_adapter(names: Iterable[str]) -> list[str]:
    """Which of the names in an adapter's folder belong to its tokenizer, or to modules that were trained with it."""
    return [name for name in names if _is_tokenizer(name) or name == _MODULES or _MODULE.fullmatch(name)]


def trained_modules(origin: Origin) -> dict[str, Path]:
    """Files of Sentence-Transformers modules that lie beside an adapter: name -> its folder."""
    own = origin.checkpoint
    if own is None or own == origin.folder or not (own / _MODULES).is_file():
        return {}
    folders = _module_folders(own)
    names = [name for name in sorted(_walk(own)) if str(PurePosixPath(name).parent) in folders and is_inside(own, name)]
    weights = any(_is_module_weight(name, folders) for name in names)
    return dict.fromkeys((_MODULES, *names), own) if weights else {}


def module_weights(folder: Path, names: Iterable[str]) -> frozenset[str]:
    """Which of some names are weights of Sentence-Transformers modules, as modules.json in the folder lists them."""
    modules = _module_folders(folder)
    return frozenset(name for name in names if _is_module_weight(name, modules))


def copy_companions(
    folder: Path,
    target: Path,
    weight_files: Collection[str],
    *,
    dtype: str | None = None,
    config: str | None = None,
    tokenizer: Path | None = None,
    modules: Mapping[str, Path] | None = None,
    code: bool = False,
) -> Copied:
    """Copy the companions of `folder` into `target` and say what has become of each file.

    dtype      the output's dtype ('bfloat16') where it is not the input's: `config.json` beside merged weights then
               says so too; nothing else in any file changes
    config     what config.json says instead, where the merge has other blocks than the input
    tokenizer  another model's folder, whose tokenizer files go along instead of this one's
    modules    name -> folder, for files of modules that come from elsewhere
    """
    files = {path.as_posix(): folder for path in companions(folder, weight_files, code=code)}
    left = left_behind(folder, weight_files, code=code)
    if tokenizer is not None and tokenizer != folder:
        own = [name for name in files if _is_tokenizer(name)]
        theirs = tokenizer_files(tokenizer)
        if not theirs:
            raise SourceError(f"{tokenizer} holds no tokenizer files; name another folder or model under `tokenizer`")
        left |= dict.fromkeys(own, "the tokenizer comes from another model")
        files = {name: place for name, place in files.items() if name not in left} | dict.fromkeys(theirs, tokenizer)
        left = {name: reason for name, reason in left.items() if name not in files}
    files |= modules or {}
    left = {name: reason for name, reason in left.items() if name not in files}
    parts = {PurePosixPath(weights).parent for weights in weight_files}
    for name, place in files.items():
        blocks, path = _blocks(place / name), PurePosixPath(name)
        given = config if name == "config.json" else None
        if given is not None or (dtype is not None and path.name == "config.json" and path.parent in parts):
            text = given if given is not None else b"".join(blocks).decode(errors="surrogateescape")
            blocks = iter([(with_dtype(text, dtype) if dtype else text).encode(errors="surrogateescape")])
        write_file(target / name, blocks)
    known = frozenset(name for place in {folder, *(modules or {}).values()} for name in _module_folders(place))
    weights = tuple(name for name in files if _is_module_weight(name, known))
    return Copied(tuple(sorted(files)), weights, dict(sorted(left.items())))


def with_dtype(config: str, dtype: str) -> str:
    """A config.json's text with every dtype field (also of parts: text_config, vision_config) set to `dtype`.

    The text is edited in place, so that everything else keeps its bytes.
    """

    def replacement(match: re.Match[str]) -> str:
        known = match["name"] in DTYPES
        return f'{match["head"]}{match["torch"] or ""}{dtype}"' if known else match[0]

    return _DTYPE_FIELD.sub(replacement, config)


def _judged(folder: Path, weight_files: Collection[str], code: bool) -> Iterator[tuple[str, str | None]]:
    """(relative name, None or the reason to leave it) for every file that is not merged."""
    modules = _module_folders(folder)
    for name in sorted(_walk(folder)):
        if name in weight_files:
            continue
        if not (folder / name).is_file():
            yield name, "not a regular file"
        elif not is_inside(folder, name):
            yield name, "a link that leaves the folder"
        elif name.endswith(_CODE_SUFFIXES):
            yield name, None if code else _CODE
        elif _is_module_weight(name, modules):
            yield name, None
        else:
            yield name, next((why for glob, why in _LEFT if _matches(name, glob)), None)


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all that is not a plain folder; links to folders are not followed."""
    try:
        places = system.call(list, os.walk(folder, onerror=_raise))
    except OSError as error:
        raise SourceError(f"cannot list {error.filename or folder}: {error.strerror}") from error
    for place, folders, files in places:
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in files + links:
            yield (Path(place) / name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _matches(name: str, glob: str) -> bool:
    return fnmatch(name if "/" in glob else PurePosixPath(name).name, glob)


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch(name, glob) for glob in TOKENIZER_FILES)


def _module_folders(folder: Path) -> frozenset[str]:
    """Sub folders that `modules.json` of Sentence-Transformers names as parts of the model."""
    path = folder / _MODULES
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(module["path"] for module in read_json(path, _MODULES_LIMIT) if module["path"])
    except (SourceError, TypeError, KeyError) as error:
        raise SourceError(f"{path}: not a list of modules with a path each ({error}); repair or remove it") from error


def _is_module_weight(name: str, modules: frozenset[str]) -> bool:
    path = PurePosixPath(name)
    return str(path.parent) in modules and path.name in ("model.safetensors", "pytorch_model.bin")


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        yield from system.read_blocks(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
