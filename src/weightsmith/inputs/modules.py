"""Sentence-Transformers modules beside the transformer (Dense, LayerNorm, ...): merged where all models have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.problem import Code, Problem
from weightsmith.io import system
from weightsmith.io.read.open import open_source
from weightsmith.io.read.parts import MODULES, PartsSource, module_folders, with_modules
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Source

__all__ = ["merged_with_modules", "modules_merged", "unlike_modules"]

Models = Sequence[tuple[str, Source]]
"""Names and models, the base first where there is one."""

_LIMIT = 16_000_000
_POOLING = "pooling_mode_"
_SAID = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FIELDS = ("prompts", "default_prompt_name", "similarity_fn_name", "max_seq_length", "do_lower_case")


def merged_with_modules(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models, with the weights of their modules as tensors (`2_Dense.linear.weight`) where all have the same.

    An adapter has those that were trained beside it, else its base's.
    """
    homes = {name: _home(source) for name, source in models.items()}
    folders = {name: module_folders(home) if home is not None else [] for name, home in homes.items()}
    if not models or not all(folders.values()) or len({tuple(sorted(found)) for found in folders.values()}) > 1:
        return dict(models)
    if any(isinstance(source, PartsSource) for source in models.values()):
        return dict(models)
    found: dict[str, Source] = {}
    for name, source in models.items():
        home = homes[name]
        made = None if home is None else with_modules(home, source, partial(_own, home, source.origin.checkpoint))
        found[name] = source if made is None else made
    first, *others = found.values()
    extra = [n for n in first.keys if n not in next(iter(models.values())).keys]
    fit = all(n in other.keys and other.key(n).shape == first.key(n).shape for other in others for n in extra)
    return found if fit else dict(models)


def _own(home: Path, checkpoint: Path | None, module: Path) -> Source:
    """A module of the base, or what an adapter's folder has in its place though it does not list it."""
    trained = checkpoint / module.relative_to(home) if checkpoint is not None else module
    return open_source(trained if trained.is_dir() and any(system.call(list, trained.glob("*.*"))) else module)


def modules_merged(models: Models) -> bool:
    """Whether the modules' weights are among the tensors of the merge."""
    return bool(models) and any("/" in stem for stem in models[0][1].origin.stores.values())


def unlike_modules(models: Models) -> Iterator[Problem]:
    """Settings of modules (pooling, normalisation, prompts) that are not the same in all models: both values."""
    described = {name: _described(home) for name, source in models if (home := _home(source)) is not None}
    if len(described) < 2:
        return
    (label, mine), *others = described.items()
    for name, theirs in others:
        for what in dict.fromkeys((*mine, *theirs)):
            a, b = mine.get(what, "not there"), theirs.get(what, "not there")
            if a != b:
                text = f"{what} is {_shown(a)} in {label}, {_shown(b)} in {name}; the result has that of {label}"
                yield Problem(Code.COMPANION, name, text)


def _home(source: Source) -> Path | None:
    """The folder with a model's modules.json; an adapter's own comes first."""
    folders = (source.origin.checkpoint, source.origin.folder)
    return next((folder for folder in folders if folder is not None and (folder / MODULES).is_file()), None)


def _described(home: Path) -> dict[str, Any]:
    """What is set where: '1_Pooling: pooling' -> 'mean', 'max_seq_length' -> 512."""
    found: dict[str, Any] = {}
    listed = _read(home / MODULES)
    for entry in listed if isinstance(listed, list) else ():
        path, kind = entry.get("path", ""), str(entry.get("type", "")).rpartition(".")[2]
        if not path or kind in ("Transformer", "Router", "Asym"):
            continue
        found[path] = kind
        config = _read(home / path / "config.json")
        config = config if isinstance(config, dict) else {}
        if modes := _modes(config):
            found[f"{path}: pooling"] = modes
        else:
            found |= {
                f"{path}: {n}": v for n, v in config.items() if isinstance(v, (bool, int, float, str)) and v != ""
            }
    for file in _SAID:
        config = _read(home / file)
        config = config if isinstance(config, dict) else {}
        found |= {n: config[n] for n in _FIELDS if config.get(n) not in (None, {}, [])}
    return found


def _modes(config: Mapping[str, Any]) -> str:
    """The pooling that a config asks for, whichever release wrote it."""
    if isinstance(given := config.get("pooling_mode"), (str, list, tuple)):
        return given if isinstance(given, str) else "+".join(map(str, given))
    asked = (name.removeprefix(_POOLING) for name, on in config.items() if name.startswith(_POOLING) and on is True)
    return "+".join(name.removesuffix("_tokens").removesuffix("_token") for name in asked)


def _read(path: Path) -> Any:
    try:
        return read_json(path, _LIMIT) if path.is_file() else None
    except SourceError:
        return None  # whoever needs it will say what is wrong with it


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}..."
