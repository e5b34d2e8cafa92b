"""Does a merged model run?  Loads it, looks at its numbers, and compares perplexities with its parents'."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.task import blocks
from weightsmith.engine.stream import each_tensor
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.read.adapter import CONFIG
from weightsmith.io.read.open import open_source
from weightsmith.jobs.sweep import variants_in
from weightsmith.observe.consistency import cheap_check
from weightsmith.observe.kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.observe.model import LoadedModel
    from weightsmith.observe.probe import Found

__all__ = ["cheap_check", "check", "perplexity", "recorded_parents", "sample_text"]


def check(
    out: str | Path,
    *,
    parents: Mapping[str, str | Path] | None = None,
    beside: Sequence[str | Path] = (),
    text: str | Path | None = None,
    length: int = 512,
    device: str = "auto",
    trust_remote_code: bool = False,
    ask: Callable[[LoadedModel], str] | None = None,
    score: Callable[[Path], Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Load a result with transformers, run it, and report as plain values:

    path, kind   see `kinds.KINDS`, or 'tensors' for what no model could be built of
    ok, finite   ok: finite, and no problems;  ran: whether a forward pass was made
    problems     what makes the model unusable;  warnings: what `cheap_check` says;  notes: what was not checked
    models       name ('merged' and each parent) -> {'perplexity' per token, 'bits_per_byte', 'tokens'} of a language
                 model; of others, for each parent: how alike its outputs are, see `probe.compared`
    missing      parent -> why it is not compared
    answers      name -> what `ask` gives, of language models;  scores: name -> what `score` gives, of all

    parents   name -> model; default: those of the recipe in OUT/weightsmith.json
    beside    models to measure instead of the parents; all, OUT too, are then called as they are written
    text      a UTF-8 file; default: a few hundred words of English prose
    length    tokens of context per window
    Raises SourceError if OUT or the text cannot be read at all.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise SourceError(f"{folder}: not a folder; give the folder that merge has written")
    if why := _no_model(folder):
        raise SourceError(f"{folder}: {why}")
    report: dict[str, Any] = {
        "path": str(folder), "kind": "tensors", "ok": False, "finite": True, "ran": False,
        "unlike": False, "problems": [], "warnings": [], "notes": [], "models": {}, "missing": {}, "answers": {},
        "scores": {},
    }  # fmt: skip
    others: Mapping[str, str | Path] = {str(path): path for path in beside}
    own = str(out) if others else "merged"
    if own in others or len(others) < len(beside):
        raise SourceError(f"{', '.join([own, *map(str, beside)])}: a model is named twice; name each once")
    known, missing = (others or parents or {}, {}) if others or parents is not None else recorded_parents(folder)
    if score is not None:  # first: what is wrong with it is told before anything is loaded
        report["scores"] = {name: dict(score(Path(path))) for name, path in {own: folder, **known}.items()}
    if not (folder / "config.json").exists():
        _check_tensors(folder, report)
        report["ok"] = not report["problems"]
        return report
    trial = _Trial(sample_text() if text is None else _read_text(Path(text)), length, ask)
    report["warnings"] = cheap_check(folder)
    from weightsmith.observe.kinds import UnknownKind

    try:
        found = _run(folder, report, trial, device, trust_remote_code)
    except UnknownKind as error:
        _check_tensors(folder, report)
        report["notes"].insert(0, error.why)
        report["ok"] = report["finite"]
        return report
    except SourceError as error:
        _check_tensors(folder, report)
        report["problems"].insert(0, str(error))
        return report
    report["missing"] = missing
    load = partial(_loaded, device=device, trust_remote_code=trust_remote_code)
    if isinstance(found, dict) and found:
        report["models"][own] = found
        _compare(known, report, lambda path: _figures(load(path), trial))
    elif not isinstance(found, dict):
        _compare(known, report, lambda path: _alike(load(path), trial.prose, found))
    for name, figures in report["models"].items():
        if _ANSWER in figures:
            report["answers"][name] = figures.pop(_ANSWER)
        if _SILENT in figures:
            report["notes"].append(f"no answer: {figures.pop(_SILENT)}")
    if not others and (why := _unlike(report["models"])):
        report["unlike"] = True
        report["warnings"].append(f"{why}; try a smaller lambda, fewer models or another method")
    report["ok"] = report["finite"] and not report["problems"]
    return report


MORE_BITS, LEAST_ALIKE = 1.5, 0.5
"""Where a result is far from every parent: bits per byte in times the worst parent's, mean cosine of outputs.  Chosen,
not measured."""


def _unlike(models: Mapping[str, Mapping[str, float]]) -> str:
    """How a result differs from all its parents, if it hardly can be what was wanted; else ''."""
    merged = models.get("merged", {})
    bits = [found["bits_per_byte"] for name, found in models.items() if name != "merged" and "bits_per_byte" in found]
    if bits and "bits_per_byte" in merged and not merged["bits_per_byte"] <= MORE_BITS * max(bits):
        return f"{merged['bits_per_byte']:.3g} bits per byte, its parents at most {max(bits):.3g}"
    alike = [found["cosine"] for found in models.values() if "cosine" in found]
    if alike and not max(alike) >= LEAST_ALIKE:
        return f"its outputs are unlike those of every parent, mean cosine at most {max(alike):.2f}"
    return ""


def sample_text() -> str:
    """The English prose that perplexities are measured on by default."""
    return resources.files("weightsmith.observe").joinpath("sample.txt").read_text("utf-8")


def perplexity(loaded: LoadedModel, text: str, length: int = 512) -> dict[str, float]:
    """Perplexity per token and bits per byte of a causal language model on a text.

    The text is cut into windows of `length` tokens that overlap by one, so that every token but the first is
    predicted exactly once (the first one too where the tokenizer puts a BOS in front).  Bits per byte can be
    compared between tokenizers, perplexities cannot.  `finite` tells whether all logits were.
    """
    from weightsmith.observe.model import resting, text_coder

    coder = text_coder(loaded)
    ids = coder.encode(text)
    size = max(1, loaded.clip_length(length) - len(coder.prefix))
    stream = ids if not coder.prefix else [coder.prefix[-1], *ids]
    counted = len(text.encode()) - (0 if coder.prefix else coder.bytes_of(ids[:1]))
    if len(stream) < 2:
        raise WeightsmithError("the text is too short to measure a perplexity on; give at least two tokens")
    total, finite = 0.0, True
    with resting(loaded.module), torch.no_grad():
        for start in range(0, len(stream) - 1, size):
            window = stream[start : start + size + 1]
            lead = list(coder.prefix) if start else list(coder.prefix[:-1])
            inputs = torch.tensor([lead + window[:-1]])
            logits = loaded.logits(inputs)[0, len(lead) :].float()
            finite = finite and bool(torch.isfinite(logits).all())
            targets = torch.tensor(window[1:], device=logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double())
    tokens = len(stream) - 1
    mean = total / tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan,
        "bits_per_byte": total / math.log(2) / max(counted, 1),
        "tokens": tokens,
        "finite": finite,
    }


# --- the parts of a check --------------------------------------------------------------------------


_ANSWER, _SILENT = "answer", "no answer"


@dataclass(frozen=True)
class _Trial:
    """What language models are tried on: prose, in windows of `length` tokens, and what they are asked."""

    prose: str
    length: int
    ask: Callable[[LoadedModel], str] | None


def _run(
    folder: Path, report: dict[str, Any], trial: _Trial, device: str, trust_remote_code: bool
) -> dict[str, Any] | Found:
    """Run the result; returns a language model's figures, which are empty where it has no tokenizer, or the outputs."""
    from weightsmith.observe.probe import buffer_problems, probe, takes_pictures

    loaded = _loaded(folder, device, trust_remote_code)
    report["kind"] = loaded.kind
    report["problems"] += buffer_problems(loaded)
    found: dict[str, Any] | Found = {}
    if loaded.kind == "causal-lm":
        try:
            found = dict(perplexity(loaded, trial.prose, trial.length))
            report["finite"] = bool(found.pop("finite"))
            found.update(_asked(loaded, trial) if report["finite"] else {})
        except SourceError as error:  # no tokenizer: the logits can be looked at all the same
            report["notes"].append(f"no perplexity: {error}")
            report["finite"] = _finite(
                loaded, torch.arange(min(getattr(loaded.text_config, "vocab_size", 1), 64))[None]
            )
    else:
        try:
            found = probe(loaded, trial.prose)
        except SourceError as error:
            report["notes"].append(f"not run: {error}")
            report["problems"] += (bad := _nonfinite_tensors(folder))
            report["finite"] = not bad
            return {}
        report["finite"] = found.finite
        report["notes"] += [*found.notes, f"run on {found.inputs}: that tells whether it works, not how well"]
    report["ran"] = True
    if loaded.kind == "causal-lm" and takes_pictures(loaded):
        report["notes"].append("run on text alone: pictures were not tried")
    if not report["finite"]:
        what = "logits" if KINDS[loaded.kind].classes else "output"
        report["problems"] += [f"{folder}: NaN or Inf in the {what}", *_nonfinite_tensors(folder)]
    return found


