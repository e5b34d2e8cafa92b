"""`python -m bench.compare`: the grid through both programs, and a table of how they agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.compare.examples import examples
from bench.compare.grid import Config, grid
from bench.compare.models import write_hearing, write_saying, write_seeing
from bench.measure import BenchError
from bench.mergekit import PACKAGES, mergekit_python
from bench.models import Shape, write_model
from weightsmith.core.errors import WeightsmithError
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads

ROOT = Path(".bench")
SHAPE = Shape(vocab=96, hidden=32, layers=4, intermediate=64, heads=4, kv_heads=2)
EPSILON = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}
"""Distance of neighbouring numbers, relative to their size."""
ROUNDING = 8
"""Units in the last place of a tensor's largest entry up to which a difference is rounding."""


@dataclass(frozen=True)
class Outcome:
    """How one config came out: `largest` is the largest difference in units of the last place of the tensor's
    largest entry, `unlike` the share of entries that differ; for random masks the ratio of the changes' norms."""

    name: str
    verdict: str
    largest: float = 0.0
    unlike: float = 0.0


def main() -> int:
    python = mergekit_python(ROOT / "mergekit-venv")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = _models(work / "models")
        configs = [(config, _filled(config.text, models)) for config in (*grid(), *examples())]
        jobs = [(text, str(work / "theirs" / str(i))) for i, (_, text) in enumerate(configs)]
        (work / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("theirs.py")
        print(f"{len(jobs)} configs through {PACKAGES[-1]} ", end="", flush=True)
        subprocess.run([str(python), str(script), str(work / "jobs.json"), str(work / "errors.json")], check=True)
        print()
        errors = json.loads((work / "errors.json").read_text())
        outcomes = []
        for i, ((config, text), error) in enumerate(zip(configs, errors, strict=True)):
            outcomes.append(_outcome(config, text, work / "ours" / str(i), work / "theirs" / str(i), error, models))
    print(_table(outcomes))
    bad = [o for o in outcomes if o.verdict.startswith("differs")]
    print(f"\n{len(outcomes)} configs, {len(bad)} differ")
    return 1 if bad else 0


def _models(root: Path) -> dict[str, Path]:
    found = {}
    for number, name in enumerate(("BASE", "A", "B", "C")):
        for suffix, dtype in (("", "float32"), ("16", "bfloat16")):
            found[name + suffix] = root / (name + suffix)
            write_model(found[name + suffix], SHAPE, dtype, number)
    for kind, write in (("SEE", write_seeing), ("HEAR", write_hearing), ("SAY", write_saying)):
        for number in range(3):
            found[f"{kind}{number}"] = root / f"{kind}{number}"
            write(found[f"{kind}{number}"], number)
    return found


def _filled(text: str, models: Mapping[str, Path]) -> str:
    return re.sub(r"\b((BASE|A|B|C)(16)?|(SEE|HEAR|SAY)\d)\b", lambda m: str(models[m[0]]), text)


def _outcome(
    config: Config, text: str, ours: Path, theirs: Path, error: str | None, models: Mapping[str, Path]
) -> Outcome:
    try:
        run(loads(text, config.name), ours)
    except WeightsmithError as refused:
        return Outcome(config.name, "both refuse" if error else f"differs: refused here: {refused}")
    stored = sorted(theirs.glob("*.safetensors"))
    if error and not stored:
        return Outcome(config.name, f"mergekit fails: {error}")
    after = "; then mergekit fails to write config.json" if error else ""
    after += f"; mergekit stores {config.stores} whatever dtype says" if config.stores else ""
    if config.random:
        base = _read(models["BASE"])
        ratio = _change(_read(ours), base) / _change(_read(theirs), base)
        return Outcome(config.name, "alike in size" if abs(ratio - 1) < 0.05 else "differs", ratio)
    a, b = _read(ours), _read(theirs)
    if set(a) != set(b):
        return Outcome(config.name, f"differs: tensors {sorted(set(a) ^ set(b))[:3]}")
    largest, unlike, beyond, total = 0.0, 0, 0, 0
    for name, (code, values) in a.items():
        other_code, other = b[name]
        if other_code not in (code, config.stores) or values.shape != other.shape:
            return Outcome(
                config.name, f"differs: {name} is {code} {values.shape}, mergekit's {other_code} {other.shape}"
            )
        scale = max(float(np.abs(other).max()), 1e-30)
        apart = np.abs(values - other) / scale / EPSILON[code]
        largest = max(largest, float(apart.max()))
        unlike += int((values != other).sum())
        beyond += int((apart > ROUNDING).sum())
        total += values.size
    verdict = "equal" if not unlike else "rounding" if not beyond else "differs"
    if verdict == "differs" and beyond / total <= config.unlike[0]:
        verdict = f"rounding, but for {beyond / total:.1%} of the entries: {config.unlike[1]}"
    return Outcome(config.name, verdict + after, largest, unlike / total)


def _change(model: Mapping[str, tuple[str, np.ndarray]], base: Mapping[str, tuple[str, np.ndarray]]) -> float:
    return float(np.sqrt(sum(float(np.square(values - base[name][1]).sum()) for name, (_, values) in model.items())))


def _read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (stored dtype, values as float64)."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = entry["dtype"], _decoded(raw[8 + length + first : 8 + length + last], entry)
    return found


def _decoded(raw: bytes, entry: Mapping[str, object]) -> np.ndarray:
    if entry["dtype"] == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif entry["dtype"] in ("F32", "F16"):
        values = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[str(entry["dtype"])])
    else:
        raise BenchError(f"unknown dtype {entry['dtype']}")
    return values.astype(np.float64).reshape(entry["shape"])  # type: ignore[call-overload, no-any-return]


def _table(outcomes: list[Outcome]) -> str:
    lines = ["| config | outcome | largest difference (ulp) | unlike entries |", "|---|---|---|---|"]
    for o in outcomes:
        numbers = (f"{o.largest:.2g}", f"{o.unlike:.2%}") if o.unlike else ("", "")
        if o.verdict == "alike in size":
            numbers = (f"norms {o.largest:.3f} : 1", "")
        lines.append(f"| {o.name.strip()} | {o.verdict} | {numbers[0]} | {numbers[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
