"""Make all cases, in a process of their own; record them in hashes.json, or compare them with it.

    python -m tests.same_bytes                      # what differs
    python -m tests.same_bytes --only 'ties*'       # of these cases alone
    python -m tests.same_bytes --tensors 'ties*'    # a line for each tensor, to compare two checkouts with diff
    python -m tests.same_bytes --write              # record, where a change of bytes is meant

    python -m tests.same_bytes --elsewhere          # what changes if the libraries compute as on lesser processors

hashes.json has one line for each case: its digest, the same with the kernels and without them (where they differ there
is another line, "NAME [torch]").  Bits of matrix products and decompositions belong to the processor and to the
libraries' versions: cases with one of the words `MATRICES` have a sketch too, which is what counts on another machine.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

__all__ = ["MODES", "differences", "main", "report"]

FILE = Path(__file__).with_name("hashes.json")
MODES = ("kernels", "torch")
SHOWN = 20
TOLERANCE = 1e-3
"""Of a sketch, relative to the root mean square of the output's numbers: doge comes to 1.4e-4, and one entry that is
rounded the other way to bfloat16 may come to 5e-4."""

MATRICES = (
    *("aswudi", "doge", "iso_c", "knots", "opcm", "optmerge", "r_tsvm", "regmean", "swudi", "tsvm"),
    *(
        "weight_matching",
        "widen",
        "wudi",
        "fwsvd",
        "losparse",
        "rmm",
        "tsvc",
        "twin",
        "adapter",
        "mbat: {binder: dense",
        "mbat: {denoise: lowrank",
        "lora",
        "transplant",
        "model-wide",
    ),
)
"""Words in the names of cases that multiply or decompose matrices."""

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "OMP_WAIT_POLICY": "passive",
    "PYTHONHASHSEED": "0",
}
OTHER_PROCESSORS: tuple[Mapping[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {
        **{"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
        **{"OPENBLAS_CORETYPE": "Nehalem", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    },
)
"""Make the libraries compute as they do on lesser processors."""

Found = dict[str, Any]
"""Case -> [digest, sketch], or the text of an error."""


def differences(mode: str, only: str = "*") -> list[str]:
    """A line for each case that is not as recorded."""
    recorded = json.loads(FILE.read_text("utf-8"))
    known: dict[str, Any] = recorded["cases"]
    at_home = recorded["machine"] == machine()
    found = run(mode, only)
    lines = []
    for name, value in found.items():
        wanted = known.get(f"{name} [{mode}]", known.get(name))
        if isinstance(value, str):
            lines.append(f"{name}: {value}")
        elif wanted is None:
            how = f"python -m tests.same_bytes --write --only '{name}'"
            lines.append(f"{name}: not recorded yet; record it with: {how}")
        elif (far := _compared(value, wanted, at_home)) is not None:
            lines.append(f"{name}: {far}")
    if mode == "kernels":
        gone = [n for n in known if _chosen(n, only) and n not in found and not n.endswith(" [torch]")]
        lines += [f"{name}: recorded, but no longer made" for name in gone]
    return lines


def _compared(value: list[Any], wanted: Any, at_home: bool) -> str | None:
    """What is wrong with one case."""
    now, sketch = value
    digest, *before = wanted if isinstance(wanted, list) else [wanted]
    if now == digest:
        return None
    if at_home or not before:
        return f"{now}, recorded {digest}"
    off = _distance(sketch, before)
    return None if off <= TOLERANCE else f"its sketch is off by {off:.2g} of its size, more than {TOLERANCE:g}"


def _distance(sketch: list[float], before: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(sketch, before, strict=True)) / max(before[0], 1e-30)


def _by_matrices(name: str) -> bool:
    return any(word in name for word in MATRICES)


def report(mode: str, lines: list[str]) -> str:
    """The first of these lines, and how many there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"not as recorded ({mode}): {len(lines)} of the outputs", *lines[:SHOWN], *more])


@functools.cache
def machine() -> list[str]:
    """On what the bits of decompositions depend."""
    import numpy
    import torch

    told = dict(_pair(line) for line in reversed(_lines("/proc/cpuinfo")))  # of the first processor
    # One name stands for processors of several generations: the libraries choose their code by the instructions.
    kind = " ".join(told.get(key, "?") for key in ("cpu family", "model", "stepping"))
    instructions = hashlib.sha256(told.get("flags", "").encode()).hexdigest()[:8]
    return [
        told.get("model name", platform.processor()),
        f"kind {kind}, instructions {instructions}",
        f"torch {torch.__version__}",
        f"numpy {numpy.__version__}",
    ]


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _lines(file: str) -> list[str]:
    return Path(file).read_text("utf-8").splitlines() if Path(file).exists() else []


# --- making the cases -----------------------------------------------------------------------------