def _finite(loaded: LoadedModel, inputs: Tensor) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(loaded.logits(inputs)).all())


def _loaded(path: str | Path, device: str, trust_remote_code: bool) -> LoadedModel:
    from weightsmith.observe.model import load_model

    return load_model(path, device=device, trust_remote_code=trust_remote_code)


def _compare(
    parents: Mapping[str, str | Path], report: dict[str, Any], beside: Callable[[str | Path], dict[str, Any]]
) -> None:
    """Look at the parents, one in memory at a time: into the report's models, or why they are not there."""
    for name, path in parents.items():
        try:
            report["models"][name] = beside(path)
        except WeightsmithError as error:
            report["missing"][name] = str(error)


def _figures(loaded: LoadedModel, trial: _Trial) -> dict[str, Any]:
    values = perplexity(loaded, trial.prose, trial.length)
    return values | _asked(loaded, trial) if values.pop("finite") else values


def _asked(loaded: LoadedModel, trial: _Trial) -> dict[str, str]:
    """An answer, or why there is none."""
    try:
        return {} if trial.ask is None else {_ANSWER: trial.ask(loaded)}
    except SourceError as error:
        return {_SILENT: str(error)}


def _alike(loaded: LoadedModel, prose: str, found: Found) -> dict[str, float]:
    """How a parent's outputs for the same inputs lie to the result's."""
    from weightsmith.observe.probe import apart, compared, probe

    theirs = probe(loaded, prose, found)
    alike = compared(found, theirs)
    if alike is None:
        raise WeightsmithError(apart(found, theirs))
    return alike


