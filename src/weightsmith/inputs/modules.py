"""Sentence-Transformers modules beside the transformer (Dense, LayerNorm, ...): merged where all models have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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

Described = dict[str, dict[str, Any]]

_LIMIT = 16_000_000
_POOLING = "pooling_mode_"
_SAID = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FIELDS = ("prompts", "default_prompt_name", "similarity_fn_name", "max_seq_length", "do_lower_case")


def merged_with_modules(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models, with the weights of their modules as tensors (`2_Dense.linear.weight`) where all have the same.

    An adapter has those that were trained beside it, else its base's.
    """
    homes = {name: home for name, source in models.items() if (home := _home(source)) is not None}
    if not models or len(homes) < len(models) or any(isinstance(source, PartsSource) for source in models.values()):
        return dict(models)
    opened = {
        name: {f: _own(homes[name], source.origin.checkpoint, homes[name] / f) for f in module_folders(homes[name])}
        for name, source in models.items()
    }
    first = next(iter(opened.values()))
    shared = [folder for folder in first if len({_shapes(own.get(folder)) for own in opened.values()}) == 1]
    return {
        name: with_modules(homes[name], source, {folder: opened[name][folder] for folder in shared}) or source
        for name, source in models.items()
    }


def _shapes(module: Source | None) -> frozenset[tuple[str, tuple[int, ...]]] | None:
    return None if module is None else frozenset((key.name, key.shape) for key in module.keys.values())


def _own(home: Path, checkpoint: Path | None, module: Path) -> Source:
    """A module of the base, or what an adapter's folder has in its place though it does not list it."""
    trained = checkpoint / module.relative_to(home) if checkpoint is not None else module
    return open_source(trained if trained.is_dir() and any(system.call(list, trained.glob("*.*"))) else module)


def modules_merged(models: Models) -> bool:
    """Whether the modules' weights are among the tensors of the merge."""
    return bool(models) and any("/" in stem for stem in models[0][1].origin.stores.values())


def unlike_modules(models: Models) -> Iterator[Problem]:
    """Modules that some models lack, and settings (pooling, prompts) that are not the same in all: both values."""
    described = {name: _described(home) for name, source in models if (home := _home(source)) is not None}
    if not described:
        return
    label = models[0][0]
    if label not in described:
        names = ", ".join(described)
        text = f"{label} has no {MODULES} of Sentence-Transformers, nor has the result; {names} have one"
        yield Problem(Code.COMPANION, MODULES, text)
        return
    yield from _lacking(models, described)
    mine = described.pop(label)
    for name, theirs in described.items():
        for path in mine:
            for what in dict.fromkeys((*mine[path], *theirs.get(path, {}))) if path in theirs else ():
                a, b = (values[path].get(what, "not there") for values in (mine, theirs))
                if a != b:
                    text = f"{what} is {_shown(a)} in {label}, {_shown(b)} in {name}; the result has that of {label}"
                    yield Problem(Code.COMPANION, name, text)


def _lacking(models: Models, described: Mapping[str, Described]) -> Iterator[Problem]:
    """A line for every module that only some of the models have: it is merged with nothing."""
    label = models[0][0]
    adapters = {name for name, source in models if source.origin.checkpoint not in (None, source.origin.folder)}
    for path in dict.fromkeys(path for modules in described.values() for path in modules):
        owners = [name for name, modules in described.items() if path in modules]
        others = [name for name in described if name not in owners]
        kind = described[owners[0]][path].get(path)
        if not others or (label in others and adapters.intersection(owners)):
            continue
        what = f"that of {label}, as it is" if label in owners else "none"
        text = f"{path} ({kind}) is in {', '.join(owners)}, not in {', '.join(others)}: the result has {what}"
        yield Problem(Code.COMPANION, path, text)


def _home(source: Source) -> Path | None:
    """The folder with a model's modules.json; an adapter's own comes first."""
    folders = (source.origin.checkpoint, source.origin.folder)
    return next((folder for folder in folders if folder is not None and (folder / MODULES).is_file()), None)


def _described(home: Path) -> Described:
    """What is set where: '1_Pooling' -> '1_Pooling: pooling' -> 'mean', '' -> 'max_seq_length' -> 512."""
    found: Described = {}
    listed = _read(home / MODULES)
    for entry in listed if isinstance(listed, list) else ():
        path, kind = entry.get("path", ""), str(entry.get("type", "")).rpartition(".")[2]
        if not path or kind in ("Transformer", "Router", "Asym"):
            continue
        config = _read(home / path / "config.json")
        config = config if isinstance(config, dict) else {}
        values = {"pooling": modes} if (modes := _modes(config)) else config
        plain = {f"{path}: {n}": v for n, v in values.items() if isinstance(v, (bool, int, float, str)) and v != ""}
        found[path] = {path: kind, **plain}
    found[""] = {}
    for file in _SAID:
        config = _read(home / file)
        config = config if isinstance(config, dict) else {}
        found[""] |= {n: config[n] for n in _FIELDS if config.get(n) not in (None, {}, [])}
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