def run(mode: str, only: str = "*", environment: Mapping[str, str] | None = None, tensors: bool = False) -> Found:
    """Make the cases in a new process: kernels, threads and libraries are chosen when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        path = os.pathsep.join(filter(None, [str(FILE.parent.parent), os.environ.get("PYTHONPATH", "")]))
        chosen = {"WEIGHTSMITH_KERNELS": "1" if mode == "kernels" else "0", "PYTHONPATH": path}
        words = ["--emit", str(out), "--mode", mode, "--only", only, *(["--tensors"] if tensors else [])]
        done = subprocess.run(
            [sys.executable, "-m", "same_bytes", *words],
            env={**os.environ, **ONE_THREAD, **chosen, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the cases could not be made:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: Found = json.loads(out.read_text("utf-8"))
        return found


def _emit(out: Path, mode: str, only: str, tensors: bool) -> None:
    """Make the cases in this process."""
    import torch

    from .payload import digest, sketch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found: Found = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        for case in _cases(Path(place)):
            if not _chosen(case.name, only) or (mode == "torch" and not case.plain):
                continue
            assert case.name not in found, f"two cases are called {case.name}"
            folder = Path(place, f"case{len(found)}")
            folder.mkdir()
            start = time.process_time()
            try:
                parts = case.make(folder)
                found[case.name] = (
                    {p[0]: digest([p]) for p in parts}
                    if tensors
                    else [digest(parts), sketch(parts, signed="codec" not in case.name and "lora" not in case.name)]
                )
            except Exception as error:
                found[case.name] = f"{type(error).__name__}: {error}"
            if os.environ.get("SAME_BYTES_TIMES"):
                print(f"{time.process_time() - start:.3f} {case.name}", file=sys.stderr)
    out.write_text(json.dumps(found), "utf-8")


def _cases(place: Path) -> Iterator[Any]:
    from . import files, folders, methods

    @functools.cache
    def root() -> Path:
        made = (place / "models").resolve()
        folders.make(made)
        os.chdir(made)
        return made

    yield from methods.cases()
    yield from files.cases(root)


def _chosen(name: str, only: str) -> bool:
    return fnmatchcase(name, only) or fnmatchcase(name, only.replace("[", "[[]"))


# --- recording ------------------------------------------------------------------------------------


def _write(only: str) -> None:
    """Record what is made now."""
    runs = {mode: run(mode, only) for mode in MODES}
    failed = [f"{name}: {value}" for found in runs.values() for name, value in found.items() if isinstance(value, str)]
    if failed:
        raise SystemExit("\n".join(["these cases cannot be made:", *failed]))
    before = json.loads(FILE.read_text("utf-8")) if FILE.exists() and only != "*" else {"cases": {}}
    made = {n: v for n, v in before["cases"].items() if not _chosen(n.removesuffix(" [torch]"), only)}
    for name, (digest, sketch) in {**runs["torch"], **runs["kernels"]}.items():
        made[name] = [digest, *sketch] if _by_matrices(name) else digest
    for name, (digest, sketch) in runs["torch"].items():
        if name in runs["kernels"] and digest != runs["kernels"][name][0]:
            made[f"{name} [torch]"] = [digest, *sketch] if _by_matrices(name) else digest
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(made.items())]
    told = json.dumps(machine())
    FILE.write_text(f'{{"machine": {told},\n"cases": {{\n' + ",\n".join(lines) + "\n}}\n", "utf-8")
    sys.stdout.write(f"{len(made)} lines in {FILE.name}, {sum(map(_by_matrices, made))} of them with a sketch\n")


def _elsewhere(mode: str, only: str) -> int:
    """Say which cases other processors would change, and how far; 1 if one of them has no sketch or is too far."""
    here, wrong = run(mode, only), 0
    for environment in OTHER_PROCESSORS:
        for name, value in run(mode, only, environment).items():
            if value[0] != here[name][0]:
                off = _distance(value[1], here[name][1])
                bad = "" if _by_matrices(name) and off <= TOLERANCE else "NOT FORESEEN "
                sys.stdout.write(f"{bad}{off:.1e} {name} ({mode}, {environment['ATEN_CPU_CAPABILITY']})\n")
                wrong |= bool(bad)
    return wrong


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.same_bytes", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the digests of the outputs made now")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases to make, by name")
    parser.add_argument("--tensors", action="store_true", help="print the digest of every tensor")
    parser.add_argument("--elsewhere", action="store_true", help="see what depends on the processor")
    parser.add_argument("--mode", choices=MODES, help="with the kernels, or in plain torch; default: both")
    parser.add_argument("--emit", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.emit:
        _emit(told.emit, told.mode, told.only, told.tensors)
        return 0
    if told.write:
        _write(told.only)
        return 0
    wrong = 0
    for mode in (told.mode,) if told.mode else MODES:
        if told.tensors:
            for name, parts in run(mode, told.only, tensors=True).items():
                each = parts.items() if isinstance(parts, dict) else [("", parts)]
                sys.stdout.writelines(f"{mode} | {name} | {part} | {value}\n" for part, value in each)
        elif told.elsewhere:
            wrong |= _elsewhere(mode, told.only)
        elif lines := differences(mode, told.only):
            wrong = 1
            sys.stdout.write(report(mode, lines) + "\n")
    return wrong