def recorded_parents(folder: Path) -> tuple[Mapping[str, str | Path], dict[str, str]]:
    """The models named in OUT/weightsmith.json's recipe: name -> folder, and name -> why it cannot be loaded."""
    path = folder / MANIFEST
    if not path.exists():
        return {}, {}
    try:
        story = json.loads(path.read_text("utf-8"))
        recipe = story["recipe"]
        groups = [recipe[group] for group in ("models", "experts", "shared") if recipe.get(group)]
        named = {"base": recipe.get("base"), **{name: model for group in groups for name, model in group.items()}}
        named = {name: model for name, model in named.items() if model is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, {MANIFEST: f"names no models ({type(error).__name__}: {error})"}
    found: dict[str, str | Path] = {}
    missing: dict[str, str] = {}
    for name, entry in [*_sliced(named), *_compressed(named)]:
        model = entry.get("model") if isinstance(entry, dict) else entry
        if isinstance(entry, dict) and entry.get("expert"):
            continue
        if not isinstance(model, str):
            missing[name] = "a nested recipe; merge it on its own to compare with it"
            continue
        places = [Path(model).expanduser(), folder / model, folder.parent / model]
        place = next((p for p in places if p.is_dir()), None)
        if place is None:
            missing[name] = f"{model} is not a folder here"
        elif (place / "adapter_config.json").exists() and not (place / "config.json").exists():
            missing[name] = f"{model} is an adapter, not a whole model"
        else:
            found[name] = place
    return found, missing


def _no_model(folder: Path) -> str:
    """What a folder is that holds models, or makes one, but is none, and what to do; '' for all others."""
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return (
            "an adapter, not a whole model; merge it into its base and check that "
            f"(models: {{x: {{model: BASE, adapter: {folder}}}}}, method: passthrough)"
        )
    if variants := variants_in(folder):
        return f"the folder of a sweep; check one variant at a time, as {next(iter(variants.values()))}"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        made = json.loads((folder / MANIFEST).read_text("utf-8"))
        if made["kind"] == "codec":
            names = ", ".join(made["recipe"]["models"])
            return f"a compressed folder; check a model of it: weightsmith restore {folder} OUT --expert NAME ({names})"
    return ""


def _sliced(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The models of a recipe; in place of one that is a stack of slices, those that they are cut from, each once."""
    for name, entry in named.items():
        model = entry.get("model") if isinstance(entry, dict) else entry
        slices = model.get("slices") if isinstance(model, dict) else None
        parts = [one.get("model") if isinstance(one, dict) else one for one in slices or ()]
        if parts and all(isinstance(part, str) for part in parts):
            for number, part in enumerate(dict.fromkeys(parts), 1):
                yield f"{name}, part {number} ({Path(str(part)).name})", part
        else:
            yield name, entry


def _compressed(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The base and the model itself, for a model that comes out of a compressed folder."""
    for entry in named.values():
        if not isinstance(entry, dict) or not entry.get("expert") or not isinstance(entry.get("model"), str):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            recipe = json.loads((Path(entry["model"]).expanduser() / MANIFEST).read_text("utf-8"))["recipe"]
            models = {"base": recipe.get("base"), entry["expert"]: recipe["models"][entry["expert"]]}
            yield from ((name, model) for name, model in models.items() if model is not None)


def _check_tensors(folder: Path, report: dict[str, Any]) -> None:
    """For a folder that no model can be built from."""
    report["problems"] += _nonfinite_tensors(folder)
    report["finite"] = not report["problems"]
    report["notes"].append("only shapes and finiteness of the tensors were checked: no model could be built to run")


def _nonfinite_tensors(folder: Path) -> list[str]:
    """Look at every tensor of the folder, block by block."""
    source = open_source(folder)

    def finite(key: Key) -> bool:
        rows = blocks(key, 0, key.rows) if key.floating else ()
        return all(bool(torch.isfinite(source.read(key.name, *span).float()).all()) for span in rows)

    found = each_tensor(source.keys.values(), finite)
    return [f"{name}: NaN or Inf in the weights" for name, good in found.items() if not good]


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not readable as UTF-8 text ({error})") from None
